//! `tetrarch._native.VmciDevice`.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_vmci::{DamagedState, Interrupts, Saved, Sockets, VECTORS, Vmci};

use crate::descriptor::own_descriptor;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::{Interrupt, no_io};
use crate::vm::Vm;

/// The registers of VMCI's function, and what is behind them.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct VmciDevice(Arc<Vmci>);

saved_state!(State of Saved {
    interrupts: [u32; 3],
    state: [u32; 3],
    addresses: [u64; 3],
    sent: Vec<u8>,
    page: Vec<u8>,
    doorbells: Vec<u32>,
    pairs: Vec<u64>,
});

#[pymethods]
impl VmciDevice {
    #[classattr]
    const VECTORS: usize = VECTORS;

    /// `sockets` is what Python has bound a Unix socket to, and that.
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        line: &Bound<'_, PyAny>,
        messages: Vec<Py<Interrupt>>,
        notifications: bool,
        sockets: Option<(PathBuf, i32)>,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let machine = &vm.get().machine;
        let messages = messages.iter().map(|one| Arc::clone(&one.get().0)).collect();
        let interrupts = Interrupts::new(drive(line)?, messages);
        let no_device = |error| no_io("vmci", &error);
        let sockets = match sockets {
            Some((path, listener)) => {
                let listener = UnixListener::from(own_descriptor(listener)?);
                Some(Sockets::new(path, listener).map_err(no_device)?)
            }
            None => None,
        };
        let memory = Arc::clone(&machine.memory);
        let vmci = Vmci::new(&machine.io, memory, interrupts, notifications, sockets);
        let vmci = Arc::new(vmci.map_err(no_device)?);
        let base = RustDevice::new(Arc::new(vmci.registers()));
        Ok(PyClassInitializer::from(base).add_subclass(Self(vmci)))
    }

    fn ring(&self, py: Python<'_>, context: u32, resource: u32) -> bool {
        py.detach(|| self.0.ring(context, resource))
    }

    /// Whether the function may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    fn save(&self, py: Python<'_>) -> State {
        py.detach(|| self.0.save()).into()
    }

    fn load(&self, py: Python<'_>, state: State) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.load(&state.into()))?)
    }

    /// Ends all connections, when the machine has ended.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

impl From<DamagedState> for Failure {
    fn from(error: DamagedState) -> Self {
        Self::refused(error.to_string())
    }
}
