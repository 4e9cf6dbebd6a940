//! Which arithmetic flags are needed where.

use iced_x86::{Decoder, FlowControl, Instruction, RflagsBits};

use super::block::Source;
use super::classify::{Kind, keeps_flags_sometimes};
use crate::memory::code_map;

/// The six arithmetic flags, as iced counts them.
pub const ALL: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// How far to look for the flags that code after a block needs.
const LOOK_AHEAD: usize = 12;

/// Arithmetic flags that an instruction reads.
pub fn read(i: &Instruction) -> u32 {
    i.rflags_read() & ALL
}

/// Arithmetic flags that an instruction always replaces.
pub fn replaced(i: &Instruction) -> u32 {
    // REP CMPS and SCAS with a count of zero leave the flags alone.
    let repeated = i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
    if repeated || keeps_flags_sometimes(i) { 0 } else { i.rflags_modified() & ALL }
}

/// For each instruction the flags needed before it, and one more at the end.
pub fn backwards(instructions: &[Instruction], kinds: &[Kind], end: u32) -> Vec<u32> {
    let mut live = vec![end; instructions.len() + 1];
    for (index, (i, kind)) in instructions.iter().zip(kinds).enumerate().rev() {
        live[index] = match kind {
            // The interpreter must find every flag.
            Kind::Interpret | Kind::Port { .. } | Kind::Pushf => ALL,
            // Targets unknown; nothing before the branch is read by it.
            Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect | Kind::Syscall => ALL,
            Kind::Sysret => 0,
            _ => live[index + 1] & !replaced(i) | read(i),
        };
    }
    live
}

/// The flags needed after the last instruction of a block, on any way out.
pub fn after(last: &Instruction, ends: bool, source: &Source<'_>) -> u32 {
    if !ends {
        return ahead(last.next_ip(), source, 1);
    }
    match last.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::Call => {
            ahead(last.near_branch_target(), source, 1)
        }
        FlowControl::ConditionalBranch => {
            ahead(last.near_branch_target(), source, 1) | ahead(last.next_ip(), source, 1)
        }
        _ => ALL,
    }
}

/// Flags that the code at `rip` needs. Looks only inside the block's own page
/// and notes where, so that a change there ends the block and the answer with it.
fn ahead(rip: u64, source: &Source<'_>, jumps: u32) -> u32 {
    if rip & !0xFFF != source.rip & !0xFFF || source.page.is_empty() {
        return ALL;
    }
    let bytes = &source.page[(rip & 0xFFF) as usize..];
    let mut decoder = Decoder::with_ip(64, bytes, rip, source.cpuid.decoder_options());
    let (mut needed, mut open) = (0, ALL);
    for _ in 0..LOOK_AHEAD {
        let i = decoder.decode();
        let seen = code_map::lines(i.ip() & 0xFFF, i.len().max(1) as u64);
        source.looked.set(source.looked.get() | seen);
        if i.is_invalid() || i.is_privileged() {
            return needed | open;
        }
        needed |= read(&i) & open;
        open &= !replaced(&i);
        if open == 0 {
            return needed;
        }
        match i.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch if jumps > 0 => {
                return needed | open & ahead(i.near_branch_target(), source, jumps - 1);
            }
            FlowControl::ConditionalBranch if jumps > 0 && i.is_jcc_short_or_near() => {
                let either = ahead(i.near_branch_target(), source, jumps - 1)
                    | ahead(i.next_ip(), source, jumps - 1);
                return needed | open & either;
            }
            _ => return needed | open,
        }
    }
    needed | open
}
