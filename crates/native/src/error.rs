//! The one place where Rust errors become Python exceptions.

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use tetrarch_bus::{AttachError, DeviceError, RunError};
use tetrarch_machine::{MachineError, NotHeld};
use tetrarch_memory::MemoryError;

pyo3::create_exception!(
    tetrarch._native,
    EngineError,
    PyException,
    "The engine cannot do what was asked: a host limit or a bad request."
);

pyo3::create_exception!(
    tetrarch._native,
    GuestMemoryError,
    PyException,
    "A guest physical range that is not RAM of this machine."
);

/// Anything that can go wrong below this crate; on its way to Python.
pub enum Failure {
    Engine(tetrarch_engine::EngineError),
    Memory(MemoryError),
    Attach(AttachError),
    Device(DeviceError),
    Hold(NotHeld),
    Python(PyErr),
}

impl Failure {
    /// A request that makes no sense.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::Engine(tetrarch_engine::EngineError::Refused(message.into()))
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Memory(error)
            | Failure::Engine(tetrarch_engine::EngineError::Memory(error)) => memory_error(error),
            Failure::Engine(error) => EngineError::new_err(error.to_string()),
            Failure::Attach(error) => EngineError::new_err(error.to_string()),
            Failure::Device(error) => device_error(error),
            Failure::Hold(failed) => {
                EngineError::new_err(format!("{}; {}", failed.error, failed.mend()))
            }
            Failure::Python(error) => error,
        }
    }
}

fn memory_error(error: MemoryError) -> PyErr {
    let MemoryError::OutOfRange { address, length } = error else {
        return EngineError::new_err(error.to_string());
    };
    Python::attach(|py| {
        let exception = GuestMemoryError::new_err(error.to_string());
        let value = exception.value(py);
        let fields =
            value.setattr("address", address.0).and_then(|()| value.setattr("length", length));
        fields.map_or_else(|failed| failed, |()| exception)
    })
}

/// What a Python device raised goes on as the same object with its traceback.
fn device_error(error: DeviceError) -> PyErr {
    match error.into_cause().downcast::<PyErr>() {
        Ok(raised) => *raised,
        Err(cause) => EngineError::new_err(format!("a device failed: {cause}")),
    }
}

impl From<tetrarch_engine::EngineError> for Failure {
    fn from(error: tetrarch_engine::EngineError) -> Self {
        Self::Engine(error)
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Self {
        Self::Attach(error)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Engine(error) => Self::Engine(error),
            MachineError::Memory(error) => Self::Memory(error),
            MachineError::Attach(error) => Self::Attach(error),
        }
    }
}

impl From<NotHeld> for Failure {
    fn from(failed: NotHeld) -> Self {
        Self::Hold(failed)
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Engine(error) => Self::Engine(error),
            RunError::Device(error) => Self::Device(error),
        }
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}
