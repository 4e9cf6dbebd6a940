//! String instructions, with and without REP.
//!
//! One iteration is one element, and each finished iteration is a state in which
//! a fault, an exit or an interrupt may come. MOVS and STOS that go forward
//! through RAM take as many elements at a time as lie inside one page; the
//! outcome is that of going element by element, overlap included.

use iced_x86::{Instruction, Register};

use super::operand::{check_alignment, linear, string_address_size, write_gpr};
use super::{Flow, alu};
use crate::cpu::Cpu;
use crate::cpu::mmu::Place;
use crate::state::fault::{R, Stop};
use crate::state::mask;
use crate::state::{flag, reg};

/// How much one step does before interrupts get their turn: iterations, of which
/// a bulk run counts for many.
const BUDGET: u32 = 4096;
/// Sixteen runs, so 64 KiB, in a step.
const BULK_COST: u32 = BUDGET / 16;

/// Bytes of an element.
fn element_size(i: &Instruction) -> usize {
    i.memory_size().size()
}

/// Runs `iteration` once, or as the REP prefix and rCX say. It returns how many
/// elements it has done and whether a conditional REP goes on; if it fails it must
/// have changed nothing. It is told how many elements are left.
pub fn repeat(
    cpu: &mut Cpu,
    i: &Instruction,
    mut iteration: impl FnMut(&mut Cpu, u64) -> R<(u64, bool)>,
) -> R<Flow> {
    if !i.has_rep_prefix() && !i.has_repne_prefix() {
        iteration(cpu, 1)?;
        return Ok(Flow::Next);
    }
    let size = string_address_size(i);
    // A single step ends after each iteration (SDM 3A, 17.3.1.4), and so does one
    // that looks out for data breakpoints.
    let stepping = super::debug::stops_within(cpu) || cpu.st.flags & flag::TF != 0;
    let mut budget = if stepping { 1 } else { BUDGET };
    while budget > 0 {
        let count = cpu.st.gpr[reg::RCX] & mask(size);
        if count == 0 {
            return Ok(Flow::Next);
        }
        let (done, go_on) = iteration(cpu, if stepping { 1 } else { count })?;
        write_gpr(cpu, reg::RCX, size, count - done);
        // What the machine answered belongs to the finished iteration.
        let answered = cpu.replay.in_progress();
        cpu.replay.clear();
        if done == count || !go_on {
            return Ok(Flow::Next);
        }
        if answered {
            // Else no kick and no interrupt would come between two exits.
            break;
        }
        budget = budget.saturating_sub(if done > 1 { BULK_COST } else { 1 });
    }
    Ok(Flow::Jump)
}

/// Moves rSI or rDI over `elements`, backward if DF is set.
#[inline]
pub fn advance(cpu: &mut Cpu, index: usize, address_size: usize, element: usize, elements: u64) {
    let distance = elements.wrapping_mul(element as u64);
    let old = cpu.st.gpr[index];
    let new = if cpu.st.flags & flag::DF != 0 {
        old.wrapping_sub(distance)
    } else {
        old.wrapping_add(distance)
    };
    write_gpr(cpu, index, address_size, new);
}

/// A linear address for one element at rSI or rDI, checked.
#[inline]
fn element_address(
    cpu: &Cpu,
    segment: Register,
    index: usize,
    address_size: usize,
    element: usize,
    write: bool,
) -> R<u64> {
    let offset = cpu.st.gpr[index] & mask(address_size);
    let address = linear(cpu, segment, offset, element, write)?;
    check_alignment(cpu, address, element)?;
    Ok(address)
}

/// RAM for several elements inside one page.
struct Run {
    host: *mut u8,
    /// Where to report the write if the page holds translated code.
    code: Option<tetrarch_memory::GuestPhys>,
    bytes: u64,
}

