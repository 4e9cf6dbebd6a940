//! Devices whose registers are touched for every byte.
//!
//! Each is a register core without bus, lock, thread or I/O, and a device for the
//! bus around it. This crate knows no machine, no engine and no Python.

mod output;
mod serial_port;
mod uart16550;

pub use output::Output;
pub use serial_port::{Drive, SerialPort};
pub use uart16550::Registers;
