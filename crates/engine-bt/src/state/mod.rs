//! What one vCPU is, as data: registers ([`CpuState`]), the memory that they and
//! their tables lie in ([`block`]), stored MSRs ([`msrs`]), and what ends an
//! instruction early ([`fault`]).
//!
//! Translated code reaches this block through the host's GS base, so the layout
//! is C and every offset is a constant of the emitter. While translated code
//! runs, general registers, arithmetic flags, x87 and vector registers are live
//! in the host CPU; whenever Rust code runs, `gpr`, `rip`, `flags` and `vec`
//! are the truth, while x87 and MXCSR stay in the host CPU between
//! [`crate::cpu::fpu::load`] and [`crate::cpu::fpu::unload`].

pub mod address;
pub mod block;
pub mod fault;
pub mod msrs;

use std::sync::atomic::{AtomicU8, Ordering};

use tetrarch_engine::{Segment, SegmentTable};

/// RFLAGS bits (Intel SDM 1, 3.4.3).
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// What holds events back for one instruction; bits of [`CpuState::shadow`].
pub mod shadow {
    pub const MOV_SS: u8 = 1;
    pub const STI: u8 = 2;
}

/// Control register and EFER bits (Intel SDM 3A, 2.5; AMD APM 2, 3.1.7).
pub mod cr {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1 << 0;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const EFER_FFXSR: u64 = 1 << 14;
}

/// Indices into [`CpuState::seg`].
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDT: usize = 6;
    pub const TR: usize = 7;
}

/// Indices into [`CpuState::gpr`].
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// What other threads may write while the vCPU runs.
#[derive(Default)]
#[repr(C, align(64))]
pub struct Shared {
    /// Something wants the run loop's attention: polled by translated code.
    pub request: AtomicU8,
    /// An interrupt waits for IF: polled where translated code sets IF.
    pub irq_wait: AtomicU8,
}

impl Shared {
    /// Has the vCPU come to its run loop.
    #[inline]
    pub fn raise(&self) {
        self.request.store(1, Ordering::SeqCst);
    }
}

/// The page that accesses through rsp were last made to.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct StackPage {
    pub page: u64,
    pub host: u64,
}

impl StackPage {
    /// Matches no access but one to a non-canonical address, which then faults
    /// on the host and is found out there.
    pub const NONE: Self = Self { page: 1 << 63, host: 1 << 63 };
}

/// One vector register: YMM, low quadword first.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C, align(32))]
pub struct Ymm(pub [u64; 4]);

/// The 512-byte FXSAVE image.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FxImage(pub [u8; 512]);

/// Of an FXSAVE image: FOP, FIP with its selector, FDP with its selector.
pub const FX_POINTERS: std::ops::Range<usize> = 6..24;

/// What a thunk ran last; see [`crate::cpu::x87_pointers`].
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct LastThunk {
    /// The low half of its address; 0: none.
    pub host: u32,
    pub instruction: u64,
    pub data: u64,
}

/// Two for each arithmetic flag, and for an instruction that replaces some.
pub const FLAG_OPERANDS: usize = 16;

