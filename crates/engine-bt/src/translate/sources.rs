//! Where the arithmetic flags come from that a memory check has clobbered.
//!
//! Flags that no later instruction needs are not put aside before a check, since
//! that would cost at every access. A fault, or a store that changes the code
//! they were dead by, must see them all the same. So they are made again then,
//! from the instruction that produced them and its operands. An operand that is
//! overwritten before the access is kept in a slot of the state, which costs one
//! store. Flags of an instruction without a recipe count as needed at the access.
//!
//! Flags from before the block are known too: a translation belongs to an
//! [`Origin`], and a link leads to the translation for what it brings.

use iced_x86::{
    Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::classify::Kind;
use super::liveness::{ALL, replaced};
use crate::cpu::{Cpu, fpu};
use crate::interp::{alu, muldiv, operand, shift};
use crate::state::{FLAG_OPERANDS, flag};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Operation {
    /// The first operand is the sum.
    Add,
    /// The first operand is the difference.
    Sub,
    /// The second operand is the first and what was added to it.
    AddTo,
    /// The second operand is the first less what was subtracted.
    SubTo,
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
    /// By a constant, of the operand before it.
    Shl,
    Shr,
    Sar,
    /// Of the operands before it.
    Imul,
    Bt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Operand {
    Register(Register),
    Constant(u64),
    /// In a slot as this register held it, or would.
    Kept(u8, Register),
}

impl Operand {
    fn value(self, cpu: &Cpu) -> u64 {
        match self {
            Self::Register(register) => operand::read_reg(cpu, register),
            Self::Constant(value) => value,
            Self::Kept(slot, register) => {
                let whole = cpu.st.flag_operands.get(usize::from(slot)).copied().unwrap_or(0);
                operand::part_of(whole, register)
            }
        }
    }

    fn is_in(self, full: Register) -> bool {
        matches!(self, Self::Register(register) if register.full_register() == full)
    }

    /// Goes over to a slot if it is in this register.
    fn keep(&mut self, full: Register, slot: u8) {
        if let Self::Register(register) = *self
            && register.full_register() == full
        {
            *self = Self::Kept(slot, register);
        }
    }
}

/// What goes into a slot before an instruction that it is needed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// A whole general register.
    Register(Register),
    /// The value of the instruction's memory operand.
    Memory,
}

#[derive(Clone, Copy, Debug)]
pub struct Keep {
    pub what: Kept,
    pub slot: u8,
    /// The flags that are made from it.
    pub flags: u32,
}

/// Slots, with those in use.
struct Slots<'a> {
    used: u32,
    keeps: &'a mut Vec<Keep>,
}

impl Slots<'_> {
    fn keep(&mut self, what: Kept) -> Option<u8> {
        let slot = self.used.trailing_ones();
        if slot as usize >= FLAG_OPERANDS {
            return None;
        }
        self.used |= 1 << slot;
        self.keeps.push(Keep { what, slot: slot as u8, flags: 0 });
        Some(slot as u8)
    }

    fn register(&mut self, register: Register) -> Option<Operand> {
        let slot = self.keep(Kept::Register(register.full_register()))?;
        Some(Operand::Kept(slot, register))
    }

    fn memory(&mut self, size: usize) -> Option<Operand> {
        let part = match size {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            8 => Register::RAX,
            _ => return None,
        };
        Some(Operand::Kept(self.keep(Kept::Memory)?, part))
    }
}

/// How to make the flags of an instruction again after it has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Recipe {
    operation: Operation,
    size: usize,
    /// As the instruction left it, where nothing else is said of the operation.
    first: Operand,
    second: Operand,
}

