//! `tetrarch._native.NvmeQueues`: an NVMe controller without its registers.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_storage::nvme::{About, AdminQueues, EnableError, MAX_PAIRS, Nvme, Saved};

use crate::disk::Disk;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::{Interrupt, no_io};
use crate::vm::Vm;

/// The queues of a controller, and what is behind them.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct NvmeQueues(Nvme);

saved_state!(State of Saved {
    submissions: Vec<u64>,
    completions: Vec<u64>,
    features: Vec<u64>,
    requests: Vec<u64>,
    events: Vec<u64>,
});

#[pymethods]
impl NvmeQueues {
    #[classattr]
    const MAX_PAIRS: usize = MAX_PAIRS;

    #[new]
    #[expect(clippy::too_many_arguments, reason = "what a controller is made of, by name")]
    #[pyo3(signature = (vm, name, disk, *, vendor, model, serial, uuid, interrupts, line))]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        disk: &Bound<'_, Disk>,
        vendor: u16,
        model: String,
        serial: String,
        uuid: [u8; 16],
        interrupts: Vec<Py<Interrupt>>,
        line: &Bound<'_, PyAny>,
    ) -> Result<Self, Failure> {
        if !(2..=MAX_PAIRS + 1).contains(&interrupts.len()) {
            let pairs = interrupts.len().saturating_sub(1);
            return Err(Failure::refused(format!(
                "{name}: {pairs} queue pairs of 1 to {MAX_PAIRS}"
            )));
        }
        let machine = &vm.get().machine;
        let interrupts = interrupts.iter().map(|one| Arc::clone(&one.get().0)).collect();
        let about = About { vendor, model, serial, uuid };
        let (memory, disk) = (Arc::clone(&machine.memory), disk.get().backend()?);
        let nvme = Nvme::new(&machine.io, memory, name, disk, about, interrupts, drive(line)?);
        Ok(Self(nvme.map_err(|error| no_io(name, &error))?))
    }

    /// Admin queues as (address, entries): of commands, of completions.
    fn enable(
        &self,
        py: Python<'_>,
        submissions: (u64, u32),
        completions: (u64, u32),
    ) -> Result<(), Failure> {
        let queues = AdminQueues {
            submissions: submissions.0,
            submission_entries: submissions.1,
            completions: completions.0,
            completion_entries: completions.1,
        };
        Ok(py.detach(|| self.0.enable(queues))?)
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// Whether the controller may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    fn shut_down(&self, py: Python<'_>) {
        py.detach(|| self.0.shut_down());
    }

    #[getter]
    fn is_shut_down(&self) -> bool {
        self.0.is_shut_down()
    }

    fn set_mask(&self, py: Python<'_>, mask: u32) {
        py.detach(|| self.0.set_mask(mask));
    }

    fn doorbells(&self) -> RustDevice {
        RustDevice::new(Arc::new(self.0.doorbells()))
    }

    fn resized(&self, py: Python<'_>) {
        py.detach(|| self.0.resized());
    }

    fn save(&self, py: Python<'_>) -> State {
        py.detach(|| self.0.save()).into()
    }

    fn load(&self, py: Python<'_>, state: State, shut_down: bool) -> Result<(), Failure> {
        let saved = Saved::from(state);
        Ok(py.detach(|| {
            self.0.load(&saved)?;
            self.0.set_shut_down(shut_down);
            Ok::<_, EnableError>(())
        })?)
    }

    /// Requests that wait for the host to be mended.
    #[getter]
    fn stopped(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.stopped())
    }

    /// Lets go of the disk.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

impl From<EnableError> for Failure {
    fn from(error: EnableError) -> Self {
        Self::refused(error.to_string())
    }
}
