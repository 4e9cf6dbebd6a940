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
    Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};
use smallvec::SmallVec;

use super::liveness::{ALL, FlagUse, Step};
use super::operands::{gpr_of, number};
use crate::cpu::Cpu;
use crate::interp::{alu, host_alu, operand};
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

/// What precedes one instruction.
type Keeps = SmallVec<[Keep; 4]>;

/// Slots, with those in use.
struct Slots<'a> {
    used: u32,
    keeps: &'a mut Keeps,
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
                _ => Operand::Constant(i.try_immediate(op).ok()?),
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

    /// The whole registers that it needs, a bit for each.
    fn registers(&self) -> u32 {
        [self.first, self.second].iter().fold(0, |registers, operand| match operand {
            Operand::Register(register) => registers | bit(register.full_register()),
            _ => registers,
        })
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
            // What they were made from, and once more: OF is as the host makes it.
            Operation::Rol => {
                let before = host_alu::ror(size, first, second, 0).0;
                host_alu::rol(size, before, second, 0).1
            }
            Operation::Ror => {
                let before = host_alu::rol(size, first, second, 0).0;
                host_alu::ror(size, before, second, 0).1
            }
            Operation::Shl => host_alu::shl(size, first, second, 0).1,
            Operation::Shr => host_alu::shr(size, first, second, 0).1,
            Operation::Sar => host_alu::sar(size, first, second, 0).1,
            Operation::Imul => host_alu::imul(size, first, second, 0).1,
            Operation::Bt => first >> (second % (size as u64 * 8)) & 1,
        }
    }
}

/// One bit for a whole general register, none for others.
fn bit(full: Register) -> u32 {
    number(full).map_or(0, |number| 1 << number)
}

/// The general registers that an instruction writes, or may write, a bit for each.
fn written_registers(i: &Instruction, info: &mut InstructionInfoFactory) -> u32 {
    use Mnemonic as M;
    match i.mnemonic() {
        // Most instructions are these, and the factory is slow.
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Lea
        | M::Add
        | M::Sub
        | M::And
        | M::Or
        | M::Xor
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror => match i.op0_kind() {
            OpKind::Register => bit(i.op0_register().full_register()),
            _ => 0,
        },
        M::Cmp | M::Test => 0,
        _ => info
            .info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE)
            .used_registers()
            .iter()
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
            .fold(0, |written, used| written | bit(used.register().full_register())),
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
    producers: SmallVec<[Producer; FLAGS]>,
    /// Flags that neither the block nor a producer before it has touched.
    entry: u32,
    /// Those are in `saved_flags`: the block has had none of its own to put there.
    saved: bool,
    /// What the last instruction passed had to be preceded by.
    keeps: Keeps,
}

/// How many arithmetic flags there are: each has one producer at most.
const FLAGS: usize = 6;

impl Sources {
    /// At the start of a block.
    pub fn new(origin: &Origin) -> Self {
        match origin {
            Origin::Saved => {
                Self { producers: SmallVec::new(), entry: ALL, saved: true, keeps: Keeps::new() }
            }
            Origin::Before(producers) => {
                let made = producers.iter().fold(0, |made, producer| made | producer.flags);
                let producers = producers.iter().cloned().collect();
                Self { producers, entry: ALL & !made, saved: false, keeps: Keeps::new() }
            }
        }
    }

    /// Goes past an instruction.
    pub fn pass(&mut self, i: &Instruction, flags: &FlagUse, info: &mut InstructionInfoFactory) {
        self.keeps.clear();
        // What is in use at the instruction stays: it may fault.
        let recipes = self.producers.iter().filter_map(|producer| producer.recipe);
        let mut slots = Slots {
            used: recipes.fold(0, |used, recipe| used | recipe.slots()),
            keeps: &mut self.keeps,
        };
        let written = flags.modified;
        if written != 0 {
            for producer in &mut self.producers {
                producer.flags &= !written;
            }
            self.producers.retain(|producer| producer.flags != 0);
            self.entry &= !written;
            self.saved = false;
        }
        let recipes = self.producers.iter().filter_map(|producer| producer.recipe);
        let needed = recipes.fold(0, |needed, recipe| needed | recipe.registers());
        if needed != 0 {
            let mut lost = needed & written_registers(i, info);
            while lost != 0 {
                let number = lost.trailing_zeros();
                lost &= lost - 1;
                let full = gpr_of(8, number as u8);
                let slot = slots.keep(Kept::Register(full));
                for producer in &mut self.producers {
                    let Some(recipe) = producer.recipe.as_mut().filter(|r| r.needs(full)) else {
                        continue;
                    };
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
        if written != 0 {
            // One that keeps the flags sometimes has none of its own to tell.
            let recipe = if flags.replaced == written { Recipe::of(i, &mut slots) } else { None };
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
    steps: &[Step],
    origin: &Origin,
    info: &mut InstructionInfoFactory,
) -> Followed {
    let mut end = Sources::new(origin);
    let (mut lost, mut keeps) = (Vec::with_capacity(instructions.len()), Vec::new());
    let mut fresh = 0;
    for (index, (i, step)) in instructions.iter().zip(steps).enumerate() {
        let Step { flags, shows, .. } = step;
        lost.push(if *shows { end.lost() } else { 0 });
        end.pass(i, flags, info);
        fresh = if *shows { 0 } else { fresh & !flags.modified };
        for &keep in &end.keeps {
            keeps.push((index, keep));
            fresh |= if keep.what == Kept::Memory { keep.flags } else { 0 };
        }
    }
    Followed { end, lost, keeps, fresh }
}

impl Followed {
    /// What must be kept of the operands, where `end` are the flags shown after the block.
    pub fn keeps(&self, steps: &[Step], live: &[u32], end: u32) -> Vec<(usize, Keep)> {
        if self.keeps.is_empty() {
            return Vec::new();
        }
        let mut shown = vec![end; steps.len() + 1];
        for (index, Step { flags, shows, .. }) in steps.iter().enumerate().rev() {
            let here = if *shows { ALL & !live[index] } else { 0 };
            shown[index] = here | shown[index + 1] & !flags.replaced;
        }
        let needed = |(index, keep): &&(usize, Keep)| keep.flags & shown[index + 1] != 0;
        self.keeps.iter().filter(needed).copied().collect()
    }
}

/// Adds to `live` what must be put aside because it cannot be made again.
pub fn keep_lost(steps: &[Step], followed: &Followed, live: &mut [u32]) {
    for (index, lost) in followed.lost.iter().enumerate() {
        let mut lost = lost & !live[index];
        // Needed from its producer on, which is where it was lost to.
        let mut at = index;
        while lost != 0 {
            live[at] |= lost;
            let Some(before) = at.checked_sub(1) else { break };
            at = before;
            lost &= !steps[at].flags.replaced;
        }
    }
}
