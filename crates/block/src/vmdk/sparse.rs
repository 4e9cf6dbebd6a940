//! Hosted sparse extents: a directory of tables of grains, each of which is somewhere in the file,
//! or compressed there (VMware's "Virtual Disk Format 5.0", "Hosted Sparse Extents" and
//! "Stream-Optimized Compressed Sparse Extents").

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;

use super::descriptor::{self, Descriptor, damaged, unsupported};
use crate::ImageError;
use crate::backend::SECTOR;
use crate::qcow2::read_at_most;
use crate::raw::size_of;

pub(crate) const MAGIC: &[u8] = b"KDMV";
/// What FTP's text mode would have changed ("Sparse Extent Header").
const NEWLINES: [u8; 4] = *b"\n \r\n";

const REDUNDANT: u32 = 1 << 1;
/// An entry of 1 is a grain of zeroes.
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
const DEFLATE: u16 = 1;

/// The directory is where the footer says.
const AT_END: u64 = u64::MAX;
/// Footer, its marker, and the end of the stream.
const TAIL: u64 = 3 * SECTOR;
pub(super) const MARKER_FOOTER: u32 = 3;
/// A marker's number, and the size that follows it.
pub(super) const GRAIN_HEAD: usize = 12;

/// In sectors; VMware's grains have 128.
const GRAIN_MAX: u64 = 4096;
/// VMware's tables have 512 entries, and QEMU takes no more.
const TABLE_MAX: u32 = 4096;
/// Entries of a directory: with VMware's tables a disk of 32 TiB.
const DIRECTORY_MAX: u64 = 1 << 20;
/// Entries of tables that are kept, of 4 bytes.
const KEPT_MAX: usize = 2 << 20;
/// Grains that are kept unpacked: a guest reads less than one at a time.
const UNPACKED_MAX: usize = 8;

/// Of the images that are made here.
pub(super) const GRAIN: u64 = 64 << 10;
pub(super) const PER_TABLE: u64 = 512;
/// Where the descriptor is, and its room.
pub(super) const DESCRIPTOR_AT: u64 = 1;
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;

/// All but the magic number, in its order; sectors, where it is a place or a size.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    pub version: u32,
    pub flags: u32,
    pub capacity: u64,
    pub grain: u64,
    pub descriptor: u64,
    pub descriptor_size: u64,
    pub per_table: u32,
    pub redundant: u64,
    pub directory: u64,
    pub overhead: u64,
    pub compression: u16,
}

impl Header {
    /// Of a stream that is made here; the header before it does not know the directory yet.
    pub fn of_stream(size: u64, directory: Option<u64>) -> Self {
        Self {
            version: 3,
            flags: 1 | COMPRESSED | MARKERS,
            directory: directory.unwrap_or(AT_END),
            overhead: GRAIN / SECTOR,
            compression: DEFLATE,
            ..Self::of_disk(size)
        }
    }

    fn of_disk(size: u64) -> Self {
        Self {
            version: 1,
            flags: 1 | REDUNDANT,
            capacity: size / SECTOR,
            grain: GRAIN / SECTOR,
            descriptor: DESCRIPTOR_AT,
            descriptor_size: DESCRIPTOR_SECTORS,
            per_table: PER_TABLE as u32,
            ..Self::default()
        }
    }

    pub fn bytes(&self) -> [u8; SECTOR as usize] {
        let mut bytes = [0; SECTOR as usize];
        bytes[..4].copy_from_slice(MAGIC);
        let u32s = [(4, self.version), (8, self.flags), (44, self.per_table)];
        for (at, value) in u32s {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let u64s = [
            (12, self.capacity),
            (20, self.grain),
            (28, self.descriptor),
            (36, self.descriptor_size),
            (48, self.redundant),
            (56, self.directory),
            (64, self.overhead),
        ];
        for (at, value) in u64s {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[73..77].copy_from_slice(&NEWLINES);
        bytes[77..79].copy_from_slice(&self.compression.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; SECTOR as usize], path: &Path) -> Result<Self, ImageError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let header = Self {
            version: u32_at(4),
            flags: u32_at(8),
            capacity: u64_at(12),
            grain: u64_at(20),
            descriptor: u64_at(28),
            descriptor_size: u64_at(36),
            per_table: u32_at(44),
            redundant: u64_at(48),
            directory: u64_at(56),
            overhead: u64_at(64),
            compression: u16::from_le_bytes([bytes[77], bytes[78]]),
        };
        // Version 3 has lists of changed blocks beside the disk, which nobody needs to read it.
        if !(1..=3).contains(&header.version) {
            return Err(unsupported(path, &format!("version {}", header.version)));
        }
        if header.flags & 1 != 0 && bytes[73..77] != NEWLINES {
            return Err(damaged(path, "it was copied as text, which changed its bytes"));
        }
        let grain = header.grain;
        if !grain.is_power_of_two() || grain > GRAIN_MAX {
            return Err(damaged(path, format!("grains of {grain} sectors")));
        }
        if header.per_table == 0 || header.per_table > TABLE_MAX {
            return Err(damaged(path, format!("tables of {} entries", header.per_table)));
        }
        if header.capacity == 0 || header.tables() > DIRECTORY_MAX {
            return Err(damaged(path, format!("a disk of {} sectors", header.capacity)));
        }
        let packed = header.flags & COMPRESSED != 0;
        if packed && (header.compression != DEFLATE || header.flags & MARKERS == 0) {
            return Err(unsupported(path, "compression other than deflate"));
        }
        Ok(header)
    }

    /// Entries of the directory.
    fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain).div_ceil(u64::from(self.per_table))
    }
}

