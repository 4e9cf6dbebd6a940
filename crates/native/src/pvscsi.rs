//! `tetrarch._native.PvscsiRings`: a PVSCSI controller without the registers of its commands.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_storage::pvscsi::{
    CommandError, MAX_MESSAGE_PAGES, MAX_RING_PAGES, MAX_TARGETS, Pvscsi, RingPages, Saved,
};

use crate::ata::AtaDrive;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::{Interrupt, no_io};
use crate::vm::Vm;

/// The rings of a controller, its targets, and the registers from the second page on.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct PvscsiRings(Arc<Pvscsi>);

saved_state!(State of Saved {
    interrupts: [u32; 2],
    positions: Vec<u64>,
    state: u64,
    requests: Vec<u64>,
    completions: Vec<u64>,
    messages: Vec<u64>,
    answers: Vec<u64>,
    news: Vec<u64>,
    leaving: Vec<u64>,
    targets: Vec<Vec<u64>>,
});

#[pymethods]
impl PvscsiRings {
    #[classattr]
    const MAX_TARGETS: usize = MAX_TARGETS;
    #[classattr]
    const MAX_RING_PAGES: usize = MAX_RING_PAGES;
    #[classattr]
    const MAX_MESSAGE_PAGES: usize = MAX_MESSAGE_PAGES;

    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        line: &Bound<'_, PyAny>,
        messages: Vec<Py<Interrupt>>,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let machine = &vm.get().machine;
        let messages = messages.iter().map(|one| Arc::clone(&one.get().0)).collect();
        let memory = Arc::clone(&machine.memory);
        let pvscsi = Pvscsi::new(&machine.io, memory, name, self::drive(line)?, messages);
        let pvscsi = Arc::new(pvscsi.map_err(|error| no_io(name, &error))?);
        let base = RustDevice::new(Arc::new(pvscsi.registers()));
        Ok(PyClassInitializer::from(base).add_subclass(Self(pvscsi)))
    }

    fn attach(&self, py: Python<'_>, target: usize, drive: AtaDrive) -> Result<(), Failure> {
        let unit = drive.unit()?;
        Ok(py.detach(|| self.0.attach(target, &drive.name, unit))?)
    }

    fn ask_to_leave(&self, py: Python<'_>, target: usize) {
        py.detach(|| self.0.ask_to_leave(target));
    }

    fn has_left(&self, py: Python<'_>, target: usize) -> bool {
        py.detach(|| self.0.has_left(target))
    }

    fn detach(&self, py: Python<'_>, target: usize) {
        py.detach(|| self.0.detach(target));
    }

    fn resized(&self, py: Python<'_>, target: usize) {
        py.detach(|| self.0.resized(target));
    }

    fn set_up_rings(
        &self,
        py: Python<'_>,
        state: u64,
        requests: Vec<u64>,
        completions: Vec<u64>,
    ) -> Result<(), Failure> {
        let pages = RingPages { state, requests, completions };
        Ok(py.detach(|| self.0.set_up_rings(&pages))?)
    }

    fn set_up_messages(&self, py: Python<'_>, pages: Vec<u64>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.set_up_messages(&pages))?)
    }

    fn set_threshold(&self, py: Python<'_>, enable: bool) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.set_threshold(enable))?)
    }

    fn configuration(
        &self,
        py: Python<'_>,
        number: u32,
        address: u64,
        at: u64,
    ) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.configuration(number, address, at))?)
    }

    fn issue(&self, py: Python<'_>, request: u64, completion: u64) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.issue(request, completion))?)
    }

    fn abort(&self, py: Python<'_>) {
        py.detach(|| self.0.abort());
    }

    #[pyo3(signature = (only = None))]
    fn reset_targets(&self, py: Python<'_>, only: Option<usize>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.reset_targets(only))?)
    }

    fn reset_adapter(&self, py: Python<'_>) {
        py.detach(|| self.0.reset_adapter());
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// Whether the controller may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    fn save(&self, py: Python<'_>) -> State {
        py.detach(|| self.0.save()).into()
    }

    fn load(&self, py: Python<'_>, state: State) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.load(&state.into()))?)
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

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        Self::refused(error.to_string())
    }
}
