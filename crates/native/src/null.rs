//! `tetrarch._native.NullPort`: a device that does nothing, and does it in Rust.

use pyo3::prelude::*;
use tetrarch_bus::{Device, DeviceError};

/// Stands for a device in Rust where one is to be compared or measured.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct NullPort;

#[pymethods]
impl NullPort {
    #[new]
    fn new() -> Self {
        Self
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        let _ = (offset, size);
        0
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let _ = (offset, size, value);
    }
}

/// The same on the bus, where no call reaches Python.
pub struct NullDevice;

impl Device for NullDevice {
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}