/// What is known of a file's tables, and where the next grain goes.
struct Tables {
    /// By their places in the directory.
    kept: HashMap<u32, Box<[u32]>>,
    /// In bytes.
    next: u64,
}

/// Grains as the disk has them, by their numbers.
type Unpacked = Vec<(u64, Arc<[u8]>)>;

pub(super) struct Sparse {
    file: File,
    /// In bytes: of the disk, and of a grain.
    size: u64,
    grain: u64,
    per_table: u64,
    zero_grains: bool,
    packed: bool,
    directory: Vec<u32>,
    /// Where each table is once more; of an extent that is written to.
    redundant: Option<Vec<u32>>,
    /// Held while a grain gets its place.
    tables: Mutex<Tables>,
    unpacked: Mutex<Unpacked>,
}

impl Sparse {
    /// Looks at all tables, so that damage is found before the disk is used.
    pub fn open(
        file: File,
        path: &Path,
        writes: bool,
    ) -> Result<(Self, Option<Descriptor>), ImageError> {
        let host = |error| ImageError::host(path, "cannot read the image", error);
        let end = size_of(&file, path)?;
        let first = sector(&file, 0, path)?;
        let mut header = Header::parse(&first, path)?;
        let embedded = embedded_descriptor(&file, &header, path)?;
        let packed = header.flags & COMPRESSED != 0;
        if packed && writes {
            let cause = "streamOptimized vmdk images are not written to";
            let mend = "add readonly or snapshot=on, or convert it: tetrarch disk convert";
            return Err(ImageError::new(path, cause, mend));
        }
        if header.directory == AT_END {
            header = footer(&file, end, path)?;
        }
        let directory = directory(&file, header.directory, header.tables(), end, path)?;
        let redundant = if writes && header.flags & REDUNDANT != 0 {
            Some(self::directory(&file, header.redundant, header.tables(), end, path)?)
        } else {
            None
        };
        let mut sparse = Self {
            file,
            size: header.capacity.saturating_mul(SECTOR),
            grain: header.grain * SECTOR,
            per_table: u64::from(header.per_table),
            zero_grains: header.flags & ZERO_GRAINS != 0,
            packed,
            directory,
            redundant,
            tables: Mutex::new(Tables { kept: HashMap::new(), next: 0 }),
            unpacked: Mutex::default(),
        };
        let data = if writes { sparse.end_of_tables(&header, path)? } else { 0 };
        sparse.check(data, end, path, host)?;
        sparse.tables.get_mut().next = end.max(data).next_multiple_of(sparse.grain);
        Ok((sparse, embedded))
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// Where grains can be: a guest that could write to tables would be given any part of the file.
    fn end_of_tables(&self, header: &Header, path: &Path) -> Result<u64, ImageError> {
        let bytes = self.per_table * 4;
        let of = |at: u64, entries: &[u32]| {
            let tables = entries.iter().map(|&entry| u64::from(entry) * SECTOR + bytes);
            (at.saturating_mul(SECTOR) + entries.len() as u64 * 4).max(tables.max().unwrap_or(0))
        };
        let all = std::iter::once(&self.directory).chain(&self.redundant);
        if all.clone().any(|entries| entries.contains(&0)) {
            let cause = "vmdk images without some of their grain tables are not written to";
            let mend = "add readonly or snapshot=on, or convert it: tetrarch disk convert";
            return Err(ImageError::new(path, cause, mend));
        }
        let descriptor = header.descriptor.saturating_add(header.descriptor_size);
        let mut end = descriptor.saturating_mul(SECTOR).max(SECTOR);
        for (at, entries) in [header.directory, header.redundant].into_iter().zip(all) {
            end = end.max(of(at, entries));
        }
        Ok(end)
    }

    /// Refuses entries that lead out of the file, or, where it is written to, below `data`.
    fn check(
        &self,
        data: u64,
        end: u64,
        path: &Path,
        host: impl Fn(io::Error) -> ImageError,
    ) -> Result<(), ImageError> {
        let cut = || {
            let mend = "get the file again, or save what is left: qemu-img convert -f vmdk";
            let cause = "damaged vmdk image: its file ends before its data do";
            ImageError::new(path, cause, mend)
        };
        let bytes = self.per_table * 4;
        let tables = self.directory.iter().chain(self.redundant.iter().flatten());
        for &table in tables.filter(|&&table| table != 0) {
            if u64::from(table) * SECTOR + bytes > end {
                return Err(cut());
            }
        }
        // A table that is many times there makes a large disk of a small file, and is read as often.
        let mut own: Vec<u32> =
            self.directory.iter().copied().filter(|&table| table != 0).collect();
        own.sort_unstable();
        if own.windows(2).any(|two| two[0] == two[1]) {
            return Err(damaged(path, "two of its grain tables lie at one place"));
        }
        for (index, &table) in self.directory.iter().enumerate().filter(|(_, table)| **table != 0) {
            for (number, entry) in (0..).zip(self.read_table(table).map_err(&host)?) {
                if entry == 0 || entry == 1 && self.zero_grains {
                    continue;
                }
                let grain = index as u64 * self.per_table + number;
                let at = u64::from(entry) * SECTOR;
                let length = self.length(grain);
                if length > 0 && at + if self.packed { GRAIN_HEAD as u64 } else { length } > end {
                    return Err(cut());
                }
                if at < data {
                    let cause = "its grains lie among its tables";
                    return Err(damaged(path, cause));
                }
            }
        }
        Ok(())
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// How much of a grain is of the disk.
    fn length(&self, grain: u64) -> u64 {
        self.size.saturating_sub(grain.saturating_mul(self.grain)).min(self.grain)
    }

    fn read_table(&self, at: u32) -> io::Result<Box<[u32]>> {
        let mut bytes = vec![0; self.per_table as usize * 4];
        self.file.read_exact_at(&mut bytes, u64::from(at) * SECTOR)?;
        Ok(numbers(&bytes))
    }

    fn entry(&self, tables: &mut Tables, grain: u64) -> io::Result<u32> {
        let (index, number) = (grain / self.per_table, (grain % self.per_table) as usize);
        let Some(&at) = self.directory.get(index as usize) else { return Ok(0) };
        if at == 0 {
            return Ok(0);
        }
        if let Some(table) = tables.kept.get(&(index as u32)) {
            return Ok(table[number]);
        }
        let table = self.read_table(at)?;
        if (tables.kept.len() + 1) * table.len() > KEPT_MAX {
            tables.kept.clear();
        }
        let entry = table[number];
        tables.kept.insert(index as u32, table);
        Ok(entry)
    }

    /// Where a grain is, in bytes, if it is anywhere.
    fn place(&self, tables: &mut Tables, grain: u64) -> io::Result<Option<u64>> {
        let entry = self.entry(tables, grain)?;
        let zero = entry == 0 || entry == 1 && self.zero_grains;
        Ok((!zero).then(|| u64::from(entry) * SECTOR))
    }

    /// How many bytes from `offset` on are zeroes because there is no grain.
    pub fn hole(&self, offset: u64) -> io::Result<u64> {
        let mut tables = self.tables.lock();
        let mut grain = offset / self.grain;
        // A table at a time, of which the next one need not be read.
        let last = (grain / self.per_table + 1) * self.per_table;
        while grain < last && self.place(&mut tables, grain)?.is_none() {
            grain += 1;
        }
        Ok((grain.saturating_mul(self.grain)).min(self.size).saturating_sub(offset))
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.each(offset, buffer.len(), |grain, within, range| {
            let part = &mut buffer[range];
            let place = self.place(&mut self.tables.lock(), grain)?;
            match place {
                None => part.fill(0),
                Some(at) if self.packed => {
                    let unpacked = self.unpack(grain, at)?;
                    let within = within as usize;
                    part.copy_from_slice(&unpacked[within..within + part.len()]);
                }
                Some(at) => self.file.read_exact_at(part, at + within)?,
            }
            Ok(())
        })
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.each(offset, data.len(), |grain, within, range| {
            let part = &data[range];
            let place = self.place(&mut self.tables.lock(), grain)?;
            match place {
                Some(at) => self.file.write_all_at(part, at + within),
                None => self.allocate(grain, within, part),
            }
        })
    }

    /// Makes bytes read as zeroes, for which no grain is needed.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let grain = at / self.grain;
            let within = at % self.grain;
            let here = (self.grain - within).min(end - at);
            let place = self.place(&mut self.tables.lock(), grain)?;
            match place {
                Some(place) => zero_file(&self.file, place + within, here)?,
                None => {
                    at += self.hole(at)?.min(end - at).max(here);
                    continue;
                }
            }
            at += here;
        }
        Ok(())
    }

    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// A grain's place is written down when its data are there.
    fn allocate(&self, grain: u64, within: u64, part: &[u8]) -> io::Result<()> {
        let mut tables = self.tables.lock();
        if let Some(at) = self.place(&mut tables, grain)? {
            return self.file.write_all_at(part, at + within);
        }
        let sector = tables.next / SECTOR;
        let entry = u32::try_from(sector).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if part.len() as u64 == self.grain {
            self.file.write_all_at(part, tables.next)?;
        } else {
            let mut whole = vec![0; self.grain as usize];
            whole[within as usize..][..part.len()].copy_from_slice(part);
            self.file.write_all_at(&whole, tables.next)?;
        }
        tables.next += self.grain;
        let (index, number) = ((grain / self.per_table) as usize, grain % self.per_table);
        let redundant = self.redundant.as_ref().map(|tables| tables[index]);
        for table in [Some(self.directory[index]), redundant].into_iter().flatten() {
            let at = u64::from(table) * SECTOR + number * 4;
            self.file.write_all_at(&entry.to_le_bytes(), at)?;
        }
        if let Some(table) = tables.kept.get_mut(&(index as u32)) {
            table[number as usize] = entry;
        }
        Ok(())
    }

