//! `tetrarch._native.DeviceMemory`: what the guest uses as RAM, and a device as a screen.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_memory::{GuestPhys, MemoryError};

use crate::error::Failure;
use crate::vm::Vm;

#[pyclass(frozen, module = "tetrarch._native")]
pub struct DeviceMemory(tetrarch_memory::DeviceMemory);

#[pymethods]
impl DeviceMemory {
    #[new]
    fn new(length: u64) -> Result<Self, Failure> {
        Ok(Self(tetrarch_memory::DeviceMemory::new(length)?))
    }

    #[getter]
    fn length(&self) -> u64 {
        self.0.len()
    }

    fn map(&self, py: Python<'_>, vm: &Bound<'_, Vm>, address: u64) -> Result<(), Failure> {
        let machine = &vm.get().machine;
        Ok(py.detach(|| machine.map_device(address, &self.0))?)
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: u64,
    ) -> Result<Bound<'py, PyBytes>, Failure> {
        // Before the bytes are allocated, so that no wrong length can ask for much.
        if !self.0.contains(offset, length) {
            return Err(MemoryError::OutOfRange { address: GuestPhys(offset), length }.into());
        }
        let fill = |data: &mut [u8]| {
            let read = py.detach(|| self.0.read(offset, data));
            read.map_err(|error| Failure::from(error).into())
        };
        Ok(PyBytes::new_with(py, length as usize, fill)?)
    }

    fn write(&self, py: Python<'_>, offset: u64, data: &[u8]) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.write(offset, data))?)
    }
}