impl Recipe {
    fn of(i: &Instruction, slots: &mut Slots<'_>) -> Option<Self> {
        use Mnemonic as M;
        if i.op_count() == 0 {
            return None;
        }
        let mnemonic = i.mnemonic();
        let size = match i.op0_kind() {
            OpKind::Register if i.op0_register().is_gpr() => i.op0_register().size(),
            OpKind::Memory if matches!(mnemonic, M::Cmp | M::Test) => i.memory_size().size(),
            _ => return None,
        };
        let mut other = |op: u32| {
            Some(match i.op_kind(op) {
                OpKind::Register if i.op_register(op).is_gpr() => {
                    Operand::Register(i.op_register(op))
                }
                OpKind::Register => return None,
                OpKind::Memory if matches!(mnemonic, M::Cmp | M::Test) => slots.memory(size)?,
                // The result alone tells, or the result and what it was made from.
                OpKind::Memory => Operand::Constant(0),
                _ => Operand::Constant(i.immediate(op)),
            })
        };
        let first = other(0)?;
        let second = if i.op_count() > 1 { other(1)? } else { Operand::Constant(0) };
        let result = i.op0_register();
        let same = first == second;
        let overlap = second.is_in(result.full_register());
        let from_memory = i.op_count() > 1 && i.op1_kind() == OpKind::Memory;
        let (operation, first, second) = match mnemonic {
            M::Sub | M::Xor if same => {
                (Operation::Zero, Operand::Constant(0), Operand::Constant(0))
            }
            M::And | M::Or | M::Xor => (Operation::Logic, first, Operand::Constant(0)),
            M::Cmp => (Operation::Cmp, first, second),
            M::Test => (Operation::Test, first, second),
            M::Add if overlap || from_memory => (Operation::AddTo, slots.register(result)?, first),
            M::Sub if overlap || from_memory => (Operation::SubTo, slots.register(result)?, first),
            M::Add => (Operation::Add, first, second),
            M::Sub => (Operation::Sub, first, second),
            M::Inc => (Operation::Inc, first, second),
            M::Dec => (Operation::Dec, first, second),
            M::Neg => (Operation::Neg, first, second),
            M::Rol | M::Ror if size < 4 => return None,
            M::Rol if matches!(second, Operand::Constant(_)) => (Operation::Rol, first, second),
            M::Ror if matches!(second, Operand::Constant(_)) => (Operation::Ror, first, second),
            M::Shl | M::Sal | M::Shr | M::Sar if matches!(second, Operand::Constant(_)) => {
                let operation = match mnemonic {
                    M::Shr => Operation::Shr,
                    M::Sar => Operation::Sar,
                    _ => Operation::Shl,
                };
                (operation, slots.register(result)?, second)
            }
            M::Imul if i.op_count() > 1 && !from_memory => {
                let (mut a, mut b) = match i.op_count() {
                    2 => (first, second),
                    _ => (second, Operand::Constant(i.immediate(2))),
                };
                let full = result.full_register();
                if a.is_in(full) || b.is_in(full) {
                    let slot = slots.keep(Kept::Register(full))?;
                    a.keep(full, slot);
                    b.keep(full, slot);
                }
                (Operation::Imul, a, b)
            }
            M::Bt => (Operation::Bt, first, second),
            _ => return None,
        };
        Some(Self { operation, size, first, second })
    }

    fn needs(&self, full: Register) -> bool {
        self.first.is_in(full) || self.second.is_in(full)
    }

    fn slots(&self) -> u32 {
        [self.first, self.second].iter().fold(0, |slots, operand| match operand {
            Operand::Kept(slot, _) => slots | 1 << slot,
            _ => slots,
        })
    }

