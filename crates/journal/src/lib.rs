//! The file of a recorded machine: what came to it from outside, by count of instructions.
//!
//! ```text
//! 8 bytes  MAGIC, in which the last is the version of this form
//! u32      length of the machine's configuration, which follows as text; u32 its CRC
//! chunk    u32 bytes that follow its head, u32 bytes they unpack to, u64 count at its end,
//!          u32 CRC-32 of the three, u32 CRC-32 of the bytes; the bytes, by LZ4's block format
//! ```
//!
//! Numbers are little-endian, CRCs those of IEEE 802.3. A chunk unpacks to a sequence of
//! [`Entry`], each in postcard's encoding. Chunks follow each other to the end of the file. One
//! that is not all there was being written when the recorder died: what precedes it is whole.

mod entry;
mod reader;
mod writer;

pub use entry::{Answer, Bytes, Checkpoint, Entry, Input, Line, Outside, Start, Stop};
pub use reader::{Place, Reader};
pub use writer::Writer;

pub const MAGIC: [u8; 8] = *b"TETRJNL\x01";

/// A chunk is written when it has so many bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// The most that any can have: an entry that begins in it is whole.
const CHUNK_MAX: usize = 512 << 20;
const HEAD_BYTES: usize = 24;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("it is no recording of this version")]
    Foreign,
    #[error("it is damaged at byte {0}")]
    Damaged(u64),
    #[error("an entry cannot be written: {0}")]
    Entry(postcard::Error),
}

use crc32fast::hash as crc;

#[cfg(test)]
mod tests;
