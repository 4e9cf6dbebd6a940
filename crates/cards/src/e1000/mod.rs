//! Intel's 82540EM (PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual,
//! 317453): the *manual* of the files here.
//!
//! What a driver asks seldom, of EEPROM, PHY and the card as a whole, comes from above, through
//! [`E1000`]. All other registers, and rings, are here, without an interpreter.

mod card;
mod controller;
mod file;
mod filter;
mod interrupts;
mod receive;
mod registers;
mod ring;
mod saved;
mod statistics;
mod transmit;

pub use controller::E1000;
pub use registers::{CardRegisters, FIRST_REGISTER};
pub use saved::{DamagedState, Saved};
