//! What the parts of the translator hand to each other: the bytes to translate,
//! a finished block, and the places where it leaves.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::num::NonZeroU32;

use iced_x86::{Decoder, Instruction, OpKind, Register};
use tetrarch_memory::PAGE_SIZE;

use super::classify::Kind;
use super::sources::Origin;
use crate::cpu::cpuid::CpuidTable;
use crate::journal::Counting;
use crate::memory::code_map;
use crate::state::mode;

/// What the guest's code bytes are, and where.
pub struct Source<'a> {
    /// In relative code the offset in its page, as all addresses near it count from there.
    pub rip: u64,
    /// From `rip` to the end of its page (or of the one instruction that crosses
    /// into the next page).
    pub bytes: &'a [u8],
    pub mode: u32,
    /// For an instruction that crosses pages: the exec id of its second page.
    pub second: Option<u32>,
    /// Bytes of the page from its start, for looking ahead.
    pub page: &'a [u8],
    /// Lines of the page that were looked at beyond the block (see
    /// [`crate::memory::code_map`]): a write there makes the block invalid too.
    pub looked: Cell<u64>,
    pub cpuid: &'a CpuidTable,
    /// PAUSE goes to the interpreter, which gives the host's CPU away.
    pub yields: bool,
    /// Where flags are at the entry that the block does not need.
    pub origin: &'a Origin,
    pub counting: Counting,
    /// Linear addresses before which a block ends.
    pub breakpoints: &'a BTreeSet<u64>,
}

/// An instruction that begins before this offset does not cross into the next page.
const LAST_WHOLE: u64 = PAGE_SIZE - 15;

impl Source<'_> {
    /// Whether a block ends before the instruction at `ip`. Relative code is mapped anywhere.
    pub fn breaks_at(&self, ip: u64) -> bool {
        if self.relative() {
            return self.breakpoints.iter().any(|linear| linear & (PAGE_SIZE - 1) == ip);
        }
        self.breakpoints.contains(&ip)
    }

    pub fn relative(&self) -> bool {
        self.mode & mode::RELATIVE != 0
    }

    pub fn counted(&self) -> bool {
        self.counting != Counting::Not
    }

    /// Notes that what is made of the code depends on an instruction of its page.
    pub fn look_at(&self, i: &Instruction) {
        let seen = code_map::lines(i.ip() & (PAGE_SIZE - 1), i.len().max(1) as u64);
        self.looked.set(self.looked.get() | seen);
    }

    /// Whether code that counts polls the request flag in a block from `start` to `last`. Blocks
    /// that do not are left before long: each loop has a branch back, or one of those branches
    /// that poll by themselves.
    pub fn polls(&self, start: u64, last: &Instruction, kind: Kind) -> bool {
        let back = matches!(kind, Kind::Jmp | Kind::Jcc | Kind::Loop | Kind::Call)
            && last.near_branch_target() <= start;
        self.counted() && (back || kind == Kind::CallIndirect)
    }

    /// 32-bit code, with 32-bit addresses.
    pub fn code32(&self) -> bool {
        self.mode & mode::CODE32 != 0
    }

    /// Decodes from `bytes`, which stand at `rip`.
    pub fn decoder<'b>(&self, bytes: &'b [u8], rip: u64) -> Decoder<'b> {
        decoder(self.mode, bytes, rip, self.cpuid)
    }

    /// Whether `target` is in the page of the code, so that a branch there needs no look at
    /// what is mapped. In relative code that must hold wherever the page is mapped, so what
    /// may cross into another counts as outside.
    pub fn in_page(&self, target: u64) -> bool {
        target & !(PAGE_SIZE - 1) == self.rip & !(PAGE_SIZE - 1)
            && self.second.is_none()
            && !(self.relative() && target & (PAGE_SIZE - 1) > LAST_WHOLE)
    }
}

/// Decodes code of a mode.
pub fn decoder<'a>(mode: u32, bytes: &'a [u8], rip: u64, cpuid: &CpuidTable) -> Decoder<'a> {
    let bits = if mode & mode::CODE32 != 0 { 32 } else { 64 };
    Decoder::with_ip(bits, bytes, rip, cpuid.decoder_options())
}

