//! `tetrarch._native.VhostUserBackEnd` and `VhostUserDevice`.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::PyConnectionError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_vhost_user::{BackEndError, Frontend};
use tetrarch_virtio::Device;
use tetrarch_virtio::vhost_user::{NotMade, Served, VhostUser};

use crate::descriptor::own_descriptor;
use crate::error::Failure;
use crate::virtio::{VirtioDevice, no_io};
use crate::vm::Vm;

/// An answer takes microseconds; a back end that opens files first, or whose host swaps, longer.
const PATIENCE: Duration = Duration::from_secs(5);

impl From<BackEndError> for Failure {
    fn from(error: BackEndError) -> Self {
        Self::Python(PyConnectionError::new_err(format!("the back end {error}")))
    }
}

/// One that has agreed on the protocol, until a device takes it over.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct VhostUserBackEnd(Mutex<Option<Frontend>>);

impl VhostUserBackEnd {
    fn with<T>(&self, body: impl FnOnce(&Frontend) -> T) -> Result<T, Failure> {
        self.0.lock().as_ref().map(body).ok_or_else(taken)
    }
}

fn taken() -> Failure {
    Failure::refused("a device has the back end already")
}

#[pymethods]
impl VhostUserBackEnd {
    #[new]
    fn new(py: Python<'_>, socket: i32) -> Result<Self, Failure> {
        let socket = UnixStream::from(own_descriptor(socket)?);
        let frontend = py.detach(|| Frontend::new(socket, PATIENCE))?;
        Ok(Self(Mutex::new(Some(frontend))))
    }

    #[getter]
    fn features(&self, py: Python<'_>) -> Result<u64, Failure> {
        py.detach(|| self.with(Frontend::features))
    }

    #[getter]
    fn queues(&self, py: Python<'_>) -> Result<usize, Failure> {
        py.detach(|| self.with(Frontend::queues))
    }

    fn config<'py>(&self, py: Python<'py>, length: u8) -> Result<Bound<'py, PyBytes>, Failure> {
        let config = py.detach(|| self.with(|frontend| frontend.config(length.into())))??;
        Ok(PyBytes::new(py, &config))
    }
}

/// A device whose queues a back end serves.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VhostUserDevice(Arc<Device<VhostUser>>);

#[pymethods]
impl VhostUserDevice {
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        served: &str,
        back_end: &Bound<'_, VhostUserBackEnd>,
        queues: usize,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let served = match served {
            "blk" => Served::Blk,
            "fs" => Served::Fs,
            "net" => Served::Net,
            other => return Err(Failure::refused(format!("there is no kind {other:?}"))),
        };
        let frontend = back_end.get().0.lock().take().ok_or_else(taken)?;
        let memory = Arc::clone(&vm.get().machine.memory);
        let path =
            VhostUser::new(served, memory, frontend, queues).map_err(|error| match error {
                NotMade::Memory(error) => Failure::from(error),
                NotMade::Io(error) => no_io(name, &error),
            })?;
        let (base, device) = VirtioDevice::make(vm, name, queues, path)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self(device)))
    }

    #[getter]
    fn alive(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.with_path(|path, _| path.alive()))
    }

    /// Hangs up, when the machine has ended.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.with_path(|path, _| path.close()));
    }
}
