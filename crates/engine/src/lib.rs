//! The one contract between a machine and its CPU: what /dev/kvm defined.
//!
//! An engine makes VMs, a VM makes vCPUs, a vCPU runs until something outside
//! the CPU must answer. That something is an [`Exit`], a value; the answer is a
//! [`Reply`]. Whoever implements these traits holds CPU, MMU and interrupt
//! controllers; whoever calls them holds memory, buses and devices.

mod chipset;
mod clock;
pub mod cpuid;
mod debug;
mod dirty;
mod doorbell;
mod exit;
mod features;
mod halt;
mod irqfd;
pub mod machine_check;
mod msi;
mod platform;
pub mod pvclock;
mod registers;
mod replay;
pub mod section;
mod state;
mod waited;

pub use chipset::{ENGINE_MMIO, ENGINE_PORTS, GSI_COUNT};
pub use clock::{Clock, ClockFollower, host_tsc};
pub use debug::{DebugStop, GuestDebug, HardwareBreakpoint, Watched};
pub use dirty::DirtyPages;
pub use doorbell::{Doorbell, DoorbellAddress, Doorbells, MAX_DOORBELLS};
pub use exit::{Exit, GuestFault, Reply, Trap};
pub use features::{CpuModel, features, identity};
pub use halt::{Halted, Halts};
pub use irqfd::{Irqfd, IrqfdId, Irqfds, MAX_IRQFDS};
pub use msi::{MSI_GSIS, Msi, MsiRoutes};
pub use platform::{CpuidLeaf, Hypercalls, Platform, RegisterPorts, Traps};
pub use registers::{Registers, Segment, SegmentTable, SystemRegisters};
pub use replay::{Met, Passed, Replay, ReplayStop, Seek};
pub use section::SectionError;
pub use state::{
    ChipsetState, DebugRegisters, IoapicState, LAPIC_REGISTERS, LapicState, PendingEvents,
    PendingException, PicState, PitChannelState, PitCounting, PitState, RunState, Saved, VcpuState,
    VmState,
};
pub use waited::Waited;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use tetrarch_memory::GuestPhys;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    Refused(String),
    #[error("internal error of the engine: {0}")]
    Internal(String),
    #[error(transparent)]
    Section(#[from] SectionError),
    #[error(transparent)]
    Memory(#[from] tetrarch_memory::MemoryError),
    /// One of the others, and what mends it.
    #[error("{error}; {mend}")]
    Mended { error: Box<EngineError>, mend: String },
}

impl EngineError {
    /// The same error with what its reader can do about it.
    #[must_use]
    pub fn mended_by(self, mend: impl Into<String>) -> Self {
        Self::Mended { error: Box::new(self), mend: mend.into() }
    }

    /// What went wrong and what mends it, where that is known.
    pub fn parts(&self) -> (String, Option<String>) {
        match self {
            Self::Mended { error, mend } => (error.parts().0, Some(mend.clone())),
            Self::Memory(error) => (error.cause(), error.mend().map(str::to_owned)),
            other => (other.to_string(), None),
        }
    }
}

/// Why an engine cannot run on this host, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}; {mend}")]
pub struct Unusable {
    pub cause: String,
    pub mend: String,
}

impl Unusable {
    pub fn new(cause: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { cause: cause.into(), mend: mend.into() }
    }

    /// What the host refused; `otherwise` is the mend where its error names none. A limit of the
    /// process stands behind most of them (setrlimit(2)).
    pub fn refused(what: &str, error: &std::io::Error, otherwise: &str) -> Self {
        let mend = match error.raw_os_error() {
            Some(libc::EMFILE) => "raise the limit of open files: ulimit -n",
            Some(libc::ENFILE) => "end programs that hold many files open",
            Some(libc::ENOMEM) => {
                "free memory on the host, ask for less memory, or raise the limit: ulimit -v"
            }
            Some(libc::EFBIG) => "raise the limit of the size of files: ulimit -f",
            _ => otherwise,
        };
        Self::new(format!("{what}: {error}"), mend)
    }
}

impl From<Unusable> for EngineError {
    fn from(reason: Unusable) -> Self {
        Self::Unavailable(reason.cause).mended_by(reason.mend)
    }
}

/// Makes a running [`Vcpu::run`] return [`Exit::Kicked`], from any thread.
pub trait Kick: Send + Sync {
    fn kick(&self);
}

/// Counters of one engine object, as (group, name, value).
pub type Counters = Vec<(&'static str, &'static str, u64)>;

/// What became of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordingEnd {
    Recorded {
        /// Instructions.
        count: u64,
        bytes: u64,
    },
    Replayed {
        /// Those that were alike.
        checkpoints: u64,
        /// False: the recorder died before it could end the recording.
        whole: bool,
    },
}

