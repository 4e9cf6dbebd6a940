//! `tetrarch._native.E1000Rings`.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_cards::MacAddress;
use tetrarch_cards::e1000::{DamagedState, E1000, FIRST_REGISTER, Saved};

use crate::error::Failure;
use crate::irq::drive;
use crate::net::{Network, address};
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::no_io;
use crate::vm::Vm;

/// A card without its first registers.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct E1000Rings(Arc<E1000>);

saved_state!(State of Saved {
    permanent: Vec<u8>,
    registers: Vec<u32>,
    filter: Vec<u32>,
    statistics: Vec<u32>,
    interrupts: [u32; 7],
    places: [u32; 4],
    contexts: [u32; 8],
    state: [u32; 3],
});

#[pymethods]
impl E1000Rings {
    #[classattr]
    const FIRST_REGISTER: u32 = FIRST_REGISTER;

    /// Takes the network over.
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        network: &Bound<'_, Network>,
        mac: &[u8],
        line: &Bound<'_, PyAny>,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let machine = &vm.get().machine;
        let memory = Arc::clone(&machine.memory);
        let mac = address(mac)?;
        let line = drive(line)?;
        let network = network.get().take(name)?;
        let card = E1000::new(&machine.io, memory, name, mac, network, line);
        let card = Arc::new(card.map_err(|error| no_io(name, &error))?);
        let base = RustDevice::new(Arc::new(card.registers()));
        Ok(PyClassInitializer::from(base).add_subclass(Self(card)))
    }

    #[getter]
    fn mac(&self, py: Python<'_>) -> MacAddress {
        py.detach(|| self.0.mac())
    }

    #[getter]
    fn permanent(&self, py: Python<'_>) -> MacAddress {
        py.detach(|| self.0.permanent())
    }

    #[getter]
    fn link(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.link())
    }

    fn set_tags(&self, py: Python<'_>, on: bool) {
        py.detach(|| self.0.set_tags(on));
    }

    fn set_loopback(&self, py: Python<'_>, on: bool) {
        py.detach(|| self.0.set_loopback(on));
    }

    #[pyo3(name = "raise_causes")]
    fn raise(&self, py: Python<'_>, causes: u32) {
        py.detach(|| self.0.raise(causes));
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// Whether the card may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    fn save(&self, py: Python<'_>) -> State {
        py.detach(|| self.0.save()).into()
    }

    fn load(&self, py: Python<'_>, state: State) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.load(&state.into()))?)
    }

    /// Lets go of the network.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

impl From<DamagedState> for Failure {
    fn from(error: DamagedState) -> Self {
        Self::refused(error.to_string())
    }
}
