//! Writing a recording.

use std::fs::File;
use std::io::Write;

use crate::{CHUNK_BYTES, CHUNK_MAX, Entry, HEAD_BYTES, JournalError, MAGIC, crc};

pub struct Writer {
    file: File,
    /// Entries of the chunk that is being made.
    raw: Vec<u8>,
    written: u64,
}

impl Writer {
    /// Begins a recording in an empty file, of a machine with this configuration.
    pub fn new(mut file: File, configuration: &str) -> Result<Self, JournalError> {
        file.write_all(&MAGIC)?;
        let text = configuration.as_bytes();
        file.write_all(&(text.len() as u32).to_le_bytes())?;
        file.write_all(text)?;
        file.write_all(&crc(text).to_le_bytes())?;
        let written = (MAGIC.len() + 8 + text.len()) as u64;
        Ok(Self { file, raw: Vec::with_capacity(2 * CHUNK_BYTES), written })
    }

    /// Adds an entry; `count` is the machine's.
    pub fn put(&mut self, count: u64, entry: &Entry) -> Result<(), JournalError> {
        let raw = std::mem::take(&mut self.raw);
        self.raw = postcard::to_extend(entry, raw).map_err(JournalError::Entry)?;
        if self.raw.len() >= CHUNK_BYTES { self.flush(count) } else { Ok(()) }
    }

    /// Hands all entries to the host.
    pub fn flush(&mut self, count: u64) -> Result<(), JournalError> {
        if self.raw.is_empty() {
            return Ok(());
        }
        if self.raw.len() > CHUNK_MAX {
            return Err(JournalError::Entry(postcard::Error::SerializeBufferFull));
        }
        let packed = lz4_flex::block::compress(&self.raw);
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        head.extend_from_slice(&(self.raw.len() as u32).to_le_bytes());
        head.extend_from_slice(&count.to_le_bytes());
        let sum = crc(&head);
        head.extend_from_slice(&sum.to_le_bytes());
        head.extend_from_slice(&crc(&packed).to_le_bytes());
        self.file.write_all(&head)?;
        self.file.write_all(&packed)?;
        self.written += (head.len() + packed.len()) as u64;
        self.raw.clear();
        Ok(())
    }

    /// Bytes that were handed to the host.
    pub fn written(&self) -> u64 {
        self.written
    }
}
