//! Where the last x87 instruction stood: FOP, FIP and FDP (Intel SDM 1, 8.1.8).
//!
//! x87 instructions run as copies, so the host CPU's pointers lead to translated
//! code or a thunk, and to guest memory where the host has it or the bounce
//! buffer. Nothing is recorded while they run translated. [`settle`] puts the
//! guest's pointers in place of the host's: before an instruction stores them,
//! before translations go, and before the guest's x87 state leaves the CPU. What
//! cannot be told (the page of an operand that the TLB no longer has) is zero.
//!
//! AMD's CPUs save and restore them only with an exception pending, so there the
//! host's kernel loses them whenever it switches threads, as a guest's own kernel
//! does. The selectors are zero, as CPUID says (leaf 7, EBX bit 13).

use std::arch::asm;
use std::mem::offset_of;

use crate::cpu::Cpu;
use crate::cpu::fpu::FX_POINTERS;
use crate::cpu::state::{CpuState, FxImage, seg};

/// Finds guest instructions by the low half of a host address in their translation.
pub trait CodePlaces: Send + Sync {
    fn rip_of(&self, host: u32) -> Option<u64>;
}

/// The guest's pointers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Pointers {
    pub opcode: u16,
    pub instruction: u64,
    pub data: u64,
}

/// What a thunk ran last.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct LastThunk {
    /// The low half of its address; 0: none.
    host: u32,
    instruction: u64,
    data: u64,
}

/// An environment as FNSTENV stores it in 64-bit code.
#[derive(Clone, Copy)]
#[repr(C)]
struct Environment {
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

/// Makes the host CPU's pointers the guest's, and [`CpuState::fx`] hold them.
pub fn settle(cpu: &mut Cpu) {
    if cpu.st.fpu_loaded == 0 {
        return;
    }
    let places = cpu.places.clone();
    let found = resolve(
        &cpu.st,
        |host| places.as_ref().and_then(|places| places.rip_of(host)),
        |host| cpu.tlb.linear_of(host),
    );
    let Found::New(mut new, environment) = found else { return };
    new.opcode = opcode_at(cpu, new.instruction, new.opcode);
    write(&mut cpu.st, new, environment);
}

/// The same where nothing but thunks can have run.
pub fn settle_thunks(st: &mut CpuState) {
    if let Found::New(new, environment) = resolve(st, |_| None, |_| None) {
        write(st, new, environment);
    }
}

enum Found {
    Unchanged,
    New(Pointers, Environment),
}

fn resolve(
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

fn write(st: &mut CpuState, new: Pointers, mut environment: Environment) {
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

/// The opcode of the guest's instruction: the copy that ran may have another
/// operand. `host` is the copy's.
fn opcode_at(cpu: &Cpu, instruction: u64, host: u16) -> u16 {
    let mut bytes = [0; 15];
    let base = if cpu.st.code64() { 0 } else { cpu.st.seg[seg::CS].base };
    let len = cpu.peek(base.wrapping_add(instruction), &mut bytes);
    let bytes = &bytes[..len];
    // Legacy prefixes and REX (Intel SDM 2A, 2.1.1 and 2.2.1).
    let prefix = |byte: &u8| {
        matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
            || cpu.st.code64() && byte & 0xF0 == 0x40
    };
    let start = bytes.iter().position(|byte| !prefix(byte)).unwrap_or(len);
    match bytes[start..] {
        [first, modrm, ..] => {
            let opcode = u16::from(first & 7) << 8 | u16::from(modrm);
            // Another page may be mapped there by now.
            let same = first & 0xF8 == 0xD8 && (opcode ^ host) & 0x738 == 0;
            if same { opcode } else { host }
        }
        _ => host,
    }
}
