//! Parts of devices that are touched for every byte, and by I/O threads.
//!
//! Each is a register core without bus, lock, thread or I/O, and a device for the
//! bus around it. This crate knows no machine, no engine and no Python.

mod intx;
mod messages;
mod msix;
mod serial_port;
mod uart16550;

pub use intx::Intx;
pub use messages::{Message, Messages, SendMessage};
pub use msix::{MAX_VECTORS, MsixTable, PENDING_OFFSET};
pub use serial_port::{Drive, SerialPort};
pub use uart16550::Registers;
