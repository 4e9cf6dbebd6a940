//! Where the arithmetic flags come from that a memory check has clobbered.
//!
//! Flags that no later instruction needs are not put aside before a check, since
//! that would cost at every access. A fault, or a store that changes the code
//! they were dead by, must see them all the same. So they are made again then,
//! from the instruction of the block that produced them and its operands. Where
//! those are gone by the time of an access, the flags count as needed there.
//!
//! Flags from before the block are known where Rust entered it; they are not
//! followed through links (see docs/architecture.md).

use iced_x86::{
    Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::classify::Kind;
use super::liveness::{ALL, replaced};
use crate::cpu::Cpu;
use crate::interp::{alu, operand};
use crate::state::flag;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Add,
    Sub,
    Cmp,
    Test,
    /// AND, OR, XOR: the flags follow from the result.
    Logic,
    Inc,
    Dec,
    Neg,
    /// SUB or XOR of a register with itself.
    Zero,
    /// By a constant: what is rotated out stays in the result.
    Rol,
    Ror,
}

#[derive(Clone, Copy, Debug)]
enum Operand {
    Register(Register),
    Constant(u64),
}

/// How to make the flags of an instruction again after it has run.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    operation: Operation,
    size: usize,
    /// The first operand, as the instruction left it.
    first: Register,
    second: Operand,
}

impl Recipe {
    fn of(i: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let general = |op: u32| i.op_kind(op) == OpKind::Register && i.op_register(op).is_gpr();
        if i.op_count() == 0 || !general(0) {
            return None;
        }
        let first = i.op0_register();
        let second = match i.op_count() {
            1 => Operand::Constant(0),
            2 if general(1) => Operand::Register(i.op1_register()),
            // The result alone tells the flags: the second operand is not asked for.
            2 if matches!(i.mnemonic(), M::And | M::Or | M::Xor)
                && i.op1_kind() == OpKind::Memory =>
            {
                Operand::Constant(0)
            }
            2 if i.op1_kind() == OpKind::Memory || i.op1_kind() == OpKind::Register => return None,
            2 => Operand::Constant(i.immediate(1)),
            _ => return None,
        };
        let same = matches!(second, Operand::Register(second) if second == first);
        let overlap = matches!(second, Operand::Register(second)
            if second.full_register() == first.full_register());
        let operation = match i.mnemonic() {
            M::Sub | M::Xor if same => Operation::Zero,
            M::And | M::Or | M::Xor => Operation::Logic,
            M::Cmp => Operation::Cmp,
            M::Test => Operation::Test,
            M::Add if !overlap => Operation::Add,
            M::Sub if !overlap => Operation::Sub,
            M::Inc => Operation::Inc,
            M::Dec => Operation::Dec,
            M::Neg => Operation::Neg,
            M::Rol if first.size() >= 4 => Operation::Rol,
            M::Ror if first.size() >= 4 => Operation::Ror,
            _ => return None,
        };
        Some(Self { operation, size: first.size(), first, second })
    }

    fn needs(&self, full: Register) -> bool {
        let second = match (self.operation, self.second) {
            (Operation::Zero, _) => return false,
            (Operation::Logic | Operation::Rol | Operation::Ror, _) | (_, Operand::Constant(_)) => {
                Register::None
            }
            (_, Operand::Register(register)) => register.full_register(),
        };
        self.first.full_register() == full || second == full
    }

    fn flags(&self, cpu: &Cpu) -> u64 {
        let size = self.size;
        let first = operand::read_reg(cpu, self.first);
        let second = match self.second {
            Operand::Register(register) => operand::read_reg(cpu, register),
            Operand::Constant(value) => value,
        };
        match self.operation {
            Operation::Add => alu::add(size, first.wrapping_sub(second), second, false).1,
            Operation::Sub => alu::sub(size, first.wrapping_add(second), second, false).1,
            Operation::Cmp => alu::cmp(size, first, second),
            Operation::Test => alu::test(size, first, second),
            Operation::Logic => alu::and(size, first, first).1,
            Operation::Inc => alu::inc(size, first.wrapping_sub(1)).1,
            Operation::Dec => alu::dec(size, first.wrapping_add(1)).1,
            Operation::Neg => alu::neg(size, first.wrapping_neg()).1,
            Operation::Zero => alu::xor(size, 0, 0).1,
            // OF means something for a count of 1 (SDM 2B, RCL/RCR/ROL/ROR).
            Operation::Rol => {
                let carry = first & 1;
                let top = first >> (size * 8 - 1) & 1;
                carry | (top ^ carry) << 11
            }
            Operation::Ror => {
                let carry = first >> (size * 8 - 1) & 1;
                let below = first >> (size * 8 - 2) & 1;
                carry | (carry ^ below) << 11
            }
        }
    }
}

