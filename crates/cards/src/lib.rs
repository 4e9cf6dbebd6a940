//! Network cards for guests without virtio: rings, registers that are touched for frames, and data
//! paths. This crate knows no machine and no Python.

mod announcement;
pub mod e1000;
pub mod vmxnet3;

pub type MacAddress = [u8; 6];

/// Takes the level of the interrupt line to the machine; must not call into devices.
pub type Drive = Box<dyn Fn(bool) + Send + Sync>;
