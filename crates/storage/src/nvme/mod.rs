//! An NVMe controller (NVM Express 1.4): queue pairs in guest memory, and one namespace.
//!
//! Sections cited here are of the base specification. What a driver configures by registers
//! (3.1) comes from above, through [`Nvme`]; doorbells come here without an interpreter.

mod admin;
mod command;
mod controller;
mod doorbells;
mod events;
mod features;
mod identify;
mod log_page;
mod nvm;
mod prp;
mod queue;
mod saved;
mod status;

pub use controller::{AdminQueues, EnableError, Nvme};
pub use identify::About;
pub use saved::{DamagedState, Saved};

/// The most I/O queue pairs of a controller: more than a driver has CPUs are of no use to it.
pub const MAX_PAIRS: usize = 16;
/// The most entries of a queue, as CAP.MQES says less one (3.1.1).
pub const MAX_ENTRIES: u32 = 1024;
/// The most entries of an admin queue: the bits that AQA has for them (3.1.8).
const MAX_ADMIN_ENTRIES: u32 = 4096;
/// A memory page is 4 KiB: CC.MPS can be nothing else (3.1.5).
pub const PAGE: u64 = 4096;
/// The most data of a command, as MDTS says (5.15.2.2, figure 247): 2^7 pages.
const MAX_TRANSFER_SHIFT: u8 = 7;
const MAX_TRANSFER: u64 = PAGE << MAX_TRANSFER_SHIFT;
/// The one namespace.
const NAMESPACE: u32 = 1;
/// What stands for all namespaces (6.1).
const ALL_NAMESPACES: u32 = u32::MAX;