    /// Calls `each` with a grain, the place in it, and the part of the buffer.
    fn each(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(u64, u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let within = at % self.grain;
            let here = (self.grain - within).min((length - done) as u64) as usize;
            each(at / self.grain, within, done..done + here)?;
            done += here;
        }
        Ok(())
    }

    fn unpack(&self, grain: u64, at: u64) -> io::Result<Arc<[u8]>> {
        if let Some((_, data)) = self.unpacked.lock().iter().find(|(number, _)| *number == grain) {
            return Ok(Arc::clone(data));
        }
        let mut head = [0; GRAIN_HEAD];
        self.file.read_exact_at(&mut head, at)?;
        let first = u64::from_le_bytes(head[..8].try_into().expect("8 bytes"));
        let size = u64::from(u32::from_le_bytes(head[8..].try_into().expect("4 bytes")));
        let wrong = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        if first != grain * (self.grain / SECTOR) {
            return Err(wrong(format!("the marker at {at:#x} is of another grain")));
        }
        // What cannot be made smaller becomes a little larger (RFC 1951, 3.2.4).
        if size > self.grain + (self.grain >> 4) + 64 {
            return Err(wrong(format!("the grain at {at:#x} has {size} bytes")));
        }
        let mut packed = vec![0; size as usize];
        self.file.read_exact_at(&mut packed, at + GRAIN_HEAD as u64)?;
        let mut data = vec![0; self.grain as usize];
        let flags = TINFL_FLAG_PARSE_ZLIB_HEADER | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, written) =
            decompress(&mut DecompressorOxide::new(), &packed, &mut data, 0, flags);
        if status != TINFLStatus::Done || (written as u64) < self.length(grain) {
            return Err(wrong(format!("the grain at {at:#x} cannot be unpacked")));
        }
        let data: Arc<[u8]> = data.into();
        let mut unpacked = self.unpacked.lock();
        if unpacked.len() == UNPACKED_MAX {
            unpacked.remove(0);
        }
        unpacked.push((grain, Arc::clone(&data)));
        Ok(data)
    }
}