#[derive(Clone)]
#[repr(C, align(4096))]
pub struct CpuState {
    pub gpr: [u64; 16],
    pub rip: u64,
    /// RFLAGS without IF, which has a byte of its own so that CLI and STI are
    /// one store that leaves the arithmetic flags alone.
    pub flags: u64,
    pub iflag: u8,
    /// Why the next instruction runs without interrupts; bits of [`shadow`].
    pub shadow: u8,
    pub cpl: u8,
    pub nmi_blocked: u8,
    pub halted: u8,
    /// Whether the guest may use AVX (CR4.OSXSAVE and `XCR0[2:1]` = 3).
    pub avx: u8,
    /// The mode word by which translations are keyed; see [`mode`].
    pub mode: u32,
    /// The mode words that the tables of branch targets are for: of kernel and of user mode.
    pub branch_modes: [u32; 2],
    /// [`reach`] of ES to GS, in 32-bit code that is translated.
    pub reach: [u64; 6],
    /// Arithmetic flags saved around a memory access: AH by LAHF, AL by SETO.
    pub saved_flags: u32,
    /// Operands of instructions whose flags may have to be made again; see
    /// [`crate::translate::sources`].
    pub flag_operands: [u64; FLAG_OPERANDS],
    /// Which exit of which block left translated code.
    pub site: u32,
    pub exit_kind: u32,
    /// An indirect branch target, or the host address of a failed access.
    pub address: u64,
    /// Host RFLAGS when translated code was left.
    pub exit_flags: u64,
    pub scratch: [u64; 4],
    /// [`Self::count`] less the limit: code that counts begins no block that takes it above zero.
    pub beyond_limit: i64,
    pub count_limit: u64,
    /// Where the relative code that runs is mapped; see [`mode::RELATIVE`].
    pub code_page: u64,
    /// The same of the last such code with an x87 instruction.
    pub x87_page: u64,
    /// Where an indirect call goes while its return address is pushed.
    pub call_target: u64,
    /// 4096 less the size of an access through rsp that missed.
    pub stack_limit: u64,
    pub host_rsp: u64,
    /// RSP of translated code: the address of this state.
    pub code_rsp: u64,
    /// The [`crate::cpu::Cpu`] that owns this state, for calls out of translated code.
    pub cpu: u64,
    pub host_mxcsr: u32,
    /// The guest's MXCSR while Rust code runs.
    pub mxcsr: u32,
    /// The host's x87 control word while the guest's x87 state is loaded.
    pub host_fcw: u32,
    /// The guest's x87 state is in the host CPU, not in `fx`.
    pub fpu_loaded: u32,
    /// It stays there once it is: inside [`crate::cpu::fpu::enter`] and `leave`.
    pub fpu_stays: u32,
    pub seg: [Segment; 8],
    pub gdt: SegmentTable,
    pub idt: SegmentTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub dr: [u64; 8],
    /// Causes, as in DR6, of a #DB that comes before the next instruction, or
    /// behind it where MOV SS or POP SS holds it back.
    pub pending_debug: u64,
    pub tsc_offset: u64,
    pub tsc_aux: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    /// Any upper half in `vec` is not zero; see [`CpuState::note_upper_halves`].
    pub upper_halves: u32,
    /// Vector registers while Rust code runs.
    pub vec: [Ymm; 16],
    /// x87, MXCSR (and room for XMM) while the host's own FPU state is loaded.
    pub fx: FxImage,
    /// Where the native executor puts memory operands.
    pub bounce: [u64; 16],
    pub last_thunk: LastThunk,
}

/// A limit is at most so far away that what is missing is a signed number.
const MOST_AHEAD: u64 = 1 << 62;

impl CpuState {
    /// Instructions, iterations of a REP prefix that ran together, and ways into a handler that
    /// are done. Exact whenever Rust code of the run loop runs, where the machine counts.
    pub fn count(&self) -> u64 {
        self.count_limit.wrapping_add_signed(self.beyond_limit)
    }

    pub fn count_one(&mut self) {
        self.beyond_limit = self.beyond_limit.wrapping_add(1);
    }

    /// Of what was counted so much is not done.
    pub fn uncount(&mut self, left: u8) {
        self.beyond_limit = self.beyond_limit.wrapping_sub(left.into());
    }

    /// Begins to count anew.
    pub fn clear_count(&mut self) {
        (self.beyond_limit, self.count_limit) = (0, 0);
    }

    pub fn set_count_limit(&mut self, limit: u64) {
        let count = self.count();
        self.count_limit = limit.min(count.saturating_add(MOST_AHEAD));
        self.beyond_limit = count.wrapping_sub(self.count_limit) as i64;
    }

    /// RFLAGS as the guest sees it.
    #[inline]
    pub fn rflags(&self) -> u64 {
        self.flags | u64::from(self.iflag) << 9
    }

