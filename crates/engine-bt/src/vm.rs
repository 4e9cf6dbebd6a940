//! One virtual machine: what its vCPUs share, and the contract's `Vm`.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;

use parking_lot::Mutex;
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::pvclock::Timebase;
use tetrarch_engine::{
    Clock, CpuModel, DirtyPages, Doorbell, EngineError, GSI_COUNT, Halts, Irqfd, IrqfdId, Msi,
    Platform, RecordingEnd, Replay, Unusable, Vcpu, Vm, VmState, host_tsc,
};
use tetrarch_journal::{Line, Reader, Writer};
use tetrarch_memory::GuestMemory;

use crate::cpu::VmShared;
use crate::cpu::cpuid::CpuidTable;
use crate::doorbells::DoorbellTable;
use crate::exec::{self, BtVcpu};
use crate::host::wake::Bells;
use crate::interp::thunk;
use crate::irqchip::IrqChip;
use crate::irqfd::IrqfdTable;
use crate::journal::{self, Journal, Player, Recorder};
use crate::kvm;
use crate::lines::Lines;
use crate::memory::code_map::{CodeMap, MemoryChanges};
use crate::memory::dirty_log::{DeviceWrites, DirtyLog};
use crate::memory::rendezvous::Rendezvous;
use crate::translate::cache::{CodeCache, Room};

/// Choices for a VM of this engine.
#[derive(Clone, Debug)]
pub struct Config {
    pub topology: Topology,
    /// Without it every instruction is interpreted.
    pub translate: bool,
    pub platform: Platform,
    /// A seed for what a host does to a guest in an evil hour; see `exec/chaos.rs`.
    pub chaos: Option<u64>,
    pub cpu: CpuModel,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            topology: Topology::flat(1),
            translate: true,
            platform: Platform::default(),
            chaos: None,
            cpu: CpuModel::default(),
        }
    }
}

/// The most vCPUs that this engine runs today.
pub const MAX_VCPUS: u32 = 64;

