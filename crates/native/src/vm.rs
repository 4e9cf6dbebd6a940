//! `tetrarch._native.Vm`.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_bus::{AttachError, Bus, Device, Sizes, Span};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{CpuModel, EngineError, GSI_COUNT, RecordingEnd, Saved, VmState};
use tetrarch_machine::{Machine, Processors, ResetState, Stats, collect};
use tetrarch_memory::{GuestPhys, Layer, MemoryError, Run};

use crate::debug::{alert, told};
use crate::descriptor::own_descriptor;
use crate::error::Failure;
use crate::irq::IrqSource;
use crate::python_device::{Crossings, PythonDevice};
use crate::python_platform::{OnVcpu, PythonPlatform};
use crate::recording::recording;
use crate::region::Region;
use crate::replay::Replay;
use crate::rust_device::RustDevice;
use crate::vcpu::Vcpu;
use crate::virtio::no_io;

/// From this size on a copy out of the guest is worth letting other Python
/// threads run meanwhile.
const LONG_COPY: usize = 64 << 10;

// Owner of all Python objects that the machine refers to. A device mostly
// refers to its machine in turn, and only the garbage collector can end that:
// so a `Vcpu` or `Region` holds this object, not the `Machine`.
/// Guest memory, bus, interrupt controllers and vCPUs of one machine.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Vm {
    pub machine: Machine,
    /// What `irq_line` drives: a source of each line.
    lines: Vec<tetrarch_bus::IrqSource>,
    /// The bus's Python devices once more, for the garbage collector, which
    /// takes this lock: nothing may touch Python objects while it holds it.
    devices: Mutex<Vec<Arc<PythonDevice>>>,
    pub crossings: Arc<Crossings>,
    /// Taken for a clone alone, as `devices` is.
    platform: Mutex<Arc<PythonPlatform>>,
    /// What `reset` goes back to, where it was asked for.
    reset_state: OnceLock<ResetState>,
}

/// A handler on the I/O thread may be on its way into Python.
impl Drop for Vm {
    fn drop(&mut self) {
        // An ending process has no interpreter any more, and nothing to wait for.
        let _ = Python::try_attach(|py| py.detach(|| self.machine.io.end()));
    }
}

type Attach =
    fn(&Bus, u64, u64, Sizes, &str, Arc<dyn Device>) -> Result<tetrarch_bus::Region, AttachError>;

impl Vm {
    fn attach(
        slf: Bound<'_, Self>,
        attach: Attach,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
        sizes: Option<Vec<u8>>,
    ) -> Result<Region, Failure> {
        let sizes = match sizes {
            None => Sizes::ALL,
            Some(sizes) => Sizes::of(&sizes).ok_or_else(|| {
                Failure::refused("sizes of accesses are one or more of 1, 2, 4, 8")
            })?,
        };
        let owner = device.get_type().qualname()?.to_string();
        let vm = slf.get();
        let on_bus = |device| attach(&vm.machine.bus, base, length, sizes, &owner, device);
        if let Ok(device) = device.cast::<RustDevice>() {
            let region = on_bus(device.get().device())?;
            return Ok(Region::new(slf.unbind(), region, None));
        }
        let device = Arc::new(PythonDevice::new(device, &vm.crossings)?);
        // First the list, then the bus: a vCPU that runs may use and drop a
        // device of the bus, and the collector must know of it by then.
        vm.devices.lock().push(Arc::clone(&device));
        let python = Arc::downgrade(&device);
        match on_bus(device) {
            Ok(region) => Ok(Region::new(slf.unbind(), region, Some(python))),
            Err(error) => {
                drop(vm.forget(&python));
                Err(error.into())
            }
        }
    }

    /// The platform's handlers for a vCPU.
    pub fn handlers(slf: &Py<Self>, py: Python<'_>, id: u32) -> OnVcpu {
        let vm = slf.get();
        let platform = Arc::clone(&vm.platform.lock());
        let crossings = Arc::clone(&vm.crossings);
        OnVcpu { platform, vm: slf.clone_ref(py), id, crossings }
    }

