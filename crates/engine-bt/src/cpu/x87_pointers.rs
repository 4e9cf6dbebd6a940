//! Where the last x87 instruction stood: FOP, FIP and FDP (Intel SDM 1, 8.1.8).
//!
//! x87 instructions run as copies, so the host CPU's pointers lead to translated
//! code or a thunk, and to guest memory where the host has it or the bounce
//! buffer. Nothing is recorded while they run translated.
//! [`Cpu::settle_x87_pointers`](crate::cpu::Cpu::settle_x87_pointers) puts the guest's pointers in place of the host's: before an instruction stores them,
//! before translations go, and before the guest's x87 state leaves the CPU. What
//! cannot be told (the page of an operand that the TLB no longer has) is zero.
//!
//! AMD's CPUs save and restore them only with an exception pending, so there the
//! host's kernel loses them whenever it switches threads, as a guest's own kernel
//! does. The selectors are zero, as CPUID says (leaf 7, EBX bit 13).

use std::arch::asm;
use std::mem::offset_of;

use crate::state::{CpuState, FX_POINTERS, FxImage, LastThunk};

/// Finds guest instructions by the low half of a host address in their translation, and
/// by their page where that is relative.
pub trait CodePlaces: Send + Sync {
    fn rip_of(&self, host: u32, page: u64) -> Option<u64>;
}

/// The guest's pointers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Pointers {
    pub opcode: u16,
    pub instruction: u64,
    pub data: u64,
}

/// An environment as FNSTENV stores it in 64-bit code.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Environment {
    words: [u32; 3],
    instruction: u32,
    selector: u16,
    opcode: u16,
    data: u32,
    data_selector: u32,
}

/// Of the last opcode: three bits of the first byte, and ModRM.
const OPCODE: u16 = 0x7FF;

impl Pointers {
    pub fn of(image: &FxImage) -> Self {
        let quad = |at: usize| {
            image.0[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        let at = FX_POINTERS.start;
        let opcode = u16::from_le_bytes([image.0[at], image.0[at + 1]]) & OPCODE;
        Self { opcode, instruction: quad(at + 2), data: quad(at + 10) }
    }

    /// In canonical form, which the host CPU may insist on.
    pub fn put(self, image: &mut FxImage) {
        let canonical = |address: u64| ((address << 16) as i64 >> 16) as u64;
        let part = &mut image.0[FX_POINTERS];
        part[..2].copy_from_slice(&(self.opcode & OPCODE).to_le_bytes());
        part[2..10].copy_from_slice(&canonical(self.instruction).to_le_bytes());
        part[10..].copy_from_slice(&canonical(self.data).to_le_bytes());
    }
}

/// Notes that a thunk has run an instruction, and where its operand in memory is.
pub fn ran_thunk(st: &mut CpuState, thunk: usize, instruction: u64, data: Option<u64>) {
    let data = data.unwrap_or(st.last_thunk.data);
    st.last_thunk = LastThunk { host: thunk as u32, instruction, data };
}

/// Makes the host CPU's pointers the guest's, where nothing but thunks can have run.
pub fn settle_thunks(st: &mut CpuState) {
    if let Found::New(new, environment) = resolve(st, |_| None, |_| None) {
        write(st, new, environment);
    }
}

/// What the host CPU's pointers are the guest's of.
pub(super) enum Found {
    Unchanged,
    New(Pointers, Environment),
}

/// Reads the host CPU's pointers. Masks all x87 exceptions where they are new:
/// [`write()`] must follow.
pub(super) fn resolve(
    st: &CpuState,
    rip_of: impl Fn(u32) -> Option<u64>,
    linear_of: impl Fn(u32) -> Option<u64>,
) -> Found {
    let host = environment();
    let known = Pointers::of(&st.fx);
    let same = (host.instruction, host.data) == (known.instruction as u32, known.data as u32)
        && host.opcode & OPCODE == known.opcode;
    if same {
        load(&host);
        return Found::Unchanged;
    }
    let thunk = st.last_thunk;
    let by_thunk = thunk.host != 0 && host.instruction == thunk.host;
    let instruction = match host.instruction {
        0 => 0,
        _ if by_thunk => thunk.instruction,
        low if low == known.instruction as u32 => known.instruction,
        low => rip_of(low).unwrap_or(0),
    };
    // AMD's CPUs leave the segment's base out.
    let bounce = offset_of!(CpuState, bounce) as u32;
    let base = (&raw const *st) as u32;
    let data = match host.data {
        0 => 0,
        low if low == bounce || low == base.wrapping_add(bounce) => thunk.data,
        low if low == known.data as u32 => known.data,
        low => linear_of(low).unwrap_or(0),
    };
    Found::New(Pointers { opcode: host.opcode & OPCODE, instruction, data }, host)
}

/// Brings the guest's pointers into the host CPU and the image.
pub(super) fn write(st: &mut CpuState, new: Pointers, mut environment: Environment) {
    new.put(&mut st.fx);
    st.last_thunk = LastThunk::default();
    environment.instruction = new.instruction as u32;
    environment.selector = 0;
    environment.opcode = new.opcode;
    environment.data = new.data as u32;
    environment.data_selector = 0;
    load(&environment);
}

/// The host CPU's environment. Masks all exceptions: [`load`] must follow.
fn environment() -> Environment {
    let mut environment = Environment {
        words: [0; 3],
        instruction: 0,
        selector: 0,
        opcode: 0,
        data: 0,
        data_selector: 0,
    };
    // SAFETY: stores 28 bytes to a local, and raises nothing.
    unsafe { asm!("fnstenv [{}]", in(reg) &raw mut environment, options(nostack)) };
    environment
}

fn load(environment: &Environment) {
    // SAFETY: reads 28 bytes of a local. Without FNCLEX a pending exception would
    // be raised; the environment brings it back.
    unsafe {
        asm!("fnclex", "fldenv [{}]", in(reg) &raw const *environment, options(nostack));
    }
}
