//! `tetrarch._native.VirtioVsock`.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_virtio::{DataPath, Device, Vsock};

use crate::descriptor::own_descriptor;
use crate::error::Failure;
use crate::virtio::{VirtioDevice, no_io};
use crate::vm::Vm;

/// The socket device. Listens on a Unix socket that Python has bound.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioVsock {
    device: Arc<Device<Vsock>>,
}

#[pymethods]
impl VirtioVsock {
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        cid: u64,
        path: PathBuf,
        listener: i32,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let listener = UnixListener::from(own_descriptor(listener)?);
        let path_made = Vsock::new(cid, path, listener).map_err(|error| no_io(name, &error))?;
        let (base, device) = VirtioDevice::make(vm, name, 3, path_made)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self { device }))
    }

    /// Ends all connections, when the machine has ended.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.device.with_path(|path, _| path.reset()));
    }

    /// Tells the driver that all connections are gone.
    fn reset_transport(&self, py: Python<'_>) {
        py.detach(|| self.device.with_path(|path, _| path.reset_transport()));
    }
}
