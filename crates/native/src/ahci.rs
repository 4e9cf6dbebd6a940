//! `tetrarch._native.AhciPorts`: an AHCI controller behind its PCI function.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_storage::ahci::{Ahci, AhciRegisters, MAX_PORTS, Saved};

use crate::ata::AtaDrive;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::virtio::{Interrupt, no_io};
use crate::vm::Vm;

/// The registers of a controller, its ports, and the drives at them.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct AhciPorts(Arc<Ahci>);

#[pymethods]
impl AhciPorts {
    #[classattr]
    const MAX_PORTS: usize = MAX_PORTS;

    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        drives: Vec<AtaDrive>,
        line: &Bound<'_, PyAny>,
        message: &Bound<'_, Interrupt>,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        if !(1..=MAX_PORTS).contains(&drives.len()) {
            let count = drives.len();
            return Err(Failure::refused(format!("{name}: {count} drives of 1 to {MAX_PORTS}")));
        }
        let machine = &vm.get().machine;
        let drives = drives
            .into_iter()
            .map(|drive| Ok(Some((drive.name.clone(), drive.open(true)?))))
            .collect::<Result<Vec<_>, Failure>>()?;
        let memory = Arc::clone(&machine.memory);
        let message = Arc::clone(&message.get().0);
        let ahci = Ahci::new(&machine.io, memory, name, drives, self::drive(line)?, message);
        let ahci = Arc::new(ahci.map_err(|error| no_io(name, &error))?);
        let base = RustDevice::new(Arc::new(AhciRegisters(Arc::clone(&ahci))));
        Ok(PyClassInitializer::from(base).add_subclass(Self(ahci)))
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// Whether the controller may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    /// Numbers of the controller, and of each port.
    fn save(&self, py: Python<'_>) -> (Vec<u64>, Vec<Vec<u64>>) {
        let Saved { controller, ports } = py.detach(|| self.0.save());
        (controller, ports)
    }

    fn load(
        &self,
        py: Python<'_>,
        controller: Vec<u64>,
        ports: Vec<Vec<u64>>,
    ) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.load(&Saved { controller, ports }))?)
    }

    /// Requests that wait for the host to be mended.
    #[getter]
    fn stopped(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.stopped())
    }

    /// Lets go of the disks.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}
