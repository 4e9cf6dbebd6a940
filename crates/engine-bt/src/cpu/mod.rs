//! One vCPU as the interpreter and the run loop see it.
//!
//! - here: what it consists of, RESET and INIT, its time
//! - [`mmu`]: page walks and access to memory; [`chipset`]: to what is not RAM
//! - [`replay`]: the log of answered exits
//! - [`cpuid`], [`msr`]: what software reads of the CPU, and sets
//! - [`fpu`], [`x87_pointers`], [`x87_settle`]: the host's FPU with the guest's state
//! - [`paravirtual`]: KVM's interface

pub mod chipset;
pub mod cpuid;
pub mod fpu;
pub mod mmu;
pub mod msr;
mod paravirtual;
pub mod replay;
pub mod x87_pointers;
mod x87_settle;

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::pvclock::Timebase;
use tetrarch_engine::{Clock, GuestDebug, Halts, Platform};
use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::cpu::cpuid::CpuidTable;
use crate::cpu::replay::Replay;
use crate::cpu::x87_pointers::CodePlaces;
use crate::doorbells::DoorbellTable;
use crate::irqchip::IrqChip;
use crate::journal::{Counting, Journal};
use crate::kvm::Paravirtual;
use crate::memory::code_map::CodeMap;
use crate::memory::dirty_log::DirtyLog;
use crate::memory::rendezvous::Rendezvous;
use crate::memory::tlb::Tlb;
use crate::state::fault::Fault;
use crate::state::msrs::MsrFile;
use crate::state::{CpuState, attr, cr, flag, is_flat, mode, reach, reg, seg};

/// What the vCPUs of a VM share.
pub struct VmShared {
    pub memory: Arc<GuestMemory>,
    pub code: Arc<CodeMap>,
    pub dirty: Arc<DirtyLog>,
    pub rendezvous: Arc<Rendezvous>,
    pub halts: Halts,
    /// The vCPUs outnumber the host's CPUs.
    pub crowded: bool,
    pub irqchip: Arc<IrqChip>,
    pub doorbells: DoorbellTable,
    pub clock: Arc<Clock>,
    pub cpuid: CpuidTable,
    pub platform: Platform,
    /// What of KVM's interface the guest is offered.
    pub kvm_features: u32,
    pub kvm_time: Timebase,
    pub tsc_hz: u64,
    pub topology: Topology,
    /// The seed of disturbances; see `exec/chaos.rs`.
    pub chaos: Option<u64>,
    /// The machine records or replays: instructions are counted.
    pub journal: Option<Arc<Journal>>,
}

impl VmShared {
    /// What the guest reads of the host, or has read when it was recorded.
    #[inline]
    pub fn value(&self, read: impl FnOnce() -> u64) -> u64 {
        match &self.journal {
            None => read(),
            Some(journal) => journal.value(read),
        }
    }
}

/// IA32_APIC_BASE: the local APIC is on (Intel SDM 3A, 11.4.4).
const APIC_GLOBAL_ENABLE: u64 = 1 << 11;

#[cfg(test)]
impl VmShared {
    /// Of a VM with one vCPU and RAM from 0, for tests.
    pub fn alone(memory: GuestMemory) -> Arc<Self> {
        struct NoWake;

        impl crate::irqchip::Wake for NoWake {
            fn wake(&self, _vcpu: usize) {}
        }

        let memory = Arc::new(memory);
        let clock = Arc::new(Clock::new());
        let tsc_hz = 1_000_000_000;
        let rendezvous = Arc::new(Rendezvous::new(1, Arc::new(NoWake)));
        Arc::new(Self {
            code: Arc::new(CodeMap::new(&memory)),
            dirty: Arc::new(DirtyLog::new(&memory, Arc::clone(&rendezvous))),
            rendezvous,
            halts: Halts::default(),
            crowded: false,
            memory,
            irqchip: Arc::new(IrqChip::new(Topology::flat(1), tsc_hz, Arc::new(NoWake))),
            doorbells: DoorbellTable::default(),
            kvm_time: Timebase::new(Arc::clone(&clock), tsc_hz),
            clock,
            cpuid: CpuidTable::new(Topology::flat(1), &tetrarch_engine::CpuModel::default()),
            platform: Platform::default(),
            kvm_features: 0,
            tsc_hz,
            topology: Topology::flat(1),
            chaos: None,
            journal: None,
        })
    }
}

/// The state lives in the block that GS points to; this is its one owner.
pub struct StateRef(NonNull<CpuState>);

// SAFETY: the state belongs to one vCPU, which belongs to one thread at a time.
unsafe impl Send for StateRef {}

impl Deref for StateRef {
    type Target = CpuState;

