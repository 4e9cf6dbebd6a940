//! An AHCI controller (Serial ATA AHCI 1.3.1): ports with command lists in guest memory.
//!
//! Sections cited here are of that specification; frames are those of Serial ATA 3.0.

mod controller;
mod fis;
mod hba;
mod port;
mod table;

pub use controller::{Ahci, AhciRegisters, Saved};

/// Commands of a port.
pub const SLOTS: usize = 32;
/// The most ports of a controller.
pub const MAX_PORTS: usize = 32;
