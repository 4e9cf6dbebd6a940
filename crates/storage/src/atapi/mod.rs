//! CD-ROM drives (SFF-8020, MMC-5; SPC-3 for what all SCSI devices have): packet commands.

mod cd;
mod sense;
mod toc;

pub use cd::{Answer, Cd, PACKET};
pub use sense::Sense;
