//! Which arithmetic flags are needed where.

use iced_x86::{Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, RflagsBits};

use super::block::Source;
use super::classify::{Kind, classify, keeps_flags_sometimes, may_leave};
use super::code32;
use super::sources::Sources;
use crate::journal::Counting;

/// The six arithmetic flags, as iced counts them.
pub const ALL: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// How far to look for the flags that code after a block needs.
const LOOK_AHEAD: usize = 32;

/// What an instruction does with the arithmetic flags.
#[derive(Clone, Copy)]
pub struct FlagUse {
    pub read: u32,
    /// Written, or made undefined, or left as they were.
    pub modified: u32,
    /// Always written or made undefined.
    pub replaced: u32,
}

impl FlagUse {
    /// `counted`: of code whose every state is to come again, the undefined too.
    pub fn of(i: &Instruction, counted: bool) -> Self {
        let modified = i.rflags_modified() & ALL;
        // REP CMPS and SCAS with a count of zero leave the flags alone.
        let repeated = i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
        let keeps = modified != 0 && (repeated || keeps_flags_sometimes(i));
        let carried = if counted { carried_over(i) } else { 0 };
        Self {
            read: i.rflags_read() & ALL | carried,
            modified,
            replaced: if keeps { 0 } else { modified & !carried },
        }
    }
}

/// Undefined flags that a CPU may leave as they were before: AMD's does after MUL and
/// the scans, Intel's after DIV, BT and rotates by a constant. All others undefined are
/// made from the operands.
fn carried_over(i: &Instruction) -> u32 {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Mul
        | M::Imul
        | M::Div
        | M::Idiv
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Bt
        | M::Btc
        | M::Btr
        | M::Bts => i.rflags_undefined() & ALL,
        M::Rol | M::Ror | M::Rcl | M::Rcr => RflagsBits::OF,
        _ => 0,
    }
}

/// An instruction, as the flags see it.
#[derive(Clone, Copy)]
pub struct Step {
    pub flags: FlagUse,
    /// A fault at it may show all flags, as they were before it.
    pub shows: bool,
    /// The flags needed before it, where what follows it has no say.
    fixed: Option<u32>,
}

impl Step {
    pub fn of(i: &Instruction, kind: Kind, counted: bool) -> Self {
        Self { flags: FlagUse::of(i, counted), shows: may_leave(i, kind), fixed: fixed(kind) }
    }
}

/// The flags needed before an instruction of this kind, where what follows it has no say.
fn fixed(kind: Kind) -> Option<u32> {
    match kind {
        // The interpreter must find every flag.
        Kind::Interpret | Kind::Port { .. } | Kind::Pushf => Some(ALL),
        // Targets unknown; nothing before the branch is read by it.
        Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect | Kind::Syscall => Some(ALL),
        Kind::Sysret => Some(0),
        _ => None,
    }
}

/// For each instruction the flags needed before it, and one more at the end.
pub fn backwards(steps: &[Step], end: u32) -> Vec<u32> {
    let mut live = vec![end; steps.len() + 1];
    for (index, Step { flags, fixed, .. }) in steps.iter().enumerate().rev() {
        live[index] = fixed.unwrap_or(live[index + 1] & !flags.replaced | flags.read);
    }
    live
}

/// What the code behind a way out of a block does with the flags that it finds.
#[derive(Clone, Copy, Default)]
pub struct Way {
    pub target: u64,
    /// It reads them, or may, or a fault shows them and they cannot be made again.
    pub needed: u32,
    /// A fault there may show them where the code itself does not need them any more.
    pub shown: u32,
}

/// The ways out of a block to known places; `None` if there are others.
pub fn ways(last: &Instruction, ends: bool, ahead: &mut Ahead<'_>) -> Option<Vec<Way>> {
    let targets = if ends {
        match last.flow_control() {
            FlowControl::UnconditionalBranch | FlowControl::Call => vec![last.near_branch_target()],
            FlowControl::ConditionalBranch => vec![last.near_branch_target(), last.next_ip()],
            _ => return None,
        }
    } else {
        vec![last.next_ip()]
    };
    Some(targets.into_iter().map(|target| ahead.way(target)).collect())
}

