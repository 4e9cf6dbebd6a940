//! The parts of one machine put together; what `Vm` and `Vcpu` share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tetrarch_bus::{
    Bus, DeviceError, NoHandlers, RunControl, Seat, StopReason, TscScale, run_vcpu,
};
use tetrarch_engine::{Counters, EngineError, Unusable, Vcpu, Vm};
use tetrarch_memory::GuestMemory;

use crate::device::PythonDevice;
use crate::error::Failure;

/// Ports that the engine answers itself: it holds what KVM keeps in the kernel.
const ENGINE_PORTS: [(u64, u64, &str); 5] = [
    (0x20, 2, "the primary interrupt controller"),
    (0x40, 4, "the interval timer"),
    (0x61, 1, "the interval timer's gate"),
    (0xA0, 2, "the secondary interrupt controller"),
    (0x4D0, 2, "the interrupt controllers' trigger modes"),
];

/// Memory that the engine answers itself. The local APIC's mebibyte is also
/// where interrupt messages go (Intel SDM 3A, 11.11.1).
const ENGINE_MMIO: [(u64, u64, &str); 2] =
    [(0xFEC0_0000, 0x1000, "the I/O APIC"), (0xFEE0_0000, 0x10_0000, "the local APICs")];

/// Why the engine cannot run here, if it cannot.
pub fn engine_available(name: &str) -> Result<(), Unusable> {
    match name {
        "bt" => tetrarch_engine_bt::available(),
        "kvm" => tetrarch_engine_kvm::available(),
        _ => Err(Unusable::new(format!("there is no engine '{name}'"), "there are: bt, kvm")),
    }
}

pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub engine: Arc<dyn Vm>,
    pub bus: Bus,
    pub control: RunControl,
    pub vcpus: Vec<Arc<VcpuSlot>>,
    pub scale: TscScale,
    /// The bus's Python devices once more, for the garbage collector, which
    /// takes this lock: nothing may touch Python objects while it holds it.
    pub devices: Mutex<Vec<Arc<PythonDevice>>>,
}

impl Machine {
    pub fn new(engine: &str, memory: u64, vcpus: u32, translate: bool) -> Result<Self, Failure> {
        if engine != "kvm" {
            // Engine kvm says why it cannot when its VM is made.
            engine_available(engine).map_err(EngineError::from)?;
        }
        if vcpus == 0 {
            return Err(Failure::refused("a machine needs at least 1 vCPU"));
        }
        let memory = Arc::new(GuestMemory::new(memory)?);
        let engine: Arc<dyn Vm> = if engine == "kvm" {
            let config = tetrarch_engine_kvm::Config { vcpus, ..Default::default() };
            tetrarch_engine_kvm::create_vm(Arc::clone(&memory), config)?
        } else {
            let config = tetrarch_engine_bt::Config { vcpus, translate, ..Default::default() };
            tetrarch_engine_bt::create_vm(Arc::clone(&memory), config)?
        };

        let bus = Bus::new();
        for (base, length, owner) in ENGINE_PORTS {
            bus.reserve_ports(base, length, owner)?;
        }
        for (base, length, owner) in ENGINE_MMIO {
            bus.reserve_mmio(base, length, owner)?;
        }
        for region in memory.regions() {
            bus.reserve_mmio(region.start.0, region.len, "RAM")?;
        }

        let control = RunControl::new();
        let vcpus = (0..vcpus)
            .map(|id| {
                let vcpu = engine.create_vcpu(id)?;
                let seat = control.add(vcpu.kicker());
                Ok(Arc::new(VcpuSlot::new(id, vcpu, seat)))
            })
            .collect::<Result<_, EngineError>>()?;
        let (scale, devices) = (TscScale::new(), Mutex::default());
        Ok(Self { memory, engine, bus, control, vcpus, scale, devices })
    }
}

/// One vCPU and whoever holds it at the time.
///
/// `vcpu` is held for a whole run. Only a run waits for it; all else, which may
/// hold the interpreter, tries and gives up: a run may need the interpreter to
/// come to its end.
pub struct VcpuSlot {
    pub id: u32,
    pub seat: Arc<Seat>,
    vcpu: Mutex<Box<dyn Vcpu>>,
    running: AtomicBool,
    /// The engine's counters when the vCPU last stopped.
    counters: Mutex<Counters>,
}

/// Marks a vCPU as running while it lives.
struct Running<'a>(&'a VcpuSlot);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

impl VcpuSlot {
    fn new(id: u32, vcpu: Box<dyn Vcpu>, seat: Arc<Seat>) -> Self {
        let counters = Mutex::new(vcpu.counters());
        Self { id, seat, vcpu: Mutex::new(vcpu), running: AtomicBool::new(false), counters }
    }

    fn busy(&self) -> Failure {
        Failure::refused(format!("vCPU {} is running", self.id))
    }

    /// Uses a vCPU that does not run.
    pub fn with<T>(&self, body: impl FnOnce(&mut dyn Vcpu) -> T) -> Result<T, Failure> {
        let mut vcpu = self.vcpu.try_lock().ok_or_else(|| self.busy())?;
        Ok(body(&mut **vcpu))
    }

    /// The run loop; to be called detached from the interpreter.
    pub fn run(
        &self,
        machine: &Machine,
        looked_up: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<StopReason, Failure> {
        if self.running.swap(true, Ordering::Acquire) {
            return Err(self.busy());
        }
        let _running = Running(self);
        let mut vcpu = self.vcpu.lock();
        let result = run_vcpu(
            &mut **vcpu,
            &machine.bus,
            &NoHandlers,
            &machine.control,
            &self.seat,
            looked_up,
        );
        *self.counters.lock() = vcpu.counters();
        Ok(result?)
    }

    /// The engine's counters: now, or of the last stop where the vCPU runs.
    pub fn counters(&self) -> Counters {
        match self.vcpu.try_lock() {
            Some(vcpu) => vcpu.counters(),
            None => self.counters.lock().clone(),
        }
    }
}