    /// Takes a device off the list; the caller drops it when it holds no lock.
    pub fn forget(&self, device: &Weak<PythonDevice>) -> Option<Arc<PythonDevice>> {
        let mut devices = self.devices.lock();
        let listed = |other: &Arc<PythonDevice>| std::ptr::eq(Arc::as_ptr(other), device.as_ptr());
        let index = devices.iter().position(listed)?;
        Some(devices.swap_remove(index))
    }
}

/// vCPUs as Python gives them: how many, or (sockets, cores of each, threads of each).
#[derive(FromPyObject)]
enum Vcpus {
    Count(u32),
    Topology(u32, u32, u32),
}

impl Vcpus {
    fn topology(self) -> Topology {
        match self {
            Self::Count(vcpus) => Topology::flat(vcpus),
            Self::Topology(sockets, cores, threads) => Topology { sockets, cores, threads },
        }
    }
}

fn no_line(gsi: u32) -> Failure {
    Failure::refused(format!("there is no interrupt line {gsi}: 0-{}", GSI_COUNT - 1))
}

/// First and last address, and who answers there.
fn listed(regions: Vec<(Span, String)>) -> Vec<(u64, u64, String)> {
    regions.into_iter().map(|(span, owner)| (span.first, span.last, owner)).collect()
}

