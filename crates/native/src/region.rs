//! `tetrarch._native.Region`: where a device answers.

use std::sync::Weak;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use tetrarch_bus::AttachError;

use crate::error::Failure;
use crate::python_device::PythonDevice;
use crate::vm::Vm;

/// A range of ports or of memory with its device.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Region {
    vm: Py<Vm>,
    region: tetrarch_bus::Region,
    /// The device, if it is one in Python. Weak: the machine owns it, for the
    /// garbage collector.
    python: Option<Weak<PythonDevice>>,
}

impl Region {
    pub fn new(
        vm: Py<Vm>,
        region: tetrarch_bus::Region,
        python: Option<Weak<PythonDevice>>,
    ) -> Self {
        Self { vm, region, python }
    }

    fn place(&self) -> Result<(u64, u64, bool), Failure> {
        Ok(self.region.place().ok_or(AttachError::Detached)?)
    }
}

#[pymethods]
impl Region {
    #[getter]
    fn base(&self) -> Result<u64, Failure> {
        Ok(self.place()?.0)
    }

    #[getter]
    fn length(&self) -> Result<u64, Failure> {
        Ok(self.place()?.1)
    }

    #[getter]
    fn mapped(&self) -> Result<bool, Failure> {
        Ok(self.place()?.2)
    }

    fn r#move(&self, base: u64) -> Result<(), Failure> {
        Ok(self.region.move_to(base)?)
    }

    fn map(&self) -> Result<(), Failure> {
        Ok(self.region.map()?)
    }

    fn unmap(&self) -> Result<(), Failure> {
        Ok(self.region.unmap()?)
    }

    fn detach(&self) {
        // First the bus, then the list: the collector must know of a device for
        // as long as it can be called. Both are dropped when no lock is held.
        let device = self.region.detach();
        let listed = self.python.as_ref().and_then(|python| self.vm.get().forget(python));
        drop((device, listed));
    }

    fn __repr__(&self) -> String {
        match self.region.place() {
            None => "<tetrarch._native.Region, detached>".into(),
            Some((base, length, mapped)) => {
                let state = if mapped { "" } else { ", unmapped" };
                format!("<tetrarch._native.Region {base:#x}, {length:#x} long{state}>")
            }
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}