/// The longest forward run of at most `bytes` bytes at rSI or rDI that lies
/// inside one page of RAM, the segment and the address size; `None` where
/// elements must go one by one.
fn run_at(
    cpu: &mut Cpu,
    segment: Register,
    index: usize,
    address_size: usize,
    bytes: u64,
    element: usize,
    write: bool,
) -> R<Option<Run>> {
    let offset = cpu.st.gpr[index] & mask(address_size);
    // A fault of the first element is the instruction's.
    let address = element_address(cpu, segment, index, address_size, element, write)?;
    let to_wrap = (mask(address_size) - offset).saturating_add(1);
    let bytes = bytes.min(0x1000 - (address & 0xFFF)).min(to_wrap);
    let bytes = bytes - bytes % element as u64;
    if bytes <= element as u64 || linear(cpu, segment, offset, bytes as usize, write).is_err() {
        return Ok(None);
    }
    let user = cpu.user();
    let place = match cpu.tlb.lookup(address, user, write) {
        Some(host) => Place::Ram(host),
        None => cpu.fill_tlb(address, write, user).map_err(Stop::from)?,
    };
    Ok(match place {
        Place::Ram(host) => Some(Run { host, code: None, bytes }),
        Place::Code(host, physical) => Some(Run { host, code: Some(physical), bytes }),
        Place::Device(_) => None,
    })
}

/// Copies as MOVS does going forward in elements: where the destination begins
/// inside the source, what has been copied is copied again.
///
/// # Safety
/// Both pointers must have `len` mapped bytes.
unsafe fn copy_forward(source: *const u8, target: *mut u8, len: usize, element: usize) {
    let distance = (target as usize).wrapping_sub(source as usize);
    if distance >= len {
        // Apart, or moving down: no element overwrites one not yet read.
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy(source, target, len) };
    } else if distance >= element {
        // The first `distance` bytes repeat: double what is there.
        let mut have = distance;
        while have < len + distance {
            let part = have.min(len + distance - have);
            // SAFETY: inside source..target + len, which is mapped as both ranges
            // meet, and the parts do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(source, source.cast_mut().add(have), part) };
            have += part;
        }
    } else if distance > 0 {
        for at in (0..len).step_by(element) {
            // SAFETY: one element inside `len`, read whole before it is written.
            unsafe {
                let mut bytes = [0u8; 8];
                std::ptr::copy_nonoverlapping(source.add(at), bytes.as_mut_ptr(), element);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.add(at), element);
            }
        }
    }
}

/// Fills with a pattern of `element` bytes.
///
/// # Safety
/// `target` must have `len` mapped bytes; `len` is a multiple of `element`.
unsafe fn fill(target: *mut u8, len: usize, element: usize, value: u64) {
    // SAFETY: the caller's promise; every element lies inside `len`.
    unsafe {
        match element {
            1 => target.write_bytes(value as u8, len),
            2 => {
                (0..len / 2).for_each(|n| target.cast::<u16>().add(n).write_unaligned(value as u16))
            }
            4 => {
                (0..len / 4).for_each(|n| target.cast::<u32>().add(n).write_unaligned(value as u32))
            }
            _ => (0..len / 8).for_each(|n| target.cast::<u64>().add(n).write_unaligned(value)),
        }
    }
}

pub fn movs(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let (element, width) = (element_size(i), string_address_size(i));
    let segment = i.memory_segment();
    repeat(cpu, i, |cpu, left| {
        if left > 1 && cpu.st.flags & flag::DF == 0 {
            let done = movs_run(cpu, segment, width, element, left)?;
            if done > 0 {
                return Ok((done, true));
            }
        }
        let user = cpu.user();
        let source = element_address(cpu, segment, reg::RSI, width, element, false)?;
        let value = cpu.load(source, element, user)?;
        let target = element_address(cpu, Register::ES, reg::RDI, width, element, true)?;
        cpu.store(target, element, value, user)?;
        advance(cpu, reg::RSI, width, element, 1);
        advance(cpu, reg::RDI, width, element, 1);
        Ok((1, true))
    })
}