#[pymethods]
impl Vm {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "what a machine is made of, by name")]
    #[pyo3(signature = (engine, memory, vcpus = Vcpus::Count(1), *, translate = true, chaos = None,
                        platform = None, features = None, signature = None, record = None,
                        replay = None))]
    fn new(
        engine: &str,
        memory: u64,
        vcpus: Vcpus,
        translate: bool,
        chaos: Option<u64>,
        platform: Option<&Bound<'_, PyAny>>,
        features: Option<HashMap<String, u32>>,
        signature: Option<u32>,
        record: Option<(i32, &str, u64)>,
        replay: Option<i32>,
    ) -> Result<Self, Failure> {
        let recording = recording(record, replay)?;
        let topology = vcpus.topology();
        let words: Vec<_> = features.unwrap_or_default().into_iter().collect();
        let cpu = CpuModel::new(&words, signature);
        let (platform, handlers) = match platform {
            Some(platform) => PythonPlatform::new(platform, topology.vcpus())?,
            None => Default::default(),
        };
        let processors = Processors { topology, translate, chaos };
        let machine = Machine::new(engine, memory, processors, platform, cpu, recording)?;
        let lines = (0..GSI_COUNT).filter_map(|gsi| machine.irq.source(gsi)).collect();
        Ok(Self {
            machine,
            lines,
            devices: Mutex::default(),
            crossings: Arc::default(),
            platform: Mutex::new(Arc::new(handlers)),
            reset_state: OnceLock::new(),
        })
    }

    #[getter]
    fn ram(&self) -> Vec<(u64, u64)> {
        self.machine.memory.ram().iter().map(|region| (region.start.0, region.len)).collect()
    }

    // Held, since what a saved machine's file has is copied into the memfd.
    fn ram_file(&self, py: Python<'_>, address: u64) -> Result<(RawFd, u64), Failure> {
        if self.machine.memory.is_lazy() {
            py.detach(|| self.machine.held(|| self.machine.memory.settle()))??;
        }
        let (regions, start) = (self.machine.memory.ram(), GuestPhys(address));
        let region = regions.iter().find(|region| region.start == start);
        let file = region.and_then(|region| region.file());
        let file = file.ok_or(MemoryError::OutOfRange { address: start, length: 1 })?;
        let own = file.file().try_clone().map_err(|error| Failure::refused(error.to_string()))?;
        Ok((own.into_raw_fd(), file.start()))
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
        if !memory.contains(address, length) {
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

    /// As what the guest's balloon holds.
    fn discard_memory(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<u64> {
        Ok(py.detach(|| self.machine.memory.discard(GuestPhys(address), length))?)
    }

    fn cpu_features(&self) -> Vec<(String, u32)> {
        tetrarch_engine::features(|leaf, subleaf| self.machine.engine.cpuid(leaf, subleaf))
    }

    fn cpu_identity(&self) -> (String, u32) {
        tetrarch_engine::identity(|leaf, subleaf| self.machine.engine.cpuid(leaf, subleaf))
    }

    fn log_writes(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.machine.log_writes())?)
    }

    /// Pages that are not zero, or those that were written since `log_writes`, to a file from an
    /// offset on: the table of their runs, and the offset behind them.
    #[pyo3(signature = (descriptor, offset, *, written = false))]
    fn save_ram<'py>(
        &self,
        py: Python<'py>,
        descriptor: i32,
        offset: u64,
        written: bool,
    ) -> Result<(Bound<'py, PyBytes>, u64), Failure> {
        let file = File::from(own_descriptor(descriptor)?);
        let save = || {
            let ranges = if written { self.machine.written()? } else { None };
            if written && ranges.is_none() {
                return Err(Failure::refused("nobody has noted what was written"));
            }
            Ok(self.machine.memory.save(&file, offset, ranges.as_deref())?)
        };
        let (runs, end) = py.detach(save)?;
        let table: Vec<u8> = runs.iter().flat_map(|run| run.to_bytes()).collect();
        Ok((PyBytes::new(py, &table), end))
    }

    /// Maps what was saved, of each file its name, its descriptor and the table; the first is
    /// undermost.
    fn load_ram(&self, py: Python<'_>, layers: Vec<(String, i32, Vec<u8>)>) -> Result<(), Failure> {
        let layer = |(name, descriptor, table): (String, i32, Vec<u8>)| {
            let file = File::from(own_descriptor(descriptor)?);
            Ok::<_, Failure>(Layer { name, file, runs: Run::table(&table) })
        };
        let layers: Vec<_> = layers.into_iter().map(layer).collect::<Result<_, _>>()?;
        Ok(py.detach(|| self.machine.memory.load(&layers))?)
    }

    fn add_memory(&self, py: Python<'_>, address: u64, length: u64) -> Result<(), Failure> {
        Ok(py.detach(|| self.machine.add_memory(address, length))?)
    }

    // Detached, since a vCPU may have to come out of a Python device.
    fn remove_memory(&self, py: Python<'_>, address: u64) -> Result<(), Failure> {
        Ok(py.detach(|| self.machine.remove_memory(address))?)
    }

    #[pyo3(signature = (base, length, device, *, sizes = None, mapped = true))]
    fn attach_ports(
        slf: Bound<'_, Self>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
        sizes: Option<Vec<u8>>,
        mapped: bool,
    ) -> Result<Region, Failure> {
        let attach = if mapped { Bus::attach_ports } else { Bus::attach_ports_unmapped };
        Self::attach(slf, attach, base, length, device, sizes)
    }

    #[pyo3(signature = (base, length, device, *, sizes = None, mapped = true))]
    fn attach_mmio(
        slf: Bound<'_, Self>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
        sizes: Option<Vec<u8>>,
        mapped: bool,
    ) -> Result<Region, Failure> {
        let attach = if mapped { Bus::attach_mmio } else { Bus::attach_mmio_unmapped };
        Self::attach(slf, attach, base, length, device, sizes)
    }

    fn port_regions(&self) -> Vec<(u64, u64, String)> {
        listed(self.machine.bus.port_regions())
    }

    fn mmio_regions(&self) -> Vec<(u64, u64, String)> {
        listed(self.machine.bus.mmio_regions())
    }

    fn irq_source(&self, gsi: u32) -> Result<IrqSource, Failure> {
        Ok(IrqSource(Arc::new(self.machine.irq.source(gsi).ok_or_else(|| no_line(gsi))?)))
    }

    fn irq_line(&self, gsi: u32, level: bool) -> Result<(), Failure> {
        self.lines.get(gsi as usize).ok_or_else(|| no_line(gsi))?.set(level);
        Ok(())
    }

    fn msi(&self, address: u64, data: u32) {
        self.machine.engine.msi(address, data);
    }

    fn clock_ns(&self) -> u64 {
        self.machine.engine.clock().now_ns()
    }

    fn tsc_hz(&self) -> u64 {
        self.machine.engine.tsc_hz()
    }

    fn tell_stolen_time(&self) -> Result<bool, Failure> {
        self.machine.tell_stolen_time().map_err(|error| no_io("stolen time", &error))
    }

    fn set_stolen_clock(&self, py: Python<'_>, vcpu: u32, address: Option<u64>) -> bool {
        let stolen = self.machine.stolen_time();
        stolen.is_some_and(|stolen| py.detach(|| stolen.set_clock(vcpu, address)))
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

    #[pyo3(signature = (timeout = 5.0))]
    fn hold(&self, py: Python<'_>, timeout: f64) -> Result<(), Failure> {
        let timeout = Duration::try_from_secs_f64(timeout)
            .map_err(|error| Failure::refused(format!("a timeout of {timeout} s: {error}")))?;
        Ok(py.detach(|| self.machine.hold(timeout))?)
    }

    fn resume(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.machine.resume())?)
    }

    #[getter]
    fn held(&self) -> bool {
        self.machine.control.is_held()
    }

    fn save_state<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Failure> {
        let state = py.detach(|| self.machine.held(|| self.machine.engine.save()))??;
        Ok(PyBytes::new(py, &state.to_bytes().map_err(EngineError::from)?))
    }

    fn load_state(&self, py: Python<'_>, data: &[u8]) -> Result<(), Failure> {
        let state = VmState::from_bytes(data).map_err(EngineError::from)?;
        py.detach(|| self.machine.held(|| self.machine.engine.load(&state)))??;
        Ok(())
    }

    fn end_recording(&self, py: Python<'_>) -> Result<Option<(&'static str, u64, u64)>, Failure> {
        Ok(py.detach(|| self.machine.engine.end_recording())?.map(|end| match end {
            RecordingEnd::Recorded { count, bytes } => ("recorded", count, bytes),
            RecordingEnd::Replayed { checkpoints, whole } => {
                (if whole { "replayed" } else { "cut" }, checkpoints, 0)
            }
        }))
    }

    fn replay(slf: Bound<'_, Self>) -> Option<Replay> {
        slf.get().machine.engine.replay().is_some().then(|| Replay::new(slf.clone().unbind()))
    }

    fn keep_reset_state(&self, py: Python<'_>) -> Result<(), Failure> {
        let state = py.detach(|| self.machine.reset_state())?;
        // The first stays: a second call may come after the guest has run.
        let _ = self.reset_state.set(state);
        Ok(())
    }

    fn reset(&self, py: Python<'_>) -> Result<(), Failure> {
        let state = self.reset_state.get().ok_or_else(|| {
            Failure::refused("there is nothing to reset to: call keep_reset_state() before run()")
        })?;
        Ok(py.detach(|| self.machine.reset(state))?)
    }

    fn reset_vcpu(&self, py: Python<'_>, index: usize) -> Result<(), Failure> {
        let (Some(slot), Some(state)) = (self.machine.vcpus.get(index), self.reset_state.get())
        else {
            return Err(Failure::refused(format!("there is no vCPU {index} to reset")));
        };
        Ok(py.detach(|| self.machine.reset_vcpu(slot, state))?)
    }

    fn set_debug_alert(&self, descriptor: Option<i32>) -> Result<(), Failure> {
        self.machine.control.debugger.set_alert(descriptor.map(alert).transpose()?);
        Ok(())
    }

    fn take_debug_stops(&self) -> Vec<(usize, &'static str, u64)> {
        self.machine.control.debugger.take_stops().into_iter().map(told).collect()
    }

    fn set_planted(&self, addresses: Vec<u64>) {
        let planted = addresses.into_iter().map(GuestPhys).collect();
        self.machine.control.debugger.set_planted(planted);
    }

    fn request_stop(&self) {
        self.machine.control.request_stop();
    }

    fn stats(&self, py: Python<'_>) -> Stats {
        let mut stats = py.detach(|| collect(&self.machine));
        let Crossings { reads, writes, calls } = &*self.crossings;
        let calls = [("reads", reads), ("writes", writes), ("calls", calls)];
        let calls = calls.map(|(name, count)| (name.to_owned(), count.load(Ordering::Relaxed)));
        stats.insert("python".into(), calls.into());
        stats
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.platform.lock().traverse(&visit)?;
        self.devices.lock().iter().try_for_each(|device| device.traverse(visit))
    }

    fn __clear__(&self) {
        // Dropped when the locks are free again: that runs Python code.
        let from_bus = self.machine.bus.take_devices();
        let devices = std::mem::take(&mut *self.devices.lock());
        let platform = std::mem::take(&mut *self.platform.lock());
        drop((from_bus, devices, platform));
    }
}