struct Producer {
    /// The flags that are its own still, as iced counts them.
    flags: u32,
    /// `None`: they cannot be made again.
    recipe: Option<Recipe>,
}

/// Where the flags are from, at a place in a block.
pub struct Sources {
    producers: Vec<Producer>,
    /// Flags that the block has not touched.
    entry: u32,
}

impl Sources {
    /// At the start of a block.
    pub fn new() -> Self {
        Self { producers: Vec::new(), entry: ALL }
    }

    /// Goes past an instruction.
    pub fn pass(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) {
        if self.producers.iter().any(|producer| producer.recipe.is_some()) {
            for used in info.info(i).used_registers() {
                if matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                    continue;
                }
                let full = used.register().full_register();
                for producer in &mut self.producers {
                    if producer.recipe.is_some_and(|recipe| recipe.needs(full)) {
                        producer.recipe = None;
                    }
                }
            }
        }
        let written = i.rflags_modified() & ALL;
        if written == 0 {
            return;
        }
        for producer in &mut self.producers {
            producer.flags &= !written;
        }
        self.producers.retain(|producer| producer.flags != 0);
        self.entry &= !written;
        // One that keeps the flags sometimes has none of its own to tell.
        let recipe = if replaced(i) == written { Recipe::of(i) } else { None };
        self.producers.push(Producer { flags: written, recipe });
    }

    /// Flags of the block that cannot be made again here.
    fn lost(&self) -> u32 {
        self.producers
            .iter()
            .filter(|producer| producer.recipe.is_none())
            .fold(0, |lost, producer| lost | producer.flags)
    }

    /// Brings back the flags in `wanted`. `entry` is those before the block, where
    /// they are known.
    pub fn restore(&self, cpu: &mut Cpu, wanted: u32, entry: Option<u64>) {
        if let Some(entry) = entry {
            cpu.st.update_flags(rflags(self.entry & wanted), entry);
        }
        for producer in &self.producers {
            if let Some(recipe) = producer.recipe {
                let flags = recipe.flags(cpu);
                cpu.st.update_flags(rflags(producer.flags & wanted), flags);
            }
        }
    }
}

/// Flags as iced counts them, as bits of RFLAGS.
fn rflags(flags: u32) -> u64 {
    [
        (RflagsBits::CF, flag::CF),
        (RflagsBits::PF, flag::PF),
        (RflagsBits::AF, flag::AF),
        (RflagsBits::ZF, flag::ZF),
        (RflagsBits::SF, flag::SF),
        (RflagsBits::OF, flag::OF),
    ]
    .into_iter()
    .filter(|(iced, _)| flags & iced != 0)
    .fold(0, |bits, (_, bit)| bits | bit)
}

/// Adds to `live` what must be put aside because it cannot be made again.
pub fn keep_lost(
    instructions: &[Instruction],
    kinds: &[Kind],
    live: &mut [u32],
    info: &mut InstructionInfoFactory,
) {
    let leaves = |(i, kind): (&Instruction, &Kind)| may_leave(i, *kind);
    let Some(last) = instructions.iter().zip(kinds).rposition(leaves) else { return };
    let mut sources = Sources::new();
    for (index, (i, kind)) in instructions.iter().zip(kinds).enumerate().take(last + 1) {
        if may_leave(i, *kind) {
            let mut lost = sources.lost() & !live[index];
            // Needed from its producer on, which is where it was lost to.
            let mut at = index;
            while lost != 0 {
                live[at] |= lost;
                let Some(before) = at.checked_sub(1) else { break };
                at = before;
                lost &= !replaced(&instructions[at]);
            }
        }
        sources.pass(i, info);
    }
}

/// Whether the instruction may leave translated code with nothing of it done.
fn may_leave(i: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Copy => {
            matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
                || (0..i.op_count()).any(|op| match i.op_kind(op) {
                    OpKind::Memory => true,
                    OpKind::Register => !i.op_register(op).is_gpr(),
                    _ => false,
                })
        }
        Kind::Push
        | Kind::Pop
        | Kind::Leave
        | Kind::Call
        | Kind::String { .. }
        | Kind::BitString
        | Kind::StoreSelector(_) => true,
        _ => false,
    }
}