/// Makes a part of a file read as zeroes; its space goes back to the host where that knows holes.
pub(super) fn zero_file(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if length == 0 || rustix::fs::fallocate(file, mode, offset, length).is_ok() {
        return Ok(());
    }
    let zeroes = vec![0; length.min(1 << 20) as usize];
    let mut done = 0;
    while done < length {
        let here = (length - done).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..here as usize], offset + done)?;
        done += here;
    }
    Ok(())
}

fn sector(file: &File, at: u64, path: &Path) -> Result<[u8; SECTOR as usize], ImageError> {
    let mut bytes = [0; SECTOR as usize];
    let there = read_at_most(file, &mut bytes, at)
        .map_err(|error| ImageError::host(path, "cannot read the image", error))?;
    if there < bytes.len() {
        return Err(damaged(path, format!("it ends after {} bytes", at + there as u64)));
    }
    Ok(bytes)
}

/// The header once more, at the end of a stream.
fn footer(file: &File, end: u64, path: &Path) -> Result<Header, ImageError> {
    let missing = || {
        let mend = "get the file again";
        ImageError::new(path, "damaged vmdk image: its file ends before its footer", mend)
    };
    let at = end.checked_sub(TAIL).ok_or_else(missing)?;
    let marker = sector(file, at, path)?;
    if marker[8..12] != [0; 4] || marker[12..16] != MARKER_FOOTER.to_le_bytes() {
        return Err(missing());
    }
    let bytes = sector(file, at + SECTOR, path)?;
    if !bytes.starts_with(MAGIC) {
        return Err(missing());
    }
    let header = Header::parse(&bytes, path)?;
    if header.directory == AT_END || header.flags & COMPRESSED == 0 {
        return Err(damaged(path, "its footer"));
    }
    Ok(header)
}