    fn flags(&self, cpu: &Cpu) -> u64 {
        let size = self.size;
        let (first, second) = (self.first.value(cpu), self.second.value(cpu));
        match self.operation {
            Operation::Add => alu::add(size, first.wrapping_sub(second), second, false).1,
            Operation::Sub => alu::sub(size, first.wrapping_add(second), second, false).1,
            Operation::AddTo => alu::add(size, first, second.wrapping_sub(first), false).1,
            Operation::SubTo => alu::sub(size, first, first.wrapping_sub(second), false).1,
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
            Operation::Shl => shift::shl(size, first, second, 0).1,
            Operation::Shr => shift::shr(size, first, second, 0).1,
            Operation::Sar => shift::sar(size, first, second, 0).1,
            Operation::Imul => muldiv::mul_signed(size, first, second).2,
            Operation::Bt => first >> (second % (size as u64 * 8)) & 1,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Producer {
    /// The flags that are its own still, as iced counts them.
    flags: u32,
    /// `None`: they cannot be made again.
    recipe: Option<Recipe>,
}

/// Where the flags are, at the entry of a block, that it does not need itself but
/// that a fault in it shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// All of them in `saved_flags`.
    Saved,
    /// Before the block: those of these producers are made again, the others are
    /// where the flags are that the block needs.
    Before(Box<[Producer]>),
}

/// Where the flags are from, at a place in a block.
#[derive(Clone)]
pub struct Sources {
    producers: Vec<Producer>,
    /// Flags that neither the block nor a producer before it has touched.
    entry: u32,
    /// Those are in `saved_flags`: the block has had none of its own to put there.
    saved: bool,
    /// What the last instruction passed had to be preceded by.
    keeps: Vec<Keep>,
}

impl Sources {
    /// At the start of a block.
    pub fn new(origin: &Origin) -> Self {
        match origin {
            Origin::Saved => {
                Self { producers: Vec::new(), entry: ALL, saved: true, keeps: Vec::new() }
            }
            Origin::Before(producers) => {
                let made = producers.iter().fold(0, |made, producer| made | producer.flags);
                let producers = producers.to_vec();
                Self { producers, entry: ALL & !made, saved: false, keeps: Vec::new() }
            }
        }
    }

    /// Goes past an instruction.
    pub fn pass(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) {
        self.keeps.clear();
        let recipes = self.producers.iter().filter_map(|producer| producer.recipe);
        // What is in use at the instruction stays: it may fault.
        let used = recipes.clone().fold(0, |used, recipe| used | recipe.slots());
        let any = recipes.count() != 0;
        let mut slots = Slots { used, keeps: &mut self.keeps };
        if any {
            for used in info.info(i).used_registers() {
                if matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                    continue;
                }
                let full = used.register().full_register();
                let mut slot = None;
                for producer in &mut self.producers {
                    let Some(recipe) = producer.recipe.as_mut().filter(|r| r.needs(full)) else {
                        continue;
                    };
                    slot = slot.or_else(|| slots.keep(Kept::Register(full)));
                    match slot {
                        Some(slot) => {
                            recipe.first.keep(full, slot);
                            recipe.second.keep(full, slot);
                        }
                        None => producer.recipe = None,
                    }
                }
            }
        }
        let written = i.rflags_modified() & ALL;
        if written != 0 {
            for producer in &mut self.producers {
                producer.flags &= !written;
            }
            self.producers.retain(|producer| producer.flags != 0);
            self.entry &= !written;
            self.saved = false;
            // One that keeps the flags sometimes has none of its own to tell.
            let recipe = if replaced(i) == written { Recipe::of(i, &mut slots) } else { None };
            self.producers.push(Producer { flags: written, recipe });
        }
        for keep in &mut self.keeps {
            keep.flags = self
                .producers
                .iter()
                .filter(|producer| producer.recipe.is_some_and(|r| r.slots() >> keep.slot & 1 != 0))
                .fold(0, |flags, producer| flags | producer.flags);
        }
    }

    /// Flags that cannot be made again here.
    pub fn lost(&self) -> u32 {
        let entry = if self.saved { 0 } else { self.entry };
        self.producers
            .iter()
            .filter(|producer| producer.recipe.is_none())
            .fold(entry, |lost, producer| lost | producer.flags)
    }

    /// Flags that are in `saved_flags` whether they are needed or not.
    pub fn saved(&self) -> u32 {
        if self.saved { self.entry } else { 0 }
    }

    /// What a block that is entered from here finds of these flags, where they are
    /// not needed.
    pub fn origin(&self, flags: u32) -> Origin {
        let made = self.producers.iter().filter(|producer| producer.recipe.is_some());
        let left = made.map(|producer| Producer { flags: producer.flags & flags, ..*producer });
        Origin::Before(left.filter(|producer| producer.flags != 0).collect())
    }

    /// Brings back the flags in `wanted`.
    pub fn restore(&self, cpu: &mut Cpu, wanted: u32) {
        if wanted == 0 {
            return;
        }
        let aside = cpu.st.flags_aside();
        cpu.st.update_flags(rflags(self.saved() & wanted), aside);
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

/// How the flags come through a block.
pub struct Followed {
    /// Where they are from at its end.
    pub end: Sources,
    /// For each instruction those that a fault there could not show.
    lost: Vec<u32>,
    /// What each instruction is preceded by for the sake of flags that are shown later.
    keeps: Vec<(usize, Keep)>,
    /// Flags made from memory that are in the host's flags at the end, unless a check
    /// comes there: nothing in the block has shown them.
    pub fresh: u32,
}

pub fn follow(
    instructions: &[Instruction],
    kinds: &[Kind],
    origin: &Origin,
    info: &mut InstructionInfoFactory,
) -> Followed {
    let mut end = Sources::new(origin);
    let (mut lost, mut keeps) = (Vec::with_capacity(instructions.len()), Vec::new());
    let mut fresh = 0;
    for (index, (i, kind)) in instructions.iter().zip(kinds).enumerate() {
        let leaves = may_leave(i, *kind);
        lost.push(if leaves { end.lost() } else { 0 });
        end.pass(i, info);
        fresh = if leaves { 0 } else { fresh & !i.rflags_modified() };
        for &keep in &end.keeps {
            keeps.push((index, keep));
            fresh |= if keep.what == Kept::Memory { keep.flags } else { 0 };
        }
    }
    Followed { end, lost, keeps, fresh }
}

impl Followed {
    /// What must be kept of the operands, where `end` are the flags shown after the block.
    pub fn keeps(
        &self,
        instructions: &[Instruction],
        kinds: &[Kind],
        live: &[u32],
        end: u32,
    ) -> Vec<(usize, Keep)> {
        if self.keeps.is_empty() {
            return Vec::new();
        }
        let mut shown = vec![end; instructions.len() + 1];
        for (index, (i, kind)) in instructions.iter().zip(kinds).enumerate().rev() {
            let here = if may_leave(i, *kind) { ALL & !live[index] } else { 0 };
            shown[index] = here | shown[index + 1] & !replaced(i);
        }
        let needed = |(index, keep): &&(usize, Keep)| keep.flags & shown[index + 1] != 0;
        self.keeps.iter().filter(needed).copied().collect()
    }
}

/// Adds to `live` what must be put aside because it cannot be made again.
pub fn keep_lost(instructions: &[Instruction], followed: &Followed, live: &mut [u32]) {
    for (index, lost) in followed.lost.iter().enumerate() {
        let mut lost = lost & !live[index];
        // Needed from its producer on, which is where it was lost to.
        let mut at = index;
        while lost != 0 {
            live[at] |= lost;
            let Some(before) = at.checked_sub(1) else { break };
            at = before;
            lost &= !replaced(&instructions[at]);
        }
    }
}

/// Whether the instruction may leave translated code with nothing of it done.
pub fn may_leave(i: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Copy => {
            let in_memory = |op: &u32| {
                i.op_kind(*op) == OpKind::Register
                    && matches!(
                        i.op_register(*op).full_register(),
                        Register::R13 | Register::R14 | Register::R15
                    )
            };
            matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
                || fpu::touches_x87(i)
                || (0..i.op_count()).any(|op| match i.op_kind(op) {
                    OpKind::Memory => true,
                    OpKind::Register => !i.op_register(op).is_gpr(),
                    _ => false,
                })
                // More than there are scratch registers for: it has no copy.
                || (0..i.op_count()).filter(in_memory).count() > 2
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
