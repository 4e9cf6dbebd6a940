//! Hardware breakpoints (SDM 3A, 17.2): instruction breakpoints are faults before
//! the instruction, data breakpoints traps behind it.
//!
//! Only reached while DR7 enables one; translated code never runs then.

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, Register};

use super::operand::{read_reg, segment_index};
use crate::cpu::Cpu;
use crate::cpu::state::seg;

/// Any of L0-L3 and G0-G3 in DR7.
pub const DR7_ENABLE: u64 = 0xFF;
/// R/W fields of DR7.
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const READ_WRITE: u64 = 3;

/// An access that the instruction is going to make.
struct DataAccess {
    linear: u64,
    size: u64,
    write: bool,
}

/// The accesses of one instruction, taken before it runs.
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
    let mut factory = InstructionInfoFactory::new();
    let accesses = factory.info(i).used_memory().iter().filter_map(|used| {
        let write = match used.access() {
            OpAccess::Read | OpAccess::CondRead => false,
            OpAccess::None | OpAccess::NoMemAccess => return None,
            _ => true,
        };
        let linear = used.virtual_address(0, value)?;
        let linear = if long { linear } else { linear & 0xFFFF_FFFF };
        Some(DataAccess { linear, size: used.memory_size().size().max(1) as u64, write })
    });
    Accesses(accesses.collect())
}

/// DR6 bits of the data breakpoints that the accesses met.
pub fn data_hits(cpu: &Cpu, accesses: &Accesses) -> u64 {
    let meets = |kind, first: u64, len: u64| {
        accesses.0.iter().any(|a| {
            let kinds = kind == READ_WRITE || kind == WRITE && a.write;
            kinds && a.linear < first.wrapping_add(len) && first < a.linear.wrapping_add(a.size)
        })
    };
    enabled(cpu)
        .filter(|&(_, kind, first, len)| meets(kind, first, len))
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}
