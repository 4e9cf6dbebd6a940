//! Hardware breakpoints (SDM 3B, 17.2): instruction breakpoints are faults before
//! the instruction, data and port breakpoints traps behind it.
//!
//! There are two sets of them, the guest's and that of the host's debugger. Only
//! reached while one of them is enabled; translated code never runs then.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use tetrarch_engine::{DebugStop, Exit};

use super::operand::{op_size, read_reg, segment_index, string_address_size};
use crate::cpu::Cpu;
use crate::state::fault::{R, Stop};
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

/// Breakpoints as DR0 to DR3 and DR7 have them.
#[derive(Clone, Copy)]
pub struct Breakpoints {
    addresses: [u64; 4],
    dr7: u64,
}

impl Breakpoints {
    pub fn of_guest(cpu: &Cpu) -> Self {
        let dr = &cpu.st.dr;
        Self { addresses: [dr[0], dr[1], dr[2], dr[3]], dr7: dr[7] }
    }

    pub fn of_debugger(cpu: &Cpu) -> Self {
        let (addresses, dr7) = cpu.debugger.registers();
        Self { addresses, dr7 }
    }

    /// (number, R/W, first byte, bytes) of each enabled breakpoint.
    fn enabled(&self) -> impl Iterator<Item = (usize, u64, u64, u64)> + '_ {
        (0..4).filter(move |n| self.dr7 >> (n * 2) & 3 != 0).map(move |n| {
            let field = self.dr7 >> (16 + n * 4);
            let len = [1, 2, 8, 4][(field >> 2 & 3) as usize];
            // The low bits of the address do not count (SDM 3A, 17.2.5).
            (n, field & 3, self.addresses[n] & !(len - 1), len)
        })
    }

    /// DR6 bits of the instruction breakpoints at CS:RIP.
    pub fn instruction_hits(&self, cpu: &Cpu) -> u64 {
        let linear = linear_rip(cpu);
        self.enabled()
            .filter(|&(n, kind, _, _)| kind == EXECUTE && self.addresses[n] == linear)
            .fold(0, |hits, (n, ..)| hits | 1 << n)
    }

    /// DR6 bits of the data breakpoints that the accesses met.
    pub fn data_hits(&self, accesses: &Accesses) -> u64 {
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
        self.enabled()
            .filter(|&(_, watched, first, len)| meets(watched, first, len))
            .fold(0, |hits, (n, ..)| hits | 1 << n)
    }
}

/// Whether instructions are to be looked at for breakpoints of either set.
#[inline]
pub fn watching(cpu: &Cpu) -> bool {
    cpu.st.dr[7] & DR7_ENABLE != 0 || cpu.debugger.watches()
}

/// Whether each iteration of a REP prefix is looked at by itself. In a recording those that ran
/// together are one instruction, and stay one in its replay.
pub fn stops_within(cpu: &Cpu) -> bool {
    cpu.st.dr[7] & DR7_ENABLE != 0 || cpu.debugger.watches() && cpu.vm.journal.is_none()
}

pub fn linear_rip(cpu: &Cpu) -> u64 {
    if cpu.st.code64() {
        return cpu.st.rip;
    }
    cpu.st.rip.wrapping_add(cpu.st.seg[seg::CS].base) & 0xFFFF_FFFF
}

/// Leaves the guest where a breakpoint of the debugger's is at CS:RIP.
pub fn stop_before(cpu: &Cpu) -> R<()> {
    match Breakpoints::of_debugger(cpu).instruction_hits(cpu) {
        0 => Ok(()),
        hits => stop(DebugStop::Hardware { hits: hits as u8 }),
    }
}

/// Leaves the guest behind an instruction that has met data breakpoints of the
/// debugger's. The guest's own trap then waits until it runs on.
pub fn stop_behind(cpu: &mut Cpu, accesses: &Accesses, trap: R<()>) -> R<()> {
    let hits = Breakpoints::of_debugger(cpu).data_hits(accesses);
    if hits == 0 {
        return trap;
    }
    if let Err(Stop::Fault(fault)) = trap {
        cpu.st.pending_debug |= fault.address;
    }
    stop(DebugStop::Hardware { hits: hits as u8 })
}

fn stop(why: DebugStop) -> R<()> {
    Err(Stop::Exit(Exit::Debug(why)))
}

/// An INT3 may be the debugger's; the answer to the exit tells.
pub fn ask_whose_int3(cpu: &mut Cpu) -> R<()> {
    if cpu.debugger.software {
        let linear = linear_rip(cpu);
        cpu.replay.ask_platform(Exit::Debug(DebugStop::Software { linear }))?;
    }
    Ok(())
}

impl Accesses {
    /// So many iterations of a REP prefix ran together, not one.
    pub fn repeat(&mut self, iterations: u64, backward: bool) {
        for access in &mut self.0 {
            let more = access.size.wrapping_mul(iterations.saturating_sub(1));
            access.size = access.size.wrapping_add(more);
            if backward {
                access.first = access.first.wrapping_sub(more);
            }
        }
    }
}

/// How often an instruction is still to be repeated.
pub fn repetitions(cpu: &Cpu, i: &Instruction) -> u64 {
    cpu.st.gpr[reg::RCX] & mask(string_address_size(i))
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

/// A string instruction with REP.
pub fn repeats(i: &Instruction) -> bool {
    i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// REP with a count of 0.
fn ends_at_once(cpu: &Cpu, i: &Instruction) -> bool {
    repeats(i) && repetitions(cpu, i) == 0
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
