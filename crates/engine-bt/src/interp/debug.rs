//! Hardware breakpoints (SDM 3B, 17.2): instruction breakpoints are faults before
//! the instruction, data and port breakpoints traps behind it.
//!
//! Only reached while DR7 enables one; translated code never runs then.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::operand::{op_size, read_reg, segment_index, string_address_size};
use crate::cpu::Cpu;
use crate::state::mask;
use crate::state::{cr, reg, seg};

/// Any of L0-L3 and G0-G3 in DR7.
pub const DR7_ENABLE: u64 = 0xFF;
/// R/W fields of DR7.
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Port,
}

/// An access that the instruction is going to make.
struct DataAccess {
    first: u64,
    size: u64,
    kind: Kind,
}

/// The accesses of one instruction or iteration, taken before it runs.
pub struct Accesses(Vec<DataAccess>);

/// (number, R/W, first byte, bytes) of each enabled breakpoint.
fn enabled(cpu: &Cpu) -> impl Iterator<Item = (usize, u64, u64, u64)> + '_ {
    let dr7 = cpu.st.dr[7];
    (0..4).filter(move |n| dr7 >> (n * 2) & 3 != 0).map(move |n| {
        let field = dr7 >> (16 + n * 4);
        let len = [1, 2, 8, 4][(field >> 2 & 3) as usize];
        // The low bits of the address do not count (SDM 3A, 17.2.5).
        (n, field & 3, cpu.st.dr[n] & !(len - 1), len)
    })
}

/// DR6 bits of the instruction breakpoints at CS:RIP.
pub fn instruction_hits(cpu: &Cpu) -> u64 {
    let mut linear = cpu.st.rip;
    if !cpu.st.code64() {
        linear = linear.wrapping_add(cpu.st.seg[seg::CS].base) & 0xFFFF_FFFF;
    }
    enabled(cpu)
        .filter(|&(n, kind, _, _)| kind == EXECUTE && cpu.st.dr[n] == linear)
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}

/// What the instruction is going to access, the stack included.
pub fn accesses(cpu: &Cpu, i: &Instruction) -> Accesses {
    let long = cpu.st.code64();
    let value = |r: Register, _: usize, _: usize| {
        if !r.is_segment_register() {
            return r.is_gpr().then(|| read_reg(cpu, r));
        }
        let flat = long && !matches!(r, Register::FS | Register::GS);
        Some(if flat { 0 } else { cpu.st.seg[segment_index(r)].base })
    };
    if ends_at_once(cpu, i) {
        return Accesses(Vec::new());
    }
    let mut factory = InstructionInfoFactory::new();
    let memory = factory.info(i).used_memory().iter().filter_map(|used| {
        let kind = match used.access() {
            OpAccess::Read | OpAccess::CondRead => Kind::Read,
            OpAccess::None | OpAccess::NoMemAccess => return None,
            _ => Kind::Write,
        };
        let linear = used.virtual_address(0, value)?;
        let first = if long { linear } else { linear & 0xFFFF_FFFF };
        // The decoder does not say how much a REP prefix moves; it is an element
        // at a time.
        let size = match used.memory_size().size() {
            0 => i.memory_size().size().max(1),
            size => size,
        };
        Some(DataAccess { first, size: size as u64, kind })
    });
    Accesses(memory.chain(port_access(cpu, i)).collect())
}

/// REP with a count of 0.
fn ends_at_once(cpu: &Cpu, i: &Instruction) -> bool {
    let repeats = i.has_rep_prefix() || i.has_repne_prefix();
    let width = string_address_size(i);
    repeats && i.is_string_instruction() && cpu.st.gpr[reg::RCX] & mask(width) == 0
}

/// The ports of IN, OUT and their kin, which CR4.DE lets breakpoints watch.
fn port_access(cpu: &Cpu, i: &Instruction) -> Option<DataAccess> {
    if cpu.st.cr4 & cr::CR4_DE == 0 {
        return None;
    }
    let (port, data) = match i.mnemonic() {
        Mnemonic::In => (1, 0),
        Mnemonic::Out => (0, 1),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => (1, 0),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => (0, 1),
        _ => return None,
    };
    let first = match i.op_kind(port) {
        OpKind::Register => cpu.st.gpr[reg::RDX] & 0xFFFF,
        _ => u64::from(i.immediate8()),
    };
    Some(DataAccess { first, size: op_size(i, data) as u64, kind: Kind::Port })
}

/// DR6 bits of the data breakpoints that the accesses met.
pub fn data_hits(cpu: &Cpu, accesses: &Accesses) -> u64 {
    let meets = |watched, first: u64, len: u64| {
        accesses.0.iter().any(|a| {
            let kinds = match a.kind {
                Kind::Read => watched == READ_WRITE,
                Kind::Write => watched == READ_WRITE || watched == WRITE,
                Kind::Port => watched == PORT,
            };
            kinds && a.first < first.wrapping_add(len) && first < a.first.wrapping_add(a.size)
        })
    };
    enabled(cpu)
        .filter(|&(_, watched, first, len)| meets(watched, first, len))
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}
