//! `tetrarch._native.Vmxnet3Rings` and `Vmxnet3Causes`.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_cards::vmxnet3::{
    ActivateError, Causes, DamagedState, MAX_INTERRUPTS, MacAddress, Saved, Vmxnet3,
};

use crate::error::Failure;
use crate::irq::drive;
use crate::net::{Network, address};
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::{Interrupt, no_io};
use crate::vm::Vm;

/// Why the line of a card without messages is high.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Vmxnet3Causes(Arc<Causes>);

#[pymethods]
impl Vmxnet3Causes {
    #[new]
    fn new(line: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Arc::new(Causes::new(drive(line)?))))
    }

    fn interrupt(&self, number: usize) -> Interrupt {
        Interrupt(self.0.interrupt(number))
    }
}

/// A card without its registers for addresses and commands.
#[pyclass(frozen, extends = RustDevice, module = "tetrarch._native")]
pub struct Vmxnet3Rings(Arc<Vmxnet3>);

saved_state!(State of Saved {
    permanent: Vec<u8>,
    mac: Vec<u8>,
    interrupts: [u32; 4],
    state: [u32; 3],
    multicast: Vec<u8>,
    vlans: Vec<u8>,
    setup: Vec<u64>,
    tx: Vec<Vec<u64>>,
    rx: Vec<Vec<u64>>,
    rss: Vec<u8>,
});

#[pymethods]
impl Vmxnet3Rings {
    #[classattr]
    const MAX_INTERRUPTS: usize = MAX_INTERRUPTS;

    /// Takes the network over.
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        network: &Bound<'_, Network>,
        mac: &[u8],
        causes: &Bound<'_, Vmxnet3Causes>,
        interrupts: Vec<Py<Interrupt>>,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let machine = &vm.get().machine;
        let memory = Arc::clone(&machine.memory);
        let mac = address(mac)?;
        let causes = Arc::clone(&causes.get().0);
        let interrupts = interrupts.iter().map(|one| Arc::clone(&one.get().0)).collect();
        let network = network.get().take(name)?;
        let card = Vmxnet3::new(&machine.io, memory, name, mac, network, causes, interrupts);
        let card = Arc::new(card.map_err(|error| no_io(name, &error))?);
        let base = RustDevice::new(Arc::new(card.registers()));
        Ok(PyClassInitializer::from(base).add_subclass(Self(card)))
    }

    #[getter]
    fn mac(&self, py: Python<'_>) -> MacAddress {
        py.detach(|| self.0.mac())
    }

    fn set_mac(&self, py: Python<'_>, mac: &[u8]) -> Result<(), Failure> {
        let mac = address(mac)?;
        py.detach(|| self.0.set_mac(mac));
        Ok(())
    }

    #[getter]
    fn permanent(&self, py: Python<'_>) -> MacAddress {
        py.detach(|| self.0.permanent())
    }

    #[getter]
    fn link(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.link())
    }

    fn take_causes(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.0.take_causes())
    }

    #[getter]
    fn events(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.0.events())
    }

    fn clear_events(&self, py: Python<'_>, events: u32) {
        py.detach(|| self.0.clear_events(events));
    }

    fn activate(&self, py: Python<'_>, shared: u64, second: bool) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.activate(shared, second))?)
    }

    #[getter]
    fn active(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.is_active())
    }

    fn quiesce(&self, py: Python<'_>) {
        py.detach(|| self.0.quiesce());
    }

    fn update_rx_mode(&self, py: Python<'_>) {
        py.detach(|| self.0.update_rx_mode());
    }

    fn update_mac_filters(&self, py: Python<'_>) {
        py.detach(|| self.0.update_mac_filters());
    }

    fn update_vlan_filters(&self, py: Python<'_>) {
        py.detach(|| self.0.update_vlan_filters());
    }

    fn update_rss(&self, py: Python<'_>) {
        py.detach(|| self.0.update_rss());
    }

    fn update_features(&self, py: Python<'_>) {
        py.detach(|| self.0.update_features());
    }

    fn put_status(&self, py: Python<'_>) {
        py.detach(|| self.0.put_status());
    }

    fn put_statistics(&self, py: Python<'_>) {
        py.detach(|| self.0.put_statistics());
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

impl From<ActivateError> for Failure {
    fn from(error: ActivateError) -> Self {
        Self::refused(error.to_string())
    }
}

impl From<DamagedState> for Failure {
    fn from(error: DamagedState) -> Self {
        Self::refused(error.to_string())
    }
}