fn directory(
    file: &File,
    at: u64,
    count: u64,
    end: u64,
    path: &Path,
) -> Result<Vec<u32>, ImageError> {
    let place = at.checked_mul(SECTOR).filter(|&place| place >= SECTOR);
    let inside = place.filter(|place| place.checked_add(count * 4).is_some_and(|to| to <= end));
    let Some(place) = inside else {
        return Err(damaged(path, format!("its grain directory at sector {at}")));
    };
    let mut bytes = vec![0; count as usize * 4];
    file.read_exact_at(&mut bytes, place)
        .map_err(|error| ImageError::host(path, "cannot read the image", error))?;
    Ok(numbers(&bytes).into())
}

fn numbers(bytes: &[u8]) -> Box<[u32]> {
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
    bytes.chunks_exact(4).map(number).collect()
}

/// The text in the file, with the place of its content's number counted from the file's begin.
fn embedded_descriptor(
    file: &File,
    header: &Header,
    path: &Path,
) -> Result<Option<Descriptor>, ImageError> {
    let place = header.descriptor.checked_mul(SECTOR);
    let size = header.descriptor_size.saturating_mul(SECTOR);
    let Some(at) = place.filter(|&at| at > 0 && size > 0) else { return Ok(None) };
    let mut bytes = vec![0; size.min(descriptor::BYTES_MAX as u64) as usize];
    let there = read_at_most(file, &mut bytes, at)
        .map_err(|error| ImageError::host(path, "cannot read the image", error))?;
    bytes.truncate(bytes[..there].iter().position(|&byte| byte == 0).unwrap_or(there));
    // Lines are looked at by bytes, so that their places are those of the file.
    let text: String =
        bytes.iter().map(|&byte| if byte < 128 { byte as char } else { '?' }).collect();
    let mut found = Descriptor::parse(&text, path, true)?;
    found.content_id = found.content_id.map(|place| place + at as usize);
    Ok(Some(found))
}

/// Makes an empty extent with all of its tables, as QEMU and VMware lay it out.
pub(super) fn create(file: &File, path: &Path, size: u64) -> io::Result<()> {
    let mut header = Header::of_disk(size);
    let tables = header.tables();
    let table_sectors = PER_TABLE * 4 / SECTOR;
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let both = directory_sectors + tables * table_sectors;
    header.redundant = DESCRIPTOR_AT + DESCRIPTOR_SECTORS;
    header.directory = header.redundant + both;
    header.overhead = (header.directory + both).next_multiple_of(GRAIN / SECTOR);
    file.set_len(header.overhead * SECTOR)?;
    for at in [header.redundant, header.directory] {
        let first = at + directory_sectors;
        let entries = (0..tables).map(|index| (first + index * table_sectors) as u32);
        let bytes: Vec<u8> = entries.flat_map(u32::to_le_bytes).collect();
        file.write_all_at(&bytes, at * SECTOR)?;
    }
    let text = descriptor::text("monolithicSparse", path, size);
    file.write_all_at(text.as_bytes(), DESCRIPTOR_AT * SECTOR)?;
    file.write_all_at(&header.bytes(), 0)
}