/// An instruction of relative code as it stands where its page is mapped.
pub fn rebased(mut i: Instruction, page: u64) -> Instruction {
    i.set_next_ip(i.next_ip().wrapping_add(page));
    if i.is_ip_rel_memory_operand() {
        i.set_memory_displacement64(i.memory_displacement64().wrapping_add(page));
    }
    match i.op0_kind() {
        OpKind::NearBranch64 => {
            i.set_near_branch64(i.near_branch64().wrapping_add(page));
        }
        OpKind::NearBranch16 => {
            i.set_near_branch16(i.near_branch16().wrapping_add(page as u16));
        }
        _ => {}
    }
    i
}

/// A finished translation, not yet at an address.
#[derive(Default)]
pub struct Built {
    pub code: Vec<u8>,
    pub outward: Vec<(u32, u64)>,
    /// Places of 32-bit site numbers, counted from the block's first site.
    pub site_numbers: Vec<u32>,
    pub sites: Vec<Site>,
    /// What [`What::Instruction`] and [`What::Port`] of those count.
    pub interpreted: Vec<Instruction>,
    pub ports: Vec<PortAccess>,
    /// What [`Link::origin`] counts, but for [`Origin::Saved`], which is 0.
    pub origins: Vec<Origin>,
    pub map: Vec<MapEntry>,
    pub entry: u32,
    pub saved_entry: u32,
    pub flags_in: u32,
    /// Guest bytes translated.
    pub len: u32,
    pub instructions: u32,
}

/// The guest's state at a place in a translation.
#[derive(Clone, Copy, Debug)]
pub struct MapEntry {
    /// Offset of the first host byte of the instruction in the block.
    pub offset: u32,
    /// Distance of the instruction from the block's first.
    pub rip: u16,
    /// Instructions that were counted and are not done.
    pub left: u8,
    flags: u8,
}

/// In [`MapEntry::flags`], beside the flags as iced counts them.
const SAVED: u8 = 1 << 7;

impl MapEntry {
    pub fn new(offset: u32, rip: u16, left: u8, saved: bool, live: u32) -> Self {
        let flags = live as u8 | if saved { SAVED } else { 0 };
        Self { offset, rip, left, flags }
    }

    /// The arithmetic flags are in `saved_flags`, not in the host's flags.
    pub fn saved(self) -> bool {
        self.flags & SAVED != 0
    }

    /// Which of them are exact there, as iced counts them.
    pub fn live(self) -> u32 {
        u32::from(self.flags & !SAVED)
    }
}

const _: () = assert!(size_of::<MapEntry>() == 8);

/// A place where translated code leaves for Rust. There are several for each block, so it is
/// small: what few of them have lies elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Where the guest is; in relative code counted from its page.
    pub rip: u64,
    pub relative: bool,
    pub what: What,
    /// Offset of the block in the cache.
    pub block: u32,
    /// The arithmetic flags are in `saved_flags`, not in the host's flags.
    pub saved: bool,
    /// Those that are exact in neither, as iced counts them.
    pub dead: u8,
    /// Bytes of the block's instructions that have been run.
    pub run: u16,
    /// Instructions that were counted and are not done.
    pub left: u8,
}

const _: () = assert!(size_of::<Site>() <= 40);

/// What a [`Site`] leaves for.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// The request flag.
    Nothing,
    /// An indirect branch whose target has no translation yet, or the request flag there.
    Branch,
    /// A direct branch that is not linked yet.
    Link(Link),
    /// An instruction for the interpreter, by its number among those of the block, and later of
    /// the cache.
    Instruction(u32),
    /// IN or OUT, likewise.
    Port(u32),
    /// The page behind the block's instruction, which crosses into it, is not known to be the
    /// one translated, which has this exec id.
    Straddles(u32),
}

/// IN or OUT as decoded; its bytes need not be looked at again.
#[derive(Clone, Copy, Debug)]
pub struct PortAccess {
    pub instruction: Instruction,
    /// `None`: in DX.
    pub port: Option<u8>,
    /// AL, AX or EAX.
    pub register: Register,
    pub out: bool,
}

/// A direct branch that can be patched to its target.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Offset in the cache of the jump's rel32.
    pub jump: u32,
    /// Offset of the exec id's immediate, where the target is in another page.
    pub guard: Option<NonZeroU32>,
    /// Arithmetic flags that the source did not keep, as iced counts them.
    pub dead: u8,
    /// The number of the origin of the flags that the target does not need.
    pub origin: u32,
}