/// A virtual machine: guest memory with vCPUs and interrupt controllers.
pub trait Vm: Send + Sync {
    /// Makes vCPU `id`; each id once, counted from 0.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Drives global system interrupt `gsi`: 0-23, a pin of the I/O APIC; or one of
    /// [`MSI_GSIS`], which sends its message when it is driven high.
    fn irq_line(&self, gsi: u32, level: bool);
    /// Delivers a message-signalled interrupt (Intel SDM 3A, 11.11).
    fn msi(&self, address: u64, data: u32);
    /// Sets which message each line of [`MSI_GSIS`] sends from now on, or none: all
    /// of the list at once, since a change has its price on engine `kvm`.
    fn set_msi_routes(&self, routes: &[(u32, Option<Msi>)]) -> Result<(), EngineError>;
    /// From now on a signal of the eventfd(2) raises the line: one of [`MSI_GSIS`] sends
    /// its message, a pin gives an edge. With `resample` a pin is high instead until
    /// the guest ends the interrupt, at each of which `resample` is signalled, as when the
    /// controllers are loaded: whoever still wants service then signals the event again.
    fn add_irqfd(
        &self,
        gsi: u32,
        event: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<IrqfdId, EngineError>;
    /// No signal after this raises the line, and the line is let go.
    fn remove_irqfd(&self, irqfd: IrqfdId) -> Result<(), EngineError>;
    /// From now on a write that matches signals the eventfd(2) and is no exit. RAM
    /// that comes to lie there goes first. A signal adds 1 to the event's count.
    fn add_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> Result<(), EngineError>;
    /// Such a write is an exit again. One that is under way may still signal.
    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError>;
    /// What CPUID says on the first vCPU while its guest has switched nothing on: EAX to EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// The machine's clock.
    fn clock(&self) -> &Arc<Clock>;
    /// Ticks of the guest's TSC in a second, once there is a vCPU.
    fn tsc_hz(&self) -> u64;
    /// Starts or stops to note which pages are written, by vCPUs (their page walks
    /// included) and by devices. The log begins empty; while it is off it costs
    /// nothing.
    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError>;
    /// The pages written since the last call, or since the log was switched on, by
    /// region. vCPUs may run meanwhile: a page that is written after it was read by
    /// the caller is in the next log.
    fn take_dirty_log(&self) -> Result<Vec<DirtyPages>, EngineError>;
    /// A device is about to use guest memory or lines: a machine that records stands until
    /// [`Vm::go_on`], and writes down what was changed. Not for the thread of a vCPU.
    fn stop_for_device(&self) {}
    fn go_on(&self) {}
    /// Of a machine that replays: where in the recording it is.
    fn replay(&self) -> Option<&dyn Replay> {
        None
    }
    /// Ends the recording of a machine that has one; what became of a replay.
    fn end_recording(&self) -> Result<Option<RecordingEnd>, EngineError> {
        Ok(None)
    }
    /// What the vCPUs share: interrupt controllers and clock. Exact while no
    /// vCPU runs and the clock stands.
    fn save(&self) -> Result<VmState, EngineError>;
    /// Takes up what an engine saved, of either kind; to be done before the
    /// vCPUs' own states, while none runs. On an error nothing has changed.
    fn load(&self, state: &VmState) -> Result<(), EngineError>;
}

/// One virtual CPU. It belongs to the thread that calls `run`.
pub trait Vcpu: Send {
    /// Runs guest code until an exit. Each but `Halt`, `Shutdown` and `Kicked` must
    /// be answered by [`Vcpu::reply`], writes too; until then `run` is refused.
    fn run(&mut self) -> Result<Exit, EngineError>;
    fn reply(&mut self, reply: Reply);
    fn kicker(&self) -> Arc<dyn Kick>;

    fn registers(&mut self) -> Result<Registers, EngineError>;
    fn set_registers(&mut self, registers: &Registers) -> Result<(), EngineError>;
    fn system_registers(&mut self) -> Result<SystemRegisters, EngineError>;
    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), EngineError>;
    /// The XSAVE image (Intel SDM 1, 13.4): legacy region, header, AVX state.
    fn xsave(&mut self) -> Result<Vec<u8>, EngineError>;
    fn set_xsave(&mut self, image: &[u8]) -> Result<(), EngineError>;
    /// `None` where the CPU has no such register.
    fn msr(&mut self, index: u32) -> Result<Option<u64>, EngineError>;
    /// False where the CPU refuses the register or the value.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<bool, EngineError>;
    /// Reads guest memory at a linear address as the debugger sees it: no
    /// access checks, no accessed bits. Returns how many bytes could be read.
    fn peek(&mut self, linear: u64, data: &mut [u8]) -> usize;
    /// Where a linear address leads to, in the same way; `None` where it is not mapped.
    fn translate(&mut self, linear: u64) -> Option<GuestPhys>;
    /// Where the RAM is that an access of the vCPU's own to one byte at a linear address would
    /// reach, by the rights that it has now, or the fault that it would raise; accessed and dirty
    /// bits are set. For an engine that hands over INS and OUTS whole (`Exit::PortWithRegisters`);
    /// by another, and where no RAM is, every access is refused by #GP.
    fn access(&mut self, _linear: u64, _write: bool) -> Result<GuestPhys, GuestFault> {
        Err(GuestFault::GP)
    }
    /// What [`Exit::Debug`] comes for from now on; to be set anew for each step, after the
    /// registers have been set.
    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<(), EngineError>;
    fn counters(&self) -> Counters;

    /// All of the vCPU, between two instructions; times are exact while the
    /// machine's clock stands.
    fn save(&mut self) -> Result<VcpuState, EngineError>;
    /// Takes up what a vCPU of the same number was, on either engine.
    fn load(&mut self, state: &VcpuState) -> Result<(), EngineError>;
    /// Whether it is in the machine, as it is when it was made. One that is not is not run, and a
    /// machine whose others halt for good has ended.
    fn set_present(&mut self, _present: bool) {}
}
