//! Disk controllers that guests without virtio know: their queues, commands and data paths.
//! Registers of their life cycle are above, in Python; disks are below, behind `tetrarch-block`.

pub mod ahci;
pub mod ata;
pub mod ide;
mod landed;
pub mod nvme;
pub mod pvscsi;
mod requests;
mod runs;
mod saved;
pub mod scsi;

pub use saved::DamagedState;
