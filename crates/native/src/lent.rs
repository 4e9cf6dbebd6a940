//! `tetrarch._native.VirtioServed`: queues that Python serves, on a thread of its own.

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_virtio::{Lender, Lent, LentChain};

use crate::error::Failure;
use crate::virtio::VirtioDevice;
use crate::vm::Vm;

/// The most that one call gives: a chain may name gigabytes.
const READ_MAX: u64 = 1 << 20;

#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioServed {
    lender: Lender,
}

#[pymethods]
impl VirtioServed {
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        queues: usize,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let (base, device) = VirtioDevice::make(vm, name, queues, Lent::new(queues))?;
        Ok(PyClassInitializer::from(base).add_subclass(Self { lender: Lender::new(device) }))
    }

    fn wait(&self, py: Python<'_>) -> Option<usize> {
        py.detach(|| self.lender.wait())
    }

    fn take(&self, py: Python<'_>, queue: usize) -> Option<VirtioChain> {
        py.detach(|| self.lender.take(queue)).map(|chain| VirtioChain(Mutex::new(chain)))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.lender.close());
    }
}

/// One chain of buffers.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct VirtioChain(Mutex<LentChain>);

#[pymethods]
impl VirtioChain {
    #[classattr]
    const READ_MAX: u64 = READ_MAX;

    #[getter]
    fn readable(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.0.lock().readable())
    }

    #[getter]
    fn writable(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.0.lock().writable())
    }

    #[pyo3(signature = (limit = READ_MAX))]
    fn read<'py>(&self, py: Python<'py>, limit: u64) -> Bound<'py, PyBytes> {
        let data = py.detach(|| {
            let mut chain = self.0.lock();
            let mut data = vec![0; chain.readable().min(limit).min(READ_MAX) as usize];
            let count = chain.read(&mut data);
            data.truncate(count);
            data
        });
        PyBytes::new(py, &data)
    }

    fn write(&self, py: Python<'_>, data: &[u8]) -> usize {
        py.detach(|| self.0.lock().write(data))
    }

    fn done(&self, py: Python<'_>) {
        py.detach(|| self.0.lock().give_back());
    }
}