    #[inline]
    fn deref(&self) -> &CpuState {
        // SAFETY: the pointer is into the `StateBlock` of the `Cpu` that owns us.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for StateRef {
    #[inline]
    fn deref_mut(&mut self) -> &mut CpuState {
        // SAFETY: as above, and `&mut self` is the only way to it.
        unsafe { self.0.as_mut() }
    }
}

/// Event counts of one vCPU.
#[derive(Default, Clone, Copy)]
pub struct Counts {
    pub interpreted: u64,
    pub blocks: u64,
    pub instructions: u64,
    pub links: u64,
    pub entries: u64,
    pub lookups: u64,
    pub tlb_misses: u64,
    pub page_faults: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    /// Interrupts that the guest ended without its local APIC.
    pub quiet_eois: u64,
    pub invalidations: u64,
    pub cache_flushes: u64,
    pub halts: u64,
    pub slow_accesses: u64,
    pub halted_ns: u64,
    pub translate_tsc: u64,
    pub code_tsc: u64,
    pub run_tsc: u64,
}

/// What a TLB miss of translated code found where the access cannot hit.
#[derive(Clone, Copy)]
pub enum Missed {
    /// Something that the interpreter sees to.
    Nothing,
    Device {
        linear: u64,
        address: GuestPhys,
    },
    Fault {
        linear: u64,
        fault: Fault,
    },
}

pub struct Cpu {
    pub id: usize,
    pub st: StateRef,
    pub tlb: Tlb,
    pub vm: Arc<VmShared>,
    /// Model-specific registers that are only stored.
    pub msrs: MsrFile,
    pub kvm: Paravirtual,
    pub replay: Replay,
    pub missed: Missed,
    /// Where translated code belongs, if this machine translates.
    pub places: Option<Arc<dyn CodePlaces>>,
    pub counts: Counts,
    /// What the host's debugger wants; no part of the guest's state.
    pub debugger: GuestDebug,
    /// Linear addresses before whose instructions a replay stops. No block has one in it.
    pub breakpoints: Arc<BTreeSet<u64>>,
    /// How translations are made.
    pub counting: Counting,
    /// No other vCPU runs guest code now.
    pub alone: bool,
    /// How often PAUSE was met where vCPUs outnumber the host's CPUs.
    pub pauses: u32,
    /// The guest's TSC less that of the machine's clock.
    tsc_base: u64,
}

impl Cpu {
    pub fn new(id: usize, vm: Arc<VmShared>) -> std::io::Result<Self> {
        let tlb = Tlb::new()?;
        let st = NonNull::new(tlb.block.state_ptr()).ok_or_else(std::io::Error::last_os_error)?;
        let counting = match vm.journal.as_deref() {
            None => Counting::Not,
            Some(Journal::Record(_)) => Counting::Recorded,
            Some(Journal::Replay(_)) => Counting::Replayed,
        };
        let mut cpu = Self {
            id,
            st: StateRef(st),
            tlb,
            vm,
            msrs: MsrFile::new(),
            kvm: Paravirtual::new(),
            replay: Replay::default(),
            missed: Missed::Nothing,
            places: None,
            counts: Counts::default(),
            debugger: GuestDebug::default(),
            breakpoints: Arc::default(),
            counting,
            alone: false,
            pauses: 0,
            tsc_base: 0,
        };
        cpu.reset();
        Ok(cpu)
    }

    /// The state after RESET (Intel SDM 3A, table 10-1).
    pub fn reset(&mut self) {
        let st = &mut *self.st;
        st.cr0 = cr::CR0_CD | cr::CR0_NW;
        st.xcr0 = 1;
        st.tsc_aux = 0;
        (st.star, st.lstar, st.cstar, st.sfmask, st.kernel_gs_base) = (0, 0, 0, 0, 0);
        (st.sysenter_cs, st.sysenter_esp, st.sysenter_eip) = (0, 0, 0);
        fpu::reset(st);
        self.msrs = MsrFile::new();
        self.init();
    }

    /// The state after INIT (the same table): the caches' control bits, x87 and
    /// vector registers, XCR0, the TSC and the MSRs stay. Neither vendor's manual
    /// has EFER among these MSRs: the start is in real mode.
    pub fn init(&mut self) {
        use tetrarch_engine::{Segment, SegmentTable};
        let data = attr::P | attr::S | attr::RW | attr::ACCESSED;
        let st = &mut *self.st;
        st.gpr = [0; 16];
        st.gpr[reg::RDX] = u64::from(self.vm.cpuid.signature());
        st.rip = 0xFFF0;
        st.set_rflags(flag::FIXED);
        st.seg = [Segment { base: 0, limit: 0xFFFF, attributes: data, selector: 0 }; 8];
        st.seg[seg::CS].base = 0xFFFF_0000;
        st.seg[seg::CS].selector = 0xF000;
        st.seg[seg::CS].attributes = data | attr::CODE;
        st.seg[seg::LDT].attributes = attr::P | 2;
        st.seg[seg::TR].attributes = attr::P | 11;
        st.gdt = SegmentTable { base: 0, limit: 0xFFFF };
        st.idt = SegmentTable { base: 0, limit: 0xFFFF };
        st.cr0 = st.cr0 & (cr::CR0_CD | cr::CR0_NW) | cr::CR0_ET;
        st.cr2 = 0;
        st.cr3 = 0;
        st.cr4 = 0;
        st.efer = 0;
        st.dr = [0; 8];
        st.dr[6] = 0xFFFF_0FF0;
        st.dr[7] = 0x400;
        st.pending_debug = 0;
        st.cpl = 0;
        st.shadow = 0;
        st.nmi_blocked = 0;
        st.halted = u8::from(self.vm.irqchip.waits_for_sipi(self.id));
        self.kvm = Paravirtual::new();
        self.tlb.flush(true);
        self.update_mode();
    }