/// Copies a run; returns the number of elements, 0 where there is no run.
fn movs_run(cpu: &mut Cpu, segment: Register, width: usize, element: usize, left: u64) -> R<u64> {
    let bytes = left.saturating_mul(element as u64);
    let Some(source) = run_at(cpu, segment, reg::RSI, width, bytes, element, false)? else {
        return Ok(0);
    };
    let target = run_at(cpu, Register::ES, reg::RDI, width, source.bytes, element, true)?;
    let Some(target) = target else { return Ok(0) };
    // SAFETY: each run lies inside one page of RAM, and guest RAM stays mapped; the
    // target's run is no longer than the source's.
    unsafe { copy_forward(source.host, target.host, target.bytes as usize, element) };
    if let Some(physical) = target.code {
        cpu.vm.code.wrote(physical, target.bytes);
    }
    let done = target.bytes / element as u64;
    advance(cpu, reg::RSI, width, element, done);
    advance(cpu, reg::RDI, width, element, done);
    Ok(done)
}

pub fn stos(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let (element, width) = (element_size(i), string_address_size(i));
    let value = cpu.st.gpr[reg::RAX];
    repeat(cpu, i, |cpu, left| {
        if left > 1 && cpu.st.flags & flag::DF == 0 {
            let bytes = left.saturating_mul(element as u64);
            let run = run_at(cpu, Register::ES, reg::RDI, width, bytes, element, true)?;
            if let Some(run) = run {
                // SAFETY: the run lies inside one page of RAM, which stays mapped.
                unsafe { fill(run.host, run.bytes as usize, element, value) };
                if let Some(physical) = run.code {
                    cpu.vm.code.wrote(physical, run.bytes);
                }
                let done = run.bytes / element as u64;
                advance(cpu, reg::RDI, width, element, done);
                return Ok((done, true));
            }
        }
        let target = element_address(cpu, Register::ES, reg::RDI, width, element, true)?;
        let user = cpu.user();
        cpu.store(target, element, value & mask(element), user)?;
        advance(cpu, reg::RDI, width, element, 1);
        Ok((1, true))
    })
}

pub fn lods(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let (element, width) = (element_size(i), string_address_size(i));
    let segment = i.memory_segment();
    repeat(cpu, i, |cpu, _| {
        let source = element_address(cpu, segment, reg::RSI, width, element, false)?;
        let user = cpu.user();
        let value = cpu.load(source, element, user)?;
        write_gpr(cpu, reg::RAX, element, value);
        advance(cpu, reg::RSI, width, element, 1);
        Ok((1, true))
    })
}

/// Whether REPE or REPNE goes on with these flags.
fn goes_on(i: &Instruction, flags: u64) -> bool {
    (flags & flag::ZF != 0) != i.has_repne_prefix()
}

pub fn cmps(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let (element, width) = (element_size(i), string_address_size(i));
    let segment = i.memory_segment();
    repeat(cpu, i, |cpu, _| {
        let user = cpu.user();
        let first = element_address(cpu, segment, reg::RSI, width, element, false)?;
        let a = cpu.load(first, element, user)?;
        let second = element_address(cpu, Register::ES, reg::RDI, width, element, false)?;
        let b = cpu.load(second, element, user)?;
        let flags = alu::cmp(element, a, b);
        cpu.st.update_flags(flag::ARITH, flags);
        advance(cpu, reg::RSI, width, element, 1);
        advance(cpu, reg::RDI, width, element, 1);
        Ok((1, goes_on(i, flags)))
    })
}

pub fn scas(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let (element, width) = (element_size(i), string_address_size(i));
    let a = cpu.st.gpr[reg::RAX];
    repeat(cpu, i, |cpu, _| {
        let target = element_address(cpu, Register::ES, reg::RDI, width, element, false)?;
        let user = cpu.user();
        let b = cpu.load(target, element, user)?;
        let flags = alu::cmp(element, a, b);
        cpu.st.update_flags(flag::ARITH, flags);
        advance(cpu, reg::RDI, width, element, 1);
        Ok((1, goes_on(i, flags)))
    })
}
