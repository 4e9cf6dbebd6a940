//! `tetrarch._native.Vm`.

use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_bus::{AttachError, Bus, Device};
use tetrarch_memory::{GuestPhys, MemoryError};

use crate::device::PythonDevice;
use crate::error::Failure;
use crate::machine::Machine;
use crate::null::{NullDevice, NullPort};
use crate::stats::{Stats, collect};
use crate::vcpu::Vcpu;

/// Lines of the interrupt controllers: the pins of one I/O APIC.
const GSI_COUNT: u32 = 24;

/// From this size on a copy out of the guest is worth letting other Python
/// threads run meanwhile.
const LONG_COPY: usize = 64 << 10;

// Owner of all Python objects that the machine refers to. A device mostly
// refers to its machine in turn, and only the garbage collector can end that:
// so a `Vcpu` holds this object, not the `Machine`.
/// Guest memory, bus, interrupt controllers and vCPUs of one machine.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Vm {
    pub machine: Machine,
}

type Attach = fn(&Bus, u64, u64, &str, Arc<dyn Device>) -> Result<(), AttachError>;

impl Vm {
    fn attach(
        &self,
        attach: Attach,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> Result<(), Failure> {
        if device.is_instance_of::<NullPort>() {
            return Ok(attach(&self.machine.bus, base, length, "NullPort", Arc::new(NullDevice))?);
        }
        let device = Arc::new(PythonDevice::new(device)?);
        // First the list, then the bus: a vCPU that runs may use and drop a
        // device of the bus, and the collector must know of it by then.
        self.machine.devices.lock().push(Arc::clone(&device));
        let attached = attach(&self.machine.bus, base, length, device.name(), device.clone());
        if attached.is_err() {
            self.machine.devices.lock().retain(|other| !Arc::ptr_eq(other, &device));
        }
        Ok(attached?)
    }
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (engine, memory, vcpus = 1, *, translate = true))]
    fn new(engine: &str, memory: u64, vcpus: u32, translate: bool) -> Result<Self, Failure> {
        Ok(Self { machine: Machine::new(engine, memory, vcpus, translate)? })
    }

    #[getter]
    fn ram(&self) -> Vec<(u64, u64)> {
        self.machine.memory.regions().iter().map(|region| (region.start.0, region.len)).collect()
    }

    fn read_memory<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: u64,
    ) -> Result<Bound<'py, PyBytes>, Failure> {
        let memory = &self.machine.memory;
        let address = GuestPhys(address);
        // Before the bytes are allocated, so that no wrong length can ask for much.
        if memory.host(address, length).is_none() {
            return Err(MemoryError::OutOfRange { address, length }.into());
        }
        let fill = |data: &mut [u8]| {
            let read = if data.len() < LONG_COPY {
                memory.read(address, data)
            } else {
                py.detach(|| memory.read(address, data))
            };
            read.map_err(|error| Failure::from(error).into())
        };
        Ok(PyBytes::new_with(py, length as usize, fill)?)
    }

    // Detached, since the engine hears of the write and may have to wait for
    // a vCPU that is in a Python device.
    fn write_memory(&self, py: Python<'_>, address: u64, data: &[u8]) -> Result<(), Failure> {
        Ok(py.detach(|| self.machine.memory.write(GuestPhys(address), data))?)
    }

    fn attach_ports(
        &self,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> Result<(), Failure> {
        self.attach(Bus::attach_ports, base, length, device)
    }

    fn attach_mmio(
        &self,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> Result<(), Failure> {
        self.attach(Bus::attach_mmio, base, length, device)
    }

    // Attached, unlike a write: the controllers' locks are held for a few
    // instructions and never by who waits for the interpreter.
    fn irq_line(&self, gsi: u32, level: bool) -> Result<(), Failure> {
        if gsi >= GSI_COUNT {
            return Err(Failure::refused(format!("there is no interrupt line {gsi}: 0-23")));
        }
        self.machine.engine.irq_line(gsi, level);
        Ok(())
    }

    fn msi(&self, address: u64, data: u32) {
        self.machine.engine.msi(address, data);
    }

    fn clock_ns(&self) -> u64 {
        self.machine.engine.clock().now_ns()
    }

    fn vcpu(slf: Bound<'_, Self>, index: usize) -> Result<Vcpu, Failure> {
        let vcpus = &slf.get().machine.vcpus;
        let Some(slot) = vcpus.get(index) else {
            let count = vcpus.len();
            return Err(Failure::refused(format!("there is no vCPU {index}: {count} in all")));
        };
        let slot = Arc::clone(slot);
        Ok(Vcpu::new(slf.unbind(), slot))
    }

    fn request_stop(&self) {
        self.machine.control.request_stop();
    }

    fn stats(&self) -> Stats {
        collect(&self.machine)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.machine.devices.lock().iter().try_for_each(|device| device.traverse(visit))
    }

    fn __clear__(&self) {
        // Dropped when the locks are free again: that runs Python code.
        let from_bus = self.machine.bus.take_devices();
        let devices = std::mem::take(&mut *self.machine.devices.lock());
        drop((from_bus, devices));
    }
}
