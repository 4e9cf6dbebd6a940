//! VMware's VMXNET3 (Linux, drivers/net/vmxnet3/vmxnet3_defs.h and upt1_defs.h), of revisions 1 and
//! 2.
//!
//! What a driver asks once comes from above, through [`Vmxnet3`]: addresses and commands. Rings,
//! their doorbells and interrupt masks are here, without an interpreter.

mod card;
mod controller;
mod filter;
mod interrupts;
mod layout;
mod receive;
mod registers;
mod rings;
mod rss;
mod saved;
mod transmit;

pub use crate::MacAddress;
pub use controller::Vmxnet3;
pub use interrupts::{Causes, MAX_INTERRUPTS};
pub use layout::ActivateError;
pub use registers::CardRegisters;
pub use saved::{DamagedState, Saved};

/// Queues that a driver may have (VMXNET3_MAX_TX_QUEUES, VMXNET3_MAX_RX_QUEUES).
pub const MAX_TX: usize = 8;
pub const MAX_RX: usize = 16;
