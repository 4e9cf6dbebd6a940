//! `tetrarch._native.VirtioBalloon`.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use tetrarch_virtio::balloon::{QUEUES, Statistics};
use tetrarch_virtio::{Balloon, Device};

use crate::error::Failure;
use crate::virtio::VirtioDevice;
use crate::vm::Vm;

/// The memory balloon.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioBalloon {
    device: Arc<Device<Balloon>>,
    statistics: Arc<Statistics>,
}

#[pymethods]
impl VirtioBalloon {
    #[new]
    fn new(vm: &Bound<'_, Vm>, name: &str) -> Result<PyClassInitializer<Self>, Failure> {
        let path = Balloon::new(Arc::clone(&vm.get().machine.memory));
        let statistics = path.statistics();
        let (base, device) = VirtioDevice::make(vm, name, QUEUES, path)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self { device, statistics }))
    }

    fn statistics(&self, py: Python<'_>, timeout: f64) -> Option<Vec<(u16, u64)>> {
        let timeout = Duration::try_from_secs_f64(timeout).ok()?;
        py.detach(|| {
            let before = self.statistics.count();
            self.device.apply(|path, queues| path.ask(queues))?;
            self.statistics.wait(before, timeout)
        })
    }
}
