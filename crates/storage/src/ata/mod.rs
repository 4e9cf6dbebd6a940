//! ATA devices (ATA8-ACS): what a command asks of a drive, whichever controller it came by.

mod drive;
mod identify;
mod task_file;

pub use drive::{By, Drive, DriveState, Medium, Refusal, Step, failure};
pub use identify::MULTIPLE;
pub use task_file::TaskFile;

/// Status register (6.2).
pub mod status {
    pub const BUSY: u8 = 1 << 7;
    pub const READY: u8 = 1 << 6;
    pub const FAULT: u8 = 1 << 5;
    /// Seek complete, which drivers still look for.
    pub const SEEK: u8 = 1 << 4;
    pub const DATA_REQUEST: u8 = 1 << 3;
    pub const ERROR: u8 = 1 << 0;
}

/// Error register (6.3).
pub mod error {
    pub const UNCORRECTABLE: u8 = 1 << 6;
    pub const NOT_FOUND: u8 = 1 << 4;
    pub const ABORT: u8 = 1 << 2;
}

/// Bytes of a sector, of a drive with any block size.
pub const SECTOR: u64 = 512;

/// The most sectors of ranges that one command trims.
pub const TRIM_BLOCKS: u64 = 8;