    #[inline]
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = value & !flag::IF | flag::FIXED;
        self.iflag = (value >> 9 & 1) as u8;
    }

    /// Tells the stubs whether to load YMM or only XMM registers. A CPU whose
    /// upper halves were written, with zeros even, keeps them through every SSE
    /// instruction, which makes each depend on its destination's old value.
    #[inline]
    pub fn note_upper_halves(&mut self) {
        let used = self.vec.iter().fold(0, |used, ymm| used | ymm.0[2] | ymm.0[3]);
        self.upper_halves = u32::from(used != 0);
    }

    /// Replaces the arithmetic flags in `mask` by those of `value`.
    #[inline]
    pub fn update_flags(&mut self, mask: u64, value: u64) {
        self.flags = self.flags & !mask | value & mask;
    }

    /// The arithmetic flags that translated code has put aside.
    pub fn flags_aside(&self) -> u64 {
        let packed = u64::from(self.saved_flags);
        packed >> 8 & 0xD5 | (packed & 1) << 11
    }

    #[inline]
    pub fn long_mode(&self) -> bool {
        self.efer & cr::EFER_LMA != 0
    }

    /// 64-bit mode: long mode with CS.L.
    #[inline]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[seg::CS].attributes & attr::L != 0
    }

    #[inline]
    pub fn protected(&self) -> bool {
        self.cr0 & cr::CR0_PE != 0
    }

    #[inline]
    pub fn vm86(&self) -> bool {
        self.flags & flag::VM != 0
    }

    /// Whether this is 32-bit code that the translator takes: protected mode or compatibility
    /// mode, with code and stack in segments that are the whole linear space.
    pub fn flat_code32(&self) -> bool {
        let code = &self.seg[seg::CS];
        let stack = &self.seg[seg::SS];
        self.protected()
            && !self.vm86()
            && !self.code64()
            && code.attributes & attr::DB != 0
            && (code.base, code.limit) == (0, u32::MAX)
            && stack.attributes & attr::DB != 0
            && is_flat(stack)
    }

    /// Width of addresses and of RIP: 16, 32 or 64 bits.
    #[inline]
    pub fn code_bits(&self) -> u32 {
        if self.code64() {
            64
        } else if self.seg[seg::CS].attributes & attr::DB != 0 {
            32
        } else {
            16
        }
    }
}

/// Bits of the mode word: all that the meaning of code bytes depends on.
pub mod mode {
    pub const USER: u32 = 1 << 0;
    /// The translator takes this mode; all others are interpreted.
    pub const TRANSLATE: u32 = 1 << 1;
    /// x87 instructions run (CR0.EM and CR0.TS clear).
    pub const FPU: u32 = 1 << 2;
    /// SSE instructions run (FPU and CR4.OSFXSR).
    pub const SSE: u32 = 1 << 3;
    pub const AVX: u32 = 1 << 4;
    /// RDTSC runs in user mode.
    pub const TSC: u32 = 1 << 6;
    pub const FSGSBASE: u32 = 1 << 7;
    /// SYSCALL and SYSRET run in translated code (EFER.SCE, and no trap of them).
    pub const SYSCALL: u32 = 1 << 8;
    /// Of translations alone: user code translated without its linear address, which
    /// [`CpuState::code_page`](super::CpuState::code_page) has instead. So one translation of a
    /// library serves all processes, wherever they have it.
    pub const RELATIVE: u32 = 1 << 9;
    /// 32-bit code: see [`CpuState::flat_code32`](super::CpuState::flat_code32).
    pub const CODE32: u32 = 1 << 10;
    /// In 32-bit code: DS, ES is the whole linear space, so that no access needs a look at it.
    pub const FLAT_DS: u32 = 1 << 11;
    pub const FLAT_ES: u32 = 1 << 12;
}

/// How many bytes from its start can be read and written in a segment of protected mode. None
/// of one that only the interpreter can judge: read-only, code, expand-down.
pub fn reach(segment: &Segment) -> u64 {
    const LOOKED_AT: u32 = attr::UNUSABLE | attr::P | attr::S | attr::CODE | attr::DC | attr::RW;
    if segment.attributes & LOOKED_AT == attr::P | attr::S | attr::RW {
        u64::from(segment.limit) + 1
    } else {
        0
    }
}

/// Whether it is the whole linear space, to read and to write.
pub fn is_flat(segment: &Segment) -> bool {
    segment.base == 0 && reach(segment) == 1 << 32
}

/// Bits of [`Segment::attributes`].
pub mod attr {
    pub const TYPE: u32 = 0xF;
    pub const ACCESSED: u32 = 1;
    /// Data: writable. Code: readable.
    pub const RW: u32 = 2;
    /// Data: expand down. Code: conforming.
    pub const DC: u32 = 4;
    pub const CODE: u32 = 8;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

/// The bits of an operand of `size` bytes.
#[inline]
pub fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

#[cfg(test)]
mod tests {
    use tetrarch_memory::GuestMemory;

    use super::MOST_AHEAD;
    use crate::cpu::{Cpu, VmShared};

    #[test]
    fn a_count_is_the_same_under_any_limit() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut cpu = Cpu::new(0, VmShared::alone(memory)).unwrap();
        let st = &mut *cpu.st;
        st.clear_count();
        st.count_one();
        for limit in [u64::MAX, 0, 1, 2, MOST_AHEAD + 1, u64::MAX] {
            st.set_count_limit(limit);
            assert_eq!(st.count(), 1, "{limit:#x}");
            assert_eq!(st.beyond_limit > 0, limit == 0, "{limit:#x}");
        }
        st.uncount(1);
        assert_eq!(st.count(), 0);
    }
}
