//! Devices written in Python, as the bus sees them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyInt;
use tetrarch_bus::{Device, DeviceError, DeviceKind};

/// How often devices and handlers of one machine entered the interpreter.
#[derive(Default)]
pub struct Crossings {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    /// Of a platform's handlers.
    pub calls: AtomicU64,
}

/// A Python object with `read` and `write`.
///
/// Lock: the interpreter's, taken for the call alone; the vCPU's thread holds
/// no other that Python code could want but the vCPU itself. Where it is dropped
/// on a vCPU's thread, the interpreter gets its references back later.
pub struct PythonDevice {
    /// The class, for messages.
    name: String,
    /// Bound methods, looked up once: an access then costs one call.
    read: Py<PyAny>,
    write: Py<PyAny>,
    crossings: Arc<Crossings>,
}

impl PythonDevice {
    pub fn new(device: &Bound<'_, PyAny>, crossings: &Arc<Crossings>) -> PyResult<Self> {
        let name = device.get_type().qualname()?.to_string();
        let method = |method: &str| -> PyResult<Py<PyAny>> {
            match device.getattr_opt(method)? {
                Some(bound) if bound.is_callable() => Ok(bound.unbind()),
                _ => Err(PyTypeError::new_err(format!(
                    "{name} is no device: it has no method '{method}'"
                ))),
            }
        };
        let (read, write) = (method("read")?, method("write")?);
        Ok(Self { name, read, write, crossings: Arc::clone(crossings) })
    }

    pub fn traverse(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.read)?;
        visit.call(&self.write)
    }

    /// What `read` returned, if it is what a device may return.
    fn value(&self, result: &Bound<'_, PyAny>, offset: u64, size: u8) -> PyResult<u64> {
        let call = || format!("{}.read(offset={offset:#x}, size={size})", self.name);
        let Ok(value) = result.cast::<PyInt>() else {
            let kind = result.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("{} returned {kind}, not int", call())));
        };
        let bits = u32::from(size) * 8;
        match value.extract::<u64>() {
            Ok(value) if bits >= 64 || value >> bits == 0 => Ok(value),
            _ => Err(PyValueError::new_err(format!(
                "{} returned {}, which is not in 0..2**{bits}",
                call(),
                value.str()?
            ))),
        }
    }
}

/// Runs `call` in the interpreter, which an ending process has no longer.
pub fn attached<T>(call: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, DeviceError> {
    match Python::try_attach(call) {
        Some(result) => result.map_err(DeviceError::new),
        None => Err(DeviceError::new("the Python interpreter is shutting down")),
    }
}

impl Device for PythonDevice {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        self.crossings.reads.fetch_add(1, Ordering::Relaxed);
        attached(|py| {
            let result = self.read.bind(py).call1((offset, size))?;
            self.value(&result, offset, size)
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        self.crossings.writes.fetch_add(1, Ordering::Relaxed);
        attached(|py| self.write.bind(py).call1((offset, size, value)).map(drop))
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Python
    }
}
