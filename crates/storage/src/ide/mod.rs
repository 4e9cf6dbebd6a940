//! An IDE controller as in Intel's PIIX3: two channels of two drives at the ports that every PC
//! had for them, by programmed I/O and by a bus master (ATA8-APT; "Programming Interface for
//! Bus Master IDE Controller", 1.0).

mod bus_master;
mod channel;
mod controller;
mod device;

pub use controller::{ControlPort, Ide, MasterPorts, Saved, TaskPorts};

pub const CHANNELS: usize = 2;
/// Drives of a channel.
pub const DRIVES: usize = 2;