/// Whether the engine can run on this host, or why not.
pub fn available() -> Result<(), Unusable> {
    for (name, there) in [
        ("SSE4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("POPCNT", std::arch::is_x86_feature_detected!("popcnt")),
        ("CMPXCHG16B", std::arch::is_x86_feature_detected!("cmpxchg16b")),
    ] {
        if !there {
            return Err(Unusable::new(
                format!("the host CPU lacks {name}, which the translator needs"),
                "use a host that has it",
            ));
        }
    }
    CodeCache::probe().map_err(|error| {
        Unusable::refused(
            "the host gives no executable memory",
            &error,
            "allow memfd mappings with PROT_EXEC",
        )
    })
}

/// What a machine with one vCPU writes its life to, or lives again by.
pub enum Recording {
    Record {
        writer: Writer,
        /// Instructions from one checkpoint to the next.
        checkpoint_every: u64,
    },
    Replay(Reader),
}

pub fn create_vm(memory: Arc<GuestMemory>, config: Config) -> Result<Arc<dyn Vm>, EngineError> {
    create(memory, config, None)
}

pub fn create_recorded_vm(
    memory: Arc<GuestMemory>,
    config: Config,
    recording: Recording,
) -> Result<Arc<dyn Vm>, EngineError> {
    create(memory, config, Some(recording))
}

fn create(
    memory: Arc<GuestMemory>,
    config: Config,
    recording: Option<Recording>,
) -> Result<Arc<dyn Vm>, EngineError> {
    let vcpus = config.topology.vcpus();
    if vcpus == 0 || vcpus > MAX_VCPUS {
        return Err(EngineError::Refused(format!(
            "engine bt runs 1 to {MAX_VCPUS} vCPUs, not {vcpus}"
        ))
        .mended_by(format!("ask for {MAX_VCPUS} at most")));
    }
    available()?;
    let room = if recording.is_some() { Room::JOURNALLED } else { Room::USUAL };
    Ok(Arc::new(build(memory, config, room, recording)?))
}

pub(crate) fn build(
    memory: Arc<GuestMemory>,
    config: Config,
    room: Room,
    recording: Option<Recording>,
) -> Result<BtVm, EngineError> {
    let topology = config.topology;
    let vcpus = topology.vcpus();
    let bells = Arc::new(Bells::new(vcpus as usize));
    if recording.is_some() && config.chaos.is_some() {
        return Err(
            EngineError::Refused("chaos cannot be recorded".into()).mended_by("give one of them")
        );
    }
    if recording.is_some() && vcpus > 1 {
        return Err(EngineError::Refused(format!(
            "a machine with {vcpus} vCPUs cannot be recorded"
        ))
        .mended_by("give it 1"));
    }
    let (journal, tsc_hz) = match recording {
        None => (None, tsc_hz()),
        Some(Recording::Record { writer, checkpoint_every }) => {
            let recorder = Recorder::new(writer, checkpoint_every, Arc::clone(&bells) as _);
            (Some(Journal::Record(Box::new(recorder))), tsc_hz())
        }
        Some(Recording::Replay(reader)) => {
            let player = Player::new(reader)?;
            let tsc_hz = player.tsc_hz();
            (Some(Journal::Replay(Box::new(player))), tsc_hz)
        }
    };
    let journal = journal.map(Arc::new);
    let code = Arc::new(CodeMap::new(&memory));
    memory.add_observer(Arc::new(MemoryChanges(Arc::clone(&code))));
    let rendezvous = Arc::new(Rendezvous::new(vcpus as usize, Arc::clone(&bells) as _));
    let dirty = Arc::new(DirtyLog::new(&memory, Arc::clone(&rendezvous)));
    memory.add_observer(Arc::new(DeviceWrites(Arc::clone(&dirty))));
    if let Some(journal) = &journal {
        memory.add_observer(Arc::new(journal::recorder::DeviceWrites(Arc::clone(journal))));
    }
    let irqchip = Arc::new(IrqChip::new(topology, tsc_hz, Arc::clone(&bells) as _));
    irqchip.set_virtual_wire();
    let mut platform = config.platform;
    let mut kvm_leaf = [kvm::features(&platform, journal.is_some()), 0, 0, 0];
    config.cpu.apply(kvm::FEATURES_LEAF, 0, &mut kvm_leaf);
    let kvm_features = kvm_leaf[0];
    if kvm_features != 0 {
        // Behind the platform's own, which are found first.
        platform.cpuid.extend(kvm::leaves(kvm_features, tsc_hz));
    }
    let clock = Arc::new(Clock::new());
    let shared = Arc::new(VmShared {
        memory,
        code,
        dirty,
        rendezvous,
        halts: Halts::default(),
        crowded: available_parallelism().is_ok_and(|cpus| vcpus as usize > cpus.get()),
        irqchip,
        doorbells: DoorbellTable::default(),
        cpuid: CpuidTable::new(topology, &config.cpu),
        platform,
        kvm_features,
        kvm_time: Timebase::new(Arc::clone(&clock), tsc_hz),
        clock,
        tsc_hz,
        topology,
        chaos: config.chaos,
        journal,
    });
    thunk::prepare();
    let cache = if config.translate {
        let cache = CodeCache::new(room, &exec::CALLS).map_err(|error| {
            Unusable::refused("no memory for translated code", &error, "use engine kvm")
        })?;
        Some(Arc::new(Mutex::new(cache)))
    } else {
        None
    };
    let lines = Lines::new(Arc::clone(&shared.irqchip), Arc::clone(&shared.clock));
    let lines = Arc::new(lines);
    let irqfds = IrqfdTable::new(Arc::clone(&lines));
    Ok(BtVm { shared, cache, bells, lines, irqfds, vcpus, created: Mutex::default() })
}

/// Ticks of the host's TSC in a second (measured once a process).
fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let sample = || {
            // The shortest of some tries has the least between its two reads.
            (0..16)
                .map(|_| {
                    let at = std::time::Instant::now();
                    let tsc = host_tsc();
                    (at.elapsed(), at, tsc)
                })
                .min_by_key(|(took, ..)| *took)
                .map(|(took, at, tsc)| (at + took, tsc))
        };
        let Some((start, first)) = sample() else { return 1_000_000_000 };
        std::thread::sleep(std::time::Duration::from_millis(20));
        let Some((end, last)) = sample() else { return 1_000_000_000 };
        let ns = (end - start).as_nanos().max(1);
        (u128::from(last - first) * 1_000_000_000 / ns) as u64
    })
}

pub(crate) struct BtVm {
    pub(crate) shared: Arc<VmShared>,
    cache: Option<Arc<Mutex<CodeCache>>>,
    bells: Arc<Bells>,
    lines: Arc<Lines>,
    irqfds: IrqfdTable,
    vcpus: u32,
    created: Mutex<Vec<u32>>,
}

