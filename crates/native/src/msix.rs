//! `tetrarch._native.MsixTable` and `MsiVectors`.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_devices::{MAX_VECTORS, Messages, SendMessage};

use crate::error::Failure;
use crate::rust_device::RustDevice;
use crate::virtio::Interrupt;
use crate::vm::Vm;

fn send(vm: &Bound<'_, Vm>) -> SendMessage {
    let engine = Arc::clone(&vm.get().machine.engine);
    Box::new(move |address, data| engine.msi(address, data))
}

fn vector(
    messages: &Arc<Messages>,
    number: usize,
    otherwise: Option<&Bound<'_, Interrupt>>,
) -> Interrupt {
    let otherwise = otherwise.map(|interrupt| Arc::clone(&interrupt.get().0));
    Interrupt(messages.vector(number, otherwise))
}

/// The vectors of a function's MSI capability, which lies in its configuration space.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct MsiVectors(Arc<Messages>);

#[pymethods]
impl MsiVectors {
    #[new]
    fn new(vm: &Bound<'_, Vm>, vectors: usize) -> Result<Self, Failure> {
        if !matches!(vectors, 1 | 2 | 4 | 8 | 16 | 32) {
            return Err(Failure::refused(format!(
                "MSI has 1, 2, 4, 8, 16 or 32 vectors, not {vectors}"
            )));
        }
        Ok(Self(Arc::new(Messages::new(vectors, false, send(vm)))))
    }

    #[getter]
    fn vectors(&self) -> usize {
        self.0.vectors()
    }

    fn set_control(&self, py: Python<'_>, enabled: bool) {
        py.detach(|| self.0.set_control(enabled, false));
    }

    fn set(&self, py: Python<'_>, number: usize, address: u64, data: u32, masked: bool) {
        py.detach(|| {
            self.0.set_address(number, address);
            self.0.set_data(number, data);
            self.0.set_masked(number, masked);
        });
    }

    /// A bit for each vector.
    #[getter]
    fn pending(&self) -> u32 {
        let bits = 0..self.0.vectors();
        bits.fold(0, |word, bit| word | u32::from(self.0.pending(bit)) << bit)
    }

    fn set_pending(&self, pending: u32) {
        (0..self.0.vectors()).for_each(|bit| self.0.set_pending(bit, pending >> bit & 1 != 0));
    }

    #[pyo3(signature = (number, otherwise = None))]
    fn vector(&self, number: usize, otherwise: Option<&Bound<'_, Interrupt>>) -> Interrupt {
        vector(&self.0, number, otherwise)
    }

    fn reset(&self) {
        self.0.reset(false);
    }
}

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
        let table = Arc::new(tetrarch_devices::MsixTable::new(vectors, send(vm)));
        let base = RustDevice::new(Arc::clone(&table) as _);
        Ok(PyClassInitializer::from(base).add_subclass(Self { table, vectors }))
    }

    #[getter]
    fn vectors(&self) -> usize {
        self.vectors
    }

    fn set_control(&self, py: Python<'_>, enabled: bool, masked: bool) {
        py.detach(|| self.table.messages().set_control(enabled, masked));
    }

    #[pyo3(signature = (number, otherwise = None))]
    fn vector(&self, number: usize, otherwise: Option<&Bound<'_, Interrupt>>) -> Interrupt {
        vector(self.table.messages(), number, otherwise)
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
