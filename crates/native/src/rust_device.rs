//! Devices written in Rust, as Python holds them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;
use tetrarch_bus::{Device, DeviceError};

use crate::error::Failure;

/// A device written in Rust: the base of each. It is attached as one written in
/// Python is, and no access of a guest enters the interpreter.
#[pyclass(frozen, subclass, module = "tetrarch._native")]
pub struct RustDevice {
    device: Arc<dyn Device>,
}

impl RustDevice {
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    /// What goes onto the bus.
    pub fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device)
    }
}

#[pymethods]
impl RustDevice {
    fn read(&self, py: Python<'_>, offset: u64, size: u8) -> Result<u64, Failure> {
        check(size)?;
        let value = py.detach(|| self.device.read(offset, size))?;
        // The bus ignores what is over the size, too.
        Ok(value & u64::MAX >> (64 - 8 * u32::from(size)))
    }

    fn write(&self, py: Python<'_>, offset: u64, size: u8, value: u64) -> Result<(), Failure> {
        check(size)?;
        Ok(py.detach(|| self.device.write(offset, size, value))?)
    }
}

/// The bus promises a device these sizes.
fn check(size: u8) -> Result<(), Failure> {
    match size {
        1 | 2 | 4 | 8 => Ok(()),
        _ => Err(Failure::refused(format!("an access has 1, 2, 4 or 8 bytes, not {size}"))),
    }
}

/// A device that reads as 0 and loses writes.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct NullPort;

#[pymethods]
impl NullPort {
    #[new]
    fn new() -> PyClassInitializer<Self> {
        let device = Arc::new(Null);
        PyClassInitializer::from(RustDevice::new(device)).add_subclass(Self)
    }
}

struct Null;

impl Device for Null {
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A register that reads as what was written last, at any offset.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct Latch {
    register: Arc<Register>,
}

#[pymethods]
impl Latch {
    #[new]
    fn new() -> PyClassInitializer<Self> {
        let register = Arc::new(Register::default());
        let device = Arc::clone(&register);
        PyClassInitializer::from(RustDevice::new(device)).add_subclass(Self { register })
    }

    #[getter]
    fn value(&self) -> u64 {
        self.register.value.load(Ordering::Acquire)
    }

    #[getter]
    fn writes(&self) -> u64 {
        self.register.writes.load(Ordering::Acquire)
    }
}

#[derive(Default)]
struct Register {
    value: AtomicU64,
    writes: AtomicU64,
}

impl Device for Register {
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(self.value.load(Ordering::Acquire))
    }

    fn write(&self, _offset: u64, _size: u8, value: u64) -> Result<(), DeviceError> {
        self.value.store(value, Ordering::Release);
        self.writes.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
