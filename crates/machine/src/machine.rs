//! The parts of one machine put together.

use std::io;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tetrarch_bus::{Bus, IrqLines, Region, RunControl, TscScale};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{
    CpuModel, DirtyPages, ENGINE_MMIO, ENGINE_PORTS, EngineError, GSI_COUNT, Platform, Unusable,
    Vm, Waited,
};
use tetrarch_engine_bt::Recording;
use tetrarch_io::{Around, IoThread};
use tetrarch_memory::GuestMemory;

use crate::{MachineError, StolenTime, VcpuSlot, limits};

/// Why the engine cannot run here, if it cannot.
pub fn engine_available(name: &str) -> Result<(), Unusable> {
    match name {
        "bt" => tetrarch_engine_bt::available(),
        "kvm" => tetrarch_engine_kvm::available(),
        _ => Err(Unusable::new(format!("there is no engine '{name}'"), "there are: bt, kvm")),
    }
}

/// Guest memory, an engine's VM and its vCPUs, and the bus between them and
/// devices.
pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub engine: Arc<dyn Vm>,
    pub bus: Bus,
    pub irq: Arc<IrqLines>,
    pub control: RunControl,
    /// Where the data paths of devices run.
    pub io: Arc<IoThread>,
    pub vcpus: Vec<Arc<VcpuSlot>>,
    /// What keeps devices away from each region of RAM, by where it begins.
    pub(crate) ram: Mutex<Vec<(u64, Region)>>,
    pub(crate) scale: TscScale,
    /// Where the guest's platform has it.
    pub(crate) stolen: OnceLock<StolenTime>,
    /// Since `log_writes`, by region.
    pub(crate) written: Mutex<Option<Vec<DirtyPages>>>,
}

/// What the guest's instructions run on.
#[derive(Clone, Copy, Debug)]
pub struct Processors {
    pub topology: Topology,
    /// Without it engine `bt` interprets every instruction.
    pub translate: bool,
    /// Engine `bt`'s alone: the seed of its disturbances.
    pub chaos: Option<u64>,
}

impl Default for Processors {
    fn default() -> Self {
        Self { topology: Topology::flat(1), translate: true, chaos: None }
    }
}

/// A machine that records stands while devices work.
struct Standing(Arc<dyn Vm>);

impl Around for Standing {
    fn before(&self) {
        self.0.stop_for_device();
    }

    fn behind(&self) {
        self.0.go_on();
    }
}

impl Machine {
    pub fn new(
        engine: &str,
        memory: u64,
        processors: Processors,
        platform: Platform,
        cpu: CpuModel,
        recording: Option<Recording>,
    ) -> Result<Self, MachineError> {
        let Processors { topology, translate, chaos } = processors;
        let vcpus = topology.vcpus();
        if engine != "kvm" {
            // Engine kvm says why it cannot when its VM is made.
            engine_available(engine).map_err(EngineError::from)?;
        }
        if vcpus == 0 {
            return Err(EngineError::Refused("a machine needs at least 1 vCPU".into()).into());
        }
        let memory = Arc::new(GuestMemory::new(memory)?);
        limits::check(engine)?;
        let recorded = recording.is_some();
        let engine: Arc<dyn Vm> = if engine == "kvm" {
            if recorded {
                return Err(EngineError::Refused("engine kvm records nothing".into())
                    .mended_by("use engine bt")
                    .into());
            }
            if chaos.is_some() {
                return Err(EngineError::Refused("engine kvm has no chaos".into())
                    .mended_by("use engine bt")
                    .into());
            }
            let config =
                tetrarch_engine_kvm::Config { topology, platform, cpu, ..Default::default() };
            tetrarch_engine_kvm::create_vm(Arc::clone(&memory), config)?
        } else {
            let config = tetrarch_engine_bt::Config { topology, translate, platform, chaos, cpu };
            let memory = Arc::clone(&memory);
            match recording {
                None => tetrarch_engine_bt::create_vm(memory, config)?,
                Some(recording) => {
                    tetrarch_engine_bt::create_recorded_vm(memory, config, recording)?
                }
            }
        };

        let bus = Bus::with_doorbells(Arc::clone(&engine));
        for (base, length, owner) in ENGINE_PORTS {
            bus.reserve_ports(base, length, owner)?;
        }
        for (base, length, owner) in ENGINE_MMIO {
            bus.reserve_mmio(base, length, owner)?;
        }
        let mut ram = Vec::new();
        for region in memory.regions() {
            let start = region.start.0;
            ram.push((start, bus.reserve_mmio(start, region.len, "RAM")?));
        }

        let refused = "raise the limit of processes: ulimit -u";
        let io = IoThread::new("tetrarch-io")
            .map_err(|error| Unusable::refused("the host gives no I/O thread", &error, refused))
            .map_err(EngineError::from)?;
        if recorded {
            io.set_around(Arc::new(Standing(Arc::clone(&engine))));
        }
        let control = RunControl::new(Arc::clone(engine.clock()));
        let vcpus = (0..vcpus)
            .map(|id| {
                let vcpu = engine.create_vcpu(id)?;
                let control = control.add(vcpu.kicker());
                Ok(Arc::new(VcpuSlot::new(id, vcpu, control)))
            })
            .collect::<Result<_, EngineError>>()?;
        let driven = Arc::clone(&engine);
        let drive = Box::new(move |gsi, level| driven.irq_line(gsi, level));
        let irq = Arc::new(IrqLines::new(GSI_COUNT, drive));
        let (ram, scale) = (Mutex::new(ram), TscScale::new());
        let io = Arc::new(io);
        let (written, stolen) = (Mutex::default(), OnceLock::new());
        Ok(Self { memory, engine, bus, irq, control, io, vcpus, ram, scale, stolen, written })
    }

    /// From now on the guest can be told what time was stolen from it; false where the host does not
    /// tell. To be called before vCPUs run.
    pub fn tell_stolen_time(&self) -> io::Result<bool> {
        if !Waited::available() {
            return Ok(false);
        }
        if self.stolen.get().is_none() {
            let (memory, hz) = (Arc::clone(&self.memory), self.engine.tsc_hz());
            let stolen = StolenTime::new(&self.io, memory, hz, self.vcpus.len())?;
            let _ = self.stolen.set(stolen);
        }
        Ok(true)
    }

    pub fn stolen_time(&self) -> Option<&StolenTime> {
        self.stolen.get()
    }
}