impl Vm for BtVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        if id >= self.vcpus {
            return Err(EngineError::Refused(format!(
                "vCPU {id} does not exist: the VM has {}",
                self.vcpus
            )));
        }
        let mut created = self.created.lock();
        if created.contains(&id) {
            return Err(EngineError::Refused(format!("vCPU {id} exists already")));
        }
        let vcpu = BtVcpu::new(id as usize, Arc::clone(&self.shared), self.cache.clone())?;
        self.bells.set(id as usize, vcpu.bell());
        created.push(id);
        Ok(Box::new(vcpu))
    }

    fn irq_line(&self, gsi: u32, level: bool) {
        match self.shared.journal.as_deref() {
            None => self.lines.drive(gsi, level),
            Some(Journal::Record(recorder)) => {
                if gsi < GSI_COUNT {
                    recorder.line(Line::Pin { gsi, level });
                } else if let Some(Msi { address, data }) = self.lines.message(gsi)
                    && level
                {
                    recorder.line(Line::Message { address, data });
                }
            }
            Some(Journal::Replay(_)) => {}
        }
    }

    fn msi(&self, address: u64, data: u32) {
        match self.shared.journal.as_deref() {
            None => self.shared.irqchip.msi(address, data),
            Some(Journal::Record(recorder)) => recorder.line(Line::Message { address, data }),
            Some(Journal::Replay(_)) => {}
        }
    }

    fn set_msi_routes(&self, routes: &[(u32, Option<Msi>)]) -> Result<(), EngineError> {
        self.lines.change_routes(routes)
    }

    fn add_irqfd(
        &self,
        gsi: u32,
        event: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<IrqfdId, EngineError> {
        if self.shared.journal.is_some() {
            return Err(EngineError::Refused(
                "a device of another process cannot be recorded".into(),
            ));
        }
        self.irqfds.add(Irqfd::new(gsi, event, resample)?)
    }

    fn remove_irqfd(&self, irqfd: IrqfdId) -> Result<(), EngineError> {
        self.irqfds.remove(irqfd)
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> Result<(), EngineError> {
        let VmShared { doorbells, memory, platform, journal, .. } = &*self.shared;
        if journal.is_some() {
            // The write is an exit, and its answer an input.
            return Ok(());
        }
        doorbells.add(doorbell, event, memory, platform)
    }

    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        if self.shared.journal.is_some() {
            return Ok(());
        }
        self.shared.doorbells.remove(doorbell)
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let VmShared { platform, cpuid, .. } = &*self.shared;
        platform.cpuid(leaf, subleaf, 0).unwrap_or_else(|| cpuid.fixed(leaf, subleaf, 0))
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.tsc_hz
    }

    fn clock(&self) -> &Arc<Clock> {
        &self.shared.clock
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        if self.shared.journal.is_some() {
            return Err(EngineError::Refused(
                "the log of written pages is taken by the recording".into(),
            ));
        }
        self.shared.dirty.set(&self.shared.memory, on);
        Ok(())
    }

    fn take_dirty_log(&self) -> Result<Vec<DirtyPages>, EngineError> {
        Ok(self.shared.dirty.take(&self.shared.memory))
    }

    fn stop_for_device(&self) {
        if let Some(Journal::Record(recorder)) = self.shared.journal.as_deref() {
            recorder.stop();
        }
    }

    fn go_on(&self) {
        if let Some(Journal::Record(recorder)) = self.shared.journal.as_deref() {
            recorder.go_on();
        }
    }

    fn replay(&self) -> Option<&dyn Replay> {
        match self.shared.journal.as_deref() {
            Some(Journal::Replay(player)) => Some(&**player),
            _ => None,
        }
    }

    fn end_recording(&self) -> Result<Option<RecordingEnd>, EngineError> {
        Ok(match self.shared.journal.as_deref() {
            None => None,
            Some(Journal::Record(recorder)) => {
                let (count, bytes) = recorder.finish()?;
                Some(RecordingEnd::Recorded { count, bytes })
            }
            Some(Journal::Replay(player)) => {
                let (checkpoints, whole) = player.report();
                Some(RecordingEnd::Replayed { checkpoints, whole })
            }
        })
    }

    fn save(&self) -> Result<VmState, EngineError> {
        self.irqfds.settle();
        let VmShared { clock, irqchip, kvm_time, tsc_hz, .. } = &*self.shared;
        let (clock_ns, tsc) = (clock.now_ns(), clock.tsc());
        Ok(VmState {
            vcpus: self.vcpus,
            clock_ns,
            kvmclock_ns: kvm_time.clock_ns(clock_ns, tsc),
            tsc_hz: *tsc_hz,
            chipset: irqchip.chipset(),
        })
    }

    fn load(&self, state: &VmState) -> Result<(), EngineError> {
        state.check(self.vcpus, self.shared.tsc_hz)?;
        self.shared.irqchip.set_chipset(&state.chipset).map_err(|what| {
            EngineError::Refused(format!("engine bt cannot take up these chips: {what}"))
        })?;
        let VmShared { clock, kvm_time, .. } = &*self.shared;
        clock.set_ns(state.clock_ns);
        kvm_time.set(state.kvmclock_ns, clock.tsc());
        Ok(())
    }
}

#[cfg(test)]
#[path = "smp_tests.rs"]
mod smp_tests;
#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
