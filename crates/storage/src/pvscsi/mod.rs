//! VMware's paravirtual SCSI controller (Linux, drivers/scsi/vmw_pvscsi.h): rings of requests and
//! completions in guest memory, and a disk or a CD-ROM drive at each target.
//!
//! Commands of the controller come from above, through [`Pvscsi`]; kicks and interrupts are
//! registers here, without an interpreter.

mod config_page;
mod controller;
mod data;
mod hba;
mod registers;
mod request;
mod rings;
mod saved;
mod target;

pub use controller::{CommandError, Pvscsi};
pub use registers::RingRegisters;
pub use rings::RingPages;
pub use saved::Saved;

/// Targets of a controller, each with one unit.
pub const MAX_TARGETS: usize = 16;
/// Rings are made of pages of this size, which have numbers.
const PAGE: u64 = 4096;
/// The most pages of a ring of requests or completions, and of one of messages.
pub const MAX_RING_PAGES: usize = 32;
pub const MAX_MESSAGE_PAGES: usize = 16;
