//! The one place where Rust errors become Python exceptions.

use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use tetrarch_bus::{AttachError, DeviceError, RunError};
use tetrarch_machine::{MachineError, NotHeld};
use tetrarch_memory::{ImageError, MemoryError};

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

pyo3::create_exception!(
    tetrarch._native,
    GuestFault,
    PyException,
    "An exception for the guest: GuestFault(vector, error=None, address=0)."
);

/// What a handler wants the guest to get; else what it raised goes on.
pub fn guest_fault(py: Python<'_>, raised: PyErr) -> PyResult<tetrarch_engine::GuestFault> {
    if !raised.is_instance_of::<GuestFault>(py) {
        return Err(raised);
    }
    let arguments = raised.value(py).getattr("args")?;
    let part = |index: usize| arguments.get_item(index).ok().filter(|part| !part.is_none());
    let number =
        |part: Option<Bound<'_, PyAny>>| part.map(|part| part.extract::<u64>()).transpose();
    let (vector, error, address) = match (number(part(0)), number(part(1)), number(part(2))) {
        (Ok(Some(vector @ 0..32)), Ok(error), Ok(address)) => (vector as u8, error, address),
        _ => {
            return Err(PyValueError::new_err(format!(
                "GuestFault{arguments}: it takes a vector (0-31), an error code, an address"
            )));
        }
    };
    // Intel SDM 3A, table 6-1.
    let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
    if error.is_some_and(|error| !has_error || error > u64::from(u32::MAX)) {
        return Err(PyValueError::new_err(format!(
            "GuestFault{arguments}: exception {vector} has no such error code"
        )));
    }
    let error = has_error.then(|| error.unwrap_or(0) as u32);
    Ok(tetrarch_engine::GuestFault { vector, error, address: address.unwrap_or(0) })
}

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
    pub fn refused(message: impl std::fmt::Display) -> Self {
        Self::Engine(tetrarch_engine::EngineError::Refused(message.to_string()))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        // With its number, so that Python has its words apart (OSError.strerror).
        Self::Python(match error.raw_os_error() {
            Some(number) => {
                let text = error.to_string();
                let words = text.split(" (os error").next().unwrap_or_default().to_owned();
                PyOSError::new_err((number, words))
            }
            None => error.into(),
        })
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Memory(error)
            | Failure::Engine(tetrarch_engine::EngineError::Memory(error)) => memory_error(error),
            Failure::Engine(error) => {
                let (cause, mend) = error.parts();
                engine_error(&error.to_string(), &cause, mend.as_deref())
            }
            Failure::Attach(error) => {
                let line = error.to_string();
                engine_error(&line, &line, None)
            }
            Failure::Device(error) => device_error(error),
            Failure::Hold(failed) => {
                let (cause, mend) = (failed.error.to_string(), failed.mend());
                engine_error(&format!("{cause}; {mend}"), &cause, Some(&mend))
            }
            Failure::Python(error) => error,
        }
    }
}

/// With `cause` and `mend` as `TetrarchError` has them.
fn engine_error(line: &str, cause: &str, mend: Option<&str>) -> PyErr {
    Python::attach(|py| {
        let exception = EngineError::new_err(line.to_owned());
        let value = exception.value(py);
        let fields =
            value.setattr("cause", cause).and_then(|()| value.setattr("mend", mend.unwrap_or("")));
        fields.map_or_else(|failed| failed, |()| exception)
    })
}

fn memory_error(error: MemoryError) -> PyErr {
    let MemoryError::OutOfRange { address, length } = error else {
        return engine_error(&error.to_string(), &error.cause(), error.mend());
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

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::File(error) => error.into(),
            ImageError::Memory(error) => error.into(),
            damaged @ ImageError::Damaged(..) => Self::refused(damaged),
        }
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
            MachineError::Hold(failed) => Self::Hold(failed),
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
