//! Network cards for guests without virtio: rings, registers that are touched for frames, and data
//! paths. This crate knows no machine and no Python.

pub mod vmxnet3;
