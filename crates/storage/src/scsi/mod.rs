//! SCSI devices (SPC-3 for what all have; SBC-3 for disks; SFF-8020 and MMC-5 for CD-ROM drives):
//! what a command asks of a drive, whichever controller it came by.

mod cd;
mod cdb;
mod disk;
mod inquiry;
mod mode;
mod sense;
mod toc;
mod unit;

pub use cd::{Answer, Cd, PACKET};
pub use cdb::Cdb;
pub use disk::{Disk, MAX_SAME_BLOCKS, MAX_TRANSFER_BLOCKS};
pub use sense::Sense;
pub use unit::{Drive, Step, Unit};

/// INQUIRY's name for who made a device.
const VENDOR: &[u8; 8] = b"TETRARCH";
const REVISION: &[u8; 4] = b"1.0 ";
