//! `tetrarch._native.MsixTable`.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_devices::MAX_VECTORS;

use crate::error::Failure;
use crate::rust_device::RustDevice;
use crate::virtio::Interrupt;
use crate::vm::Vm;

/// The MSI-X structures of one function: a device for a page of one of its BARs.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct MsixTable {
    table: Arc<tetrarch_devices::MsixTable>,
    vectors: usize,
}

#[pymethods]
impl MsixTable {
    #[classattr]
    const PENDING_OFFSET: u64 = tetrarch_devices::PENDING_OFFSET;

    #[new]
    fn new(vm: &Bound<'_, Vm>, vectors: usize) -> Result<PyClassInitializer<Self>, Failure> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(Failure::refused(format!(
                "a table of MSI-X has 1 to {MAX_VECTORS} vectors, not {vectors}"
            )));
        }
        let engine = Arc::clone(&vm.get().machine.engine);
        let send = Box::new(move |address, data| engine.msi(address, data));
        let table = Arc::new(tetrarch_devices::MsixTable::new(vectors, send));
        let base = RustDevice::new(Arc::clone(&table) as _);
        Ok(PyClassInitializer::from(base).add_subclass(Self { table, vectors }))
    }

    #[getter]
    fn vectors(&self) -> usize {
        self.vectors
    }

    fn set_control(&self, py: Python<'_>, enabled: bool, masked: bool) {
        py.detach(|| self.table.set_control(enabled, masked));
    }

    #[pyo3(signature = (number, otherwise = None))]
    fn vector(&self, number: usize, otherwise: Option<&Bound<'_, Interrupt>>) -> Interrupt {
        let otherwise = otherwise.map(|interrupt| Arc::clone(&interrupt.get().0));
        Interrupt(self.table.vector(number, otherwise))
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.table.reset());
    }

    fn save(&self, py: Python<'_>) -> (Vec<u32>, Vec<bool>) {
        py.detach(|| self.table.save())
    }

    fn load(&self, py: Python<'_>, words: Vec<u32>, pending: Vec<bool>) -> bool {
        py.detach(|| self.table.load(&words, &pending))
    }
}
