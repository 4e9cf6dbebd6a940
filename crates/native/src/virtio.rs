//! `tetrarch._native.VirtioDevice` and what belongs to it.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_engine::{EngineError, Unusable};
use tetrarch_memory::GuestPhys;
use tetrarch_virtio::blk::MAX_QUEUES;
use tetrarch_virtio::queue::{QueueConfig, QueuePosition};
use tetrarch_virtio::{Blk, Control, DataPath, Device, Doorbells, QueueSetup, Rng, StartError};

use crate::disk::Disk;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::vm::Vm;

/// An interrupt that is an event: a message, or a bit of a status.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Interrupt(pub Arc<dyn tetrarch_bus::Interrupt>);

#[pymethods]
impl Interrupt {
    fn trigger(&self, py: Python<'_>) {
        py.detach(|| self.0.raise());
    }
}

/// Interrupt status of a transport, and its line.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct IsrStatus(Arc<tetrarch_virtio::IsrStatus>);

#[pymethods]
impl IsrStatus {
    #[new]
    fn new(wire: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Arc::new(tetrarch_virtio::IsrStatus::new(drive(wire)?))))
    }

    #[getter]
    fn status(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.0.get())
    }

    fn set(&self, py: Python<'_>, bits: u32) {
        py.detach(|| self.0.set(bits));
    }

    fn acknowledge(&self, py: Python<'_>, bits: u32) -> u32 {
        py.detach(|| self.0.acknowledge(bits))
    }

    fn interrupt(&self, bit: u32) -> Interrupt {
        Interrupt(self.0.interrupt(bit))
    }
}

/// A queue as the driver has set it up.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Setup {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    packed: bool,
    event_index: bool,
    indirect: bool,
    position: Option<(u16, u16)>,
    interrupt: Py<Interrupt>,
}

impl From<Setup> for QueueSetup {
    fn from(setup: Setup) -> Self {
        let config = QueueConfig {
            size: setup.size,
            descriptors: GuestPhys(setup.descriptors),
            driver: GuestPhys(setup.driver),
            device: GuestPhys(setup.device),
            packed: setup.packed,
            event_index: setup.event_index,
            indirect: setup.indirect,
        };
        let position = setup.position.map(|(available, used)| QueuePosition { available, used });
        Self { config, position, interrupt: Arc::clone(&setup.interrupt.get().0) }
    }
}

/// The data path of a virtio device: the base of each kind. Registers, negotiation and state
/// are Python's (`tetrarch.virtio`).
#[pyclass(frozen, subclass, module = "tetrarch._native")]
pub struct VirtioDevice {
    control: Arc<dyn Control>,
}

impl VirtioDevice {
    /// Makes the device on the machine's I/O thread.
    pub fn make<P: DataPath + 'static>(
        vm: &Bound<'_, Vm>,
        name: &str,
        queues: usize,
        path: P,
    ) -> Result<(Self, Arc<Device<P>>), Failure> {
        let machine = &vm.get().machine;
        let memory = Arc::clone(&machine.memory);
        let device = Device::new(&machine.io, memory, name, queues, path)
            .map_err(|error| no_io(name, &error))?;
        let device = Arc::new(device);
        Ok((Self { control: Arc::clone(&device) as _ }, device))
    }
}

pub fn no_io(name: &str, error: &std::io::Error) -> Failure {
    let what = format!("the host gives no events for {name}");
    EngineError::from(Unusable::refused(&what, error, "look into the host's kernel log")).into()
}

#[pymethods]
impl VirtioDevice {
    #[getter]
    fn queue_count(&self) -> usize {
        self.control.queue_count()
    }

    /// The driver is ready: DRIVER_OK.
    fn start(
        &self,
        py: Python<'_>,
        features: u64,
        queues: Vec<Option<Setup>>,
        config: &Bound<'_, Interrupt>,
    ) -> Result<(), Failure> {
        let queues = queues.into_iter().map(|setup| setup.map(QueueSetup::from)).collect();
        let config = Arc::clone(&config.get().0);
        Ok(py.detach(|| self.control.start(features, queues, config))?)
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.control.reset());
    }

    /// Whether the device may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.control.set_master(master));
    }

    /// The driver uses a queue no longer.
    fn stop_queue(&self, py: Python<'_>, index: usize) {
        py.detach(|| self.control.stop_queue(index));
    }

    /// (available, used) of each queue, as a saved state has it.
    fn positions(&self, py: Python<'_>) -> Vec<Option<(u16, u16)>> {
        let positions = py.detach(|| self.control.positions());
        positions.into_iter().map(|one| one.map(|at| (at.available, at.used))).collect()
    }

    #[getter]
    fn needs_reset(&self) -> bool {
        self.control.needs_reset()
    }

    fn config_changed(&self, py: Python<'_>) {
        py.detach(|| self.control.config_changed());
    }

    /// The notification registers: one for each queue, `stride` bytes apart, or one for all
    /// with a stride of 0.
    fn doorbells(&self, stride: u64) -> RustDevice {
        RustDevice::new(Arc::new(Doorbells::new(self.control.doorbells(), stride)))
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::refused(error.to_string())
    }
}

/// The entropy device.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioRng;

#[pymethods]
impl VirtioRng {
    #[new]
    fn new(vm: &Bound<'_, Vm>, name: &str) -> Result<PyClassInitializer<Self>, Failure> {
        let (base, _) = VirtioDevice::make(vm, name, 1, Rng)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self))
    }
}

/// The block device.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioBlk(Arc<Device<Blk>>);

#[pymethods]
impl VirtioBlk {
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        disk: &Bound<'_, Disk>,
        serial: &str,
        queues: usize,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(Failure::refused(format!("{name}: {queues} queues of 1 to {MAX_QUEUES}")));
        }
        let path = Blk::new(disk.get().backend()?, serial);
        let (base, device) = VirtioDevice::make(vm, name, queues, path)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self(device)))
    }

    /// Requests that wait for the host to be mended.
    #[getter]
    fn stopped(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.with_path(|path, _| path.stopped()))
    }

    /// Lets go of the disk, when the machine has ended.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.with_path(|path, _| path.close()));
    }
}
