//! Disk controllers that guests without virtio know: their queues, commands and data paths.
//! Registers of their life cycle are above, in Python; disks are below, behind `tetrarch-block`.

pub mod ahci;
pub mod ata;
mod atapi;
pub mod ide;
mod landed;
pub mod nvme;
mod requests;
mod saved;

pub use saved::DamagedState;