/// Looks at the code behind a block.
pub struct Ahead<'a> {
    pub source: &'a Source<'a>,
    /// Where the flags are from at the block's end.
    pub sources: &'a Sources,
    pub info: &'a mut InstructionInfoFactory,
}

/// What was found of the flags on a path.
#[derive(Default)]
struct Found {
    /// The block that finds them needs them: however it is entered they are there.
    read: u32,
    /// It is not known what becomes of them.
    open: u32,
    /// A fault shows them where nothing that follows reads them.
    shown: u32,
    /// Shown where they cannot be made again.
    lost: u32,
}

impl Ahead<'_> {
    fn way(&mut self, target: u64) -> Way {
        let found = self.look(target, self.sources.clone(), 1);
        Way {
            target,
            needed: found.read | found.open | found.lost,
            shown: found.shown | found.open,
        }
    }

    /// The next instruction of the page, on which the block depends from here on.
    fn next(&self, decoder: &mut Decoder<'_>) -> (Instruction, Kind) {
        let mut i = decoder.decode();
        if self.source.code32() {
            code32::use_common_form(&mut i);
        }
        self.source.look_at(&i);
        let kind = if i.is_invalid() { Kind::Interpret } else { classify(&i, self.source) };
        (i, kind)
    }

    /// Whether a block at an address of the page polls before its first instruction.
    fn may_poll(&self, rip: u64) -> bool {
        let source = self.source;
        let mut decoder = source.decoder(&source.page[(rip & 0xFFF) as usize..], rip);
        for _ in 0..LOOK_AHEAD {
            let (i, kind) = self.next(&mut decoder);
            if kind.ends_block() {
                return source.polls(rip, &i, kind);
            }
        }
        true
    }

    /// Looks only inside the block's own page and notes where, so that a change there
    /// ends the block and the answer with it.
    fn look(&mut self, rip: u64, mut sources: Sources, jumps: u32) -> Found {
        let source = self.source;
        let mut found = Found::default();
        let mut open = ALL;
        if !source.in_page(rip) {
            found.read = ALL;
            return found;
        }
        if source.counting == Counting::Sought || source.counted() && self.may_poll(rip) {
            // The block there may be left before its first instruction, with all flags.
            found.shown = open;
            found.lost = sources.lost();
        }
        let bytes = &source.page[(rip & 0xFFF) as usize..];
        let mut decoder = source.decoder(bytes, rip);
        for _ in 0..LOOK_AHEAD {
            let (i, kind) = self.next(&mut decoder);
            let Step { flags, shows, fixed } = Step::of(&i, kind, source.counted());
            if let Some(needed) = fixed {
                found.read |= needed & open;
                found.shown &= !(needed & open);
                return found;
            }
            if shows {
                found.shown |= open;
                found.lost |= sources.lost() & open;
            }
            found.read |= flags.read & open;
            // Until they are read, the block there keeps them for itself.
            found.shown &= !(flags.read & open);
            open &= !flags.replaced;
            if open == 0 {
                return found;
            }
            if kind.ends_block() {
                let targets = match kind {
                    _ if jumps == 0 => [None, None],
                    Kind::Jmp | Kind::Call => [Some(i.near_branch_target()), None],
                    Kind::Jcc | Kind::Loop => [Some(i.near_branch_target()), Some(i.next_ip())],
                    _ => [None, None],
                };
                if targets[0].is_none() {
                    break;
                }
                sources.pass(&i, &flags, self.info);
                let mut behind = Found::default();
                for target in targets.into_iter().flatten() {
                    let other = self.look(target, sources.clone(), jumps - 1);
                    behind.read |= other.read & open;
                    behind.open |= other.open & open;
                    behind.shown |= other.shown & open;
                    behind.lost |= other.lost & open;
                }
                found.shown = found.shown & !behind.read | behind.shown;
                found.read |= behind.read;
                found.open |= behind.open;
                found.lost |= behind.lost;
                return found;
            }
            sources.pass(&i, &flags, self.info);
        }
        found.open |= open;
        found
    }
}
