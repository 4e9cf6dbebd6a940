//! Reading a recording, which may be damaged or somebody else's.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek};
use std::os::unix::fs::FileExt;

use crate::{CHUNK_MAX, Entry, HEAD_BYTES, JournalError, MAGIC, crc};

/// More than any configuration has.
const CONFIGURATION_MAX: usize = 16 << 20;

#[derive(Clone, Copy, Debug)]
struct Chunk {
    at: u64,
    packed: usize,
    unpacked: usize,
    /// The machine's count behind it.
    count: u64,
}

/// Where a reader is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    chunk: usize,
    offset: usize,
}

pub struct Reader {
    file: File,
    pub configuration: String,
    chunks: Vec<Chunk>,
    /// The chunk that is unpacked, if it is one.
    open: Option<usize>,
    raw: Vec<u8>,
    place: Place,
    /// The recorder died while it wrote: the last chunk was not all there.
    pub cut: bool,
}

impl Reader {
    /// The configuration of the machine that was recorded.
    pub fn configuration_of(mut file: File) -> Result<String, JournalError> {
        file.rewind()?;
        let configuration = configuration(&mut file)?;
        file.rewind()?;
        Ok(configuration)
    }

    /// Looks at all of the file: what is damaged is refused before a guest runs by it.
    pub fn new(file: File) -> Result<Self, JournalError> {
        let length = file.metadata()?.len();
        let mut read = BufReader::with_capacity(1 << 20, &file);
        let configuration = configuration(&mut read)?;
        let mut at = (MAGIC.len() + 8 + configuration.len()) as u64;
        let mut chunks = Vec::new();
        let mut cut = false;
        let mut packed = Vec::new();
        while at < length {
            let mut head = [0; HEAD_BYTES];
            if length - at < HEAD_BYTES as u64 {
                cut = true;
                break;
            }
            read.read_exact(&mut head)?;
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| head[at + byte]));
            let (size, unpacked) = (word(0) as usize, word(4) as usize);
            let count = u64::from(word(12)) << 32 | u64::from(word(8));
            if word(16) != crc(&head[..16]) || size > 2 * CHUNK_MAX || unpacked > CHUNK_MAX {
                return Err(JournalError::Damaged(at));
            }
            let data = at + HEAD_BYTES as u64;
            if length - data < size as u64 {
                cut = true;
                break;
            }
            packed.resize(size, 0);
            read.read_exact(&mut packed)?;
            if word(20) != crc(&packed) {
                return Err(JournalError::Damaged(at));
            }
            chunks.push(Chunk { at: data, packed: size, unpacked, count });
            at = data + size as u64;
        }
        let (raw, place) = (Vec::new(), Place::default());
        Ok(Self { file, configuration, chunks, open: None, raw, place, cut })
    }

    /// The count that the recording comes to.
    pub fn last_count(&self) -> u64 {
        self.chunks.last().map_or(0, |chunk| chunk.count)
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Goes back, or on, to a place that it was at.
    pub fn go(&mut self, place: Place) {
        self.place = place;
    }

    /// The next entry; `None` behind the last.
    pub fn read(&mut self) -> Result<Option<Entry>, JournalError> {
        loop {
            let Place { chunk, offset } = self.place;
            let Some(&found) = self.chunks.get(chunk) else { return Ok(None) };
            if self.open != Some(chunk) {
                self.unpack(found)?;
                self.open = Some(chunk);
            }
            let rest = self.raw.get(offset..).unwrap_or_default();
            if rest.is_empty() {
                self.place = Place { chunk: chunk + 1, offset: 0 };
                continue;
            }
            let (entry, after) =
                postcard::take_from_bytes(rest).map_err(|_| JournalError::Damaged(found.at))?;
            self.place.offset = self.raw.len() - after.len();
            return Ok(Some(entry));
        }
    }

    fn unpack(&mut self, chunk: Chunk) -> Result<(), JournalError> {
        let mut packed = vec![0; chunk.packed];
        // By pread(2): the thread of a vCPU has no call that seeks.
        self.file.read_exact_at(&mut packed, chunk.at)?;
        self.raw = lz4_flex::block::decompress(&packed, chunk.unpacked)
            .map_err(|_| JournalError::Damaged(chunk.at))?;
        Ok(())
    }
}

fn configuration(file: &mut impl Read) -> Result<String, JournalError> {
    let short = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => JournalError::Foreign,
        _ => error.into(),
    };
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic).map_err(short)?;
    if magic != MAGIC {
        return Err(JournalError::Foreign);
    }
    let damaged = JournalError::Damaged(MAGIC.len() as u64);
    let size = number(file).map_err(short)? as usize;
    if size > CONFIGURATION_MAX {
        return Err(damaged);
    }
    let mut text = vec![0; size];
    file.read_exact(&mut text).map_err(short)?;
    if number(file).map_err(short)? != crc(&text) {
        return Err(damaged);
    }
    String::from_utf8(text).map_err(|_| damaged)
}

fn number(file: &mut impl Read) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}