    /// Starts an application processor that waits: in real mode, at the page that
    /// the SIPI names (Intel SDM 3A, 9.4.4).
    pub fn start_up(&mut self, page: u8) {
        let code = &mut self.st.seg[seg::CS];
        code.selector = u16::from(page) << 8;
        code.base = u64::from(page) << 12;
        self.st.rip = 0;
        self.st.halted = 0;
        self.update_mode();
    }

    /// Recomputes what follows from control registers, CS and flags. To be
    /// called after any change of them.
    pub fn update_mode(&mut self) {
        let st = &mut *self.st;
        let user = st.cpl == 3;
        let mut word = 0;
        let fpu = st.cr0 & (cr::CR0_EM | cr::CR0_TS) == 0;
        let sse = fpu && st.cr4 & cr::CR4_OSFXSR != 0;
        let avx = sse && st.cr4 & cr::CR4_OSXSAVE != 0 && st.xcr0 & 6 == 6;
        st.avx = u8::from(avx);
        for (on, bit) in [
            (user, mode::USER),
            (fpu, mode::FPU),
            (sse, mode::SSE),
            (avx, mode::AVX),
            (st.cr4 & cr::CR4_TSD == 0, mode::TSC),
            (st.cr4 & cr::CR4_FSGSBASE != 0, mode::FSGSBASE),
            (st.efer & cr::EFER_SCE != 0 && !self.vm.platform.traps.syscall, mode::SYSCALL),
        ] {
            if on {
                word |= bit;
            }
        }
        let alignment_checks = user && st.cr0 & cr::CR0_AM != 0 && st.flags & flag::AC != 0;
        let backward = st.flags & flag::DF != 0;
        // A hardware breakpoint needs the interpreter's checks, as a single step does.
        let debug = st.flags & flag::TF != 0 || st.dr[7] & 0xFF != 0 || self.debugger.watches();
        let code32 = st.flat_code32();
        if (st.code64() || code32)
            && (user || st.cpl == 0)
            && !alignment_checks
            && !backward
            && !debug
        {
            word |= mode::TRANSLATE;
        }
        if code32 {
            word |= mode::CODE32;
            for (index, bit) in [(seg::DS, mode::FLAT_DS), (seg::ES, mode::FLAT_ES)] {
                if is_flat(&st.seg[index]) {
                    word |= bit;
                }
            }
            for (reach_of, segment) in st.reach.iter_mut().zip(&st.seg) {
                *reach_of = reach(segment);
            }
        }
        st.mode = word;
        let known = &mut st.branch_modes[usize::from(user)];
        if word & mode::TRANSLATE != 0 && *known != word {
            // Branch targets are looked up by address and privilege alone.
            *known = word;
            self.tlb.flush_branches(user);
        }
    }

    #[inline]
    pub fn user(&self) -> bool {
        self.st.cpl == 3
    }

    /// The guest's time-stamp counter: the host's, less the machine's pauses,
    /// moved by what the guest wrote.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.vm.value(|| self.vm.clock.tsc()).wrapping_add(self.tsc_base)
    }

    /// The same as the host has it, though the machine may be one that replays.
    pub fn host_tsc(&self) -> u64 {
        self.vm.clock.tsc().wrapping_add(self.tsc_base)
    }

    pub fn set_tsc(&mut self, value: u64) {
        self.tsc_base = value.wrapping_sub(self.vm.value(|| self.vm.clock.tsc()));
        self.update_tsc_offset();
    }

    /// Tells translated code, which reads the host's counter, how far the
    /// guest's is from it. To be called before the guest runs: the machine may
    /// have stood since.
    pub fn update_tsc_offset(&mut self) {
        self.st.tsc_offset = self.tsc_base.wrapping_sub(self.vm.clock.tsc_lag());
    }

    /// For an image of the vCPU.
    pub fn tsc_base(&self) -> u64 {
        self.tsc_base
    }

    pub fn set_tsc_base(&mut self, base: u64) {
        self.tsc_base = base;
        self.update_tsc_offset();
    }

    pub fn apic_id(&self) -> u32 {
        self.vm.topology.apic_id(self.id as u32)
    }

    pub fn now_ns(&self) -> u64 {
        self.vm.value(|| self.vm.clock.now_ns())
    }

    /// What CPUID says, EAX to EDX: by the platform, or else of this CPU.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let vm = &*self.vm;
        vm.platform.cpuid(leaf, subleaf, self.id as u32).unwrap_or_else(|| {
            let apic = vm.irqchip.apic_base(self.id) & APIC_GLOBAL_ENABLE != 0;
            vm.cpuid.query(leaf, subleaf, self.apic_id(), &self.st, apic)
        })
    }
}
