//! Delivery of exceptions and interrupts (Intel SDM 3A, chapter 6; 20.1.4 for
//! real mode, 21.3 for virtual-8086 mode).
//!
//! All that can fault is read, checked or probed before the first change of
//! state, so that a fault met on the way finds the CPU as it was.

use tetrarch_engine::Segment;

use crate::cpu::Cpu;
use crate::cpu::msr::DEBUG_CONTROL_BTF;
use crate::interp::frame::{self, Frame};
use crate::interp::segment::{
    code_of, fail, is_null, mark_accessed, null_segment, read_descriptor, system_type,
    table_address, with_ext,
};
use crate::interp::stack;
use crate::interp::task::{self, From, Reason};
use crate::state::fault::{Fault, R, Stop, gp, vector};
use crate::state::{attr, cr, flag, reg, seg};

/// DR6: the breakpoints hit, BD, BS and BT.
const DR6_CAUSES: u64 = 0xE00F;
const DR6_BREAKPOINTS: u64 = 0xF;
/// DR7.GD, which a debug exception clears (SDM 3B, 18.2.4).
const DR7_GD: u64 = 1 << 13;

/// The instruction that asks for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareInterrupt {
    IntN,
    Int3,
    Into,
    /// INT1 (ICEBP): a debug exception that needs no right to its gate.
    Int1,
}

/// What is to be delivered.
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    error: Option<u32>,
    /// The gate's DPL counts: INT n, INT3, INTO.
    software: bool,
    /// EXT of the error codes of faults met on the way (SDM 3A, 6.13).
    ext: u32,
    return_ip: u64,
    /// RF in the saved flags: the instruction shall not meet its breakpoint again.
    resume: bool,
}

impl Event {
    fn exception(cpu: &Cpu, fault: Fault) -> Self {
        Self {
            vector: fault.vector,
            error: fault.error,
            software: false,
            ext: 1,
            return_ip: cpu.st.rip,
            resume: !matches!(fault.vector, vector::DB | vector::BP | vector::OF | vector::DF),
        }
    }

    fn external(cpu: &Cpu, vector: u8) -> Self {
        let return_ip = cpu.st.rip;
        Self { vector, error: None, software: false, ext: 1, return_ip, resume: false }
    }
}

/// Exceptions that make a double fault of one another (SDM 3A, table 6-4).
fn contributory(v: u8) -> bool {
    matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

/// Whether `second`, met while `first` is delivered, makes a double fault.
fn doubles(first: u8, second: u8) -> bool {
    contributory(first) && contributory(second)
        || first == vector::PF && (second == vector::PF || contributory(second))
}

/// Delivers an exception that an instruction at RIP has raised.
///
pub fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), Stop> {
    record(cpu, fault);
    let event = Event::exception(cpu, fault);
    dispatch(cpu, event, true)
}

/// Delivers an external interrupt.
pub fn interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), Stop> {
    let event = Event::external(cpu, vector);
    dispatch(cpu, event, false)
}

/// Delivers an NMI and blocks further ones until IRET.
pub fn nmi(cpu: &mut Cpu) -> Result<(), Stop> {
    cpu.st.nmi_blocked = 1;
    let event = Event::external(cpu, vector::NMI);
    dispatch(cpu, event, false)
}

/// INT n and its kin. A fault is the instruction's own.
pub fn software_interrupt(
    cpu: &mut Cpu,
    vector: u8,
    next_rip: u64,
    kind: SoftwareInterrupt,
) -> R<()> {
    if kind == SoftwareInterrupt::IntN && cpu.st.vm86() {
        if cpu.st.cr4 & cr::CR4_VME != 0 && is_programs_own(cpu, vector)? {
            return enter_own_handler(cpu, vector, next_rip);
        }
        if cpu.st.flags & flag::IOPL != flag::IOPL {
            return gp(0);
        }
    }
    let privileged = kind == SoftwareInterrupt::Int1;
    let event = Event {
        vector,
        error: None,
        software: !privileged,
        ext: u32::from(privileged),
        return_ip: next_rip,
        resume: false,
    };
    enter(cpu, &event)?;
    // INT1 and what MOV SS has held back are one #DB.
    if kind == SoftwareInterrupt::Int1 && cpu.st.pending_debug != 0 {
        let causes = std::mem::take(&mut cpu.st.pending_debug);
        set_causes(cpu, causes);
    }
    Ok(())
}

/// Whether the TSS leaves INT n to the virtual-8086 program: its bit is clear in the map that
/// ends where the map of ports begins (SDM 3B, 20.3.3.4 and figure 20-5).
fn is_programs_own(cpu: &mut Cpu, vector: u8) -> R<bool> {
    let tr = cpu.st.seg[seg::TR];
    let at = |cpu: &mut Cpu, offset: u64, size: usize| {
        if tr.attributes & attr::TYPE != system_type::TSS_BUSY
            || offset + size as u64 - 1 > u64::from(tr.limit)
        {
            return gp(0);
        }
        let address = table_address(cpu, tr.base, offset);
        cpu.load(address, size, false)
    };
    let ports = at(cpu, 0x66, 2)?;
    let Some(map) = ports.checked_sub(32) else { return gp(0) };
    let byte = at(cpu, map + u64::from(vector >> 3), 1)?;
    Ok(byte >> (vector & 7) & 1 == 0)
}

/// INT n through the program's own table at 0, as in real mode.
fn enter_own_handler(cpu: &mut Cpu, vector: u8, next_rip: u64) -> R<()> {
    let entry = cpu.load(u64::from(vector) * 4, 4, false)?;
    let virtual_if = cpu.st.flags & flag::IOPL != flag::IOPL;
    let shown = if virtual_if { stack::with_virtual_if(cpu) } else { cpu.st.rflags() };
    let mut frame = Frame::new();
    frame.push(shown & 0xFFFF);
    frame.push(u64::from(cpu.st.seg[seg::CS].selector));
    frame.push(next_rip & 0xFFFF);
    let segment = cpu.st.seg[seg::SS];
    let sp = frame::write(cpu, &segment, cpu.st.gpr[reg::RSP], 2, &frame, true, 0)?;
    frame::set_sp(cpu, &segment, sp);
    let code = crate::interp::segment::real_segment(cpu, seg::CS, (entry >> 16) as u16);
    cpu.st.seg[seg::CS] = code;
    cpu.st.rip = entry & 0xFFFF;
    let clear = flag::TF | flag::RF | if virtual_if { flag::VIF } else { flag::IF };
    let flags = cpu.st.rflags() & !clear;
    cpu.st.set_rflags(flags);
    cpu.update_mode();
    Ok(())
}

/// "Certain debug exceptions may clear bits 0-3" (SDM 3B, 17.2.3); the others
/// only ever gather.
fn set_causes(cpu: &mut Cpu, causes: u64) {
    cpu.st.dr[6] = cpu.st.dr[6] & !DR6_BREAKPOINTS | causes & DR6_CAUSES;
}

/// What an exception leaves in registers whether or not its handler is reached.
fn record(cpu: &mut Cpu, fault: Fault) {
    match fault.vector {
        vector::PF => cpu.st.cr2 = fault.address,
        vector::DB => {
            set_causes(cpu, fault.address);
            cpu.st.dr[7] &= !DR7_GD;
            // The debugger asks for it anew (SDM 3B, 18.4.4).
            cpu.msrs.debug_control &= !DEBUG_CONTROL_BTF;
        }
        _ => {}
    }
}

/// Delivers `event` or what delivering it leads to.
fn dispatch(cpu: &mut Cpu, event: Event, exception: bool) -> Result<(), Stop> {
    let (mut event, mut exception) = (event, exception);
    loop {
        let fault = match enter(cpu, &event) {
            Ok(()) => return Ok(()),
            Err(Stop::Fault(fault)) => fault,
            Err(other) => return Err(other),
        };
        if exception && event.vector == vector::DF {
            return Err(Stop::Shutdown);
        }
        record(cpu, fault);
        event = if exception && doubles(event.vector, fault.vector) {
            Event::exception(cpu, Fault::with_error(vector::DF, 0))
        } else {
            // The second is handled first; the first comes again by itself.
            Event::exception(cpu, fault)
        };
        exception = true;
    }
}

fn enter(cpu: &mut Cpu, event: &Event) -> R<()> {
    let result = if !cpu.st.protected() {
        enter_real(cpu, event)
    } else {
        read_entry(cpu, event).and_then(|entry| match entry {
            Entry::Task(selector) => enter_task(cpu, event, selector),
            Entry::Gate(gate) if cpu.st.long_mode() => enter_long(cpu, event, &gate),
            Entry::Gate(gate) => enter_protected(cpu, event, &gate),
        })
    };
    result.map_err(|stop| with_ext(stop, event.ext))?;
    // A trap behind HLT ends the halt like an interrupt.
    cpu.st.halted = 0;
    cpu.st.shadow = 0;
    cpu.replay.clear();
    cpu.update_mode();
    Ok(())
}

/// The flags to save.
fn saved_flags(cpu: &Cpu, event: &Event) -> u64 {
    cpu.st.rflags() | if event.resume { flag::RF } else { 0 }
}

fn enter_real(cpu: &mut Cpu, event: &Event) -> R<()> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(cpu.st.idt.limit) {
        return gp(0);
    }
    let slot = table_address(cpu, cpu.st.idt.base, offset);
    let entry = cpu.load(slot, 4, false)?;
    let mut frame = Frame::new();
    frame.push(cpu.st.rflags() & 0xFFFF);
    frame.push(u64::from(cpu.st.seg[seg::CS].selector));
    frame.push(event.return_ip & 0xFFFF);
    let stack = cpu.st.seg[seg::SS];
    let sp = frame::write(cpu, &stack, cpu.st.gpr[reg::RSP], 2, &frame, false, 0)?;
    frame::set_sp(cpu, &stack, sp);
    let selector = (entry >> 16) as u16;
    cpu.st.seg[seg::CS] = crate::interp::segment::real_segment(cpu, seg::CS, selector);
    cpu.st.rip = entry & 0xFFFF;
    let clear = flag::IF | flag::TF | flag::AC | flag::RF;
    let flags = cpu.st.rflags() & !clear;
    cpu.st.set_rflags(flags);
    Ok(())
}

/// An entry of the IDT, checked as far as the entry itself goes.
enum Entry {
    Gate(Gate),
    /// The TSS selector of a task gate.
    Task(u16),
}

struct Gate {
    selector: u16,
    offset: u64,
    ist: u64,
    /// Clears IF.
    interrupt: bool,
    /// Bytes of a slot of its frame: 2 or 4; in long mode always 8.
    size: usize,
}

fn read_entry(cpu: &mut Cpu, event: &Event) -> R<Entry> {
    let long = cpu.st.long_mode();
    let len = if long { 16 } else { 8 };
    // Bit 1: the index is into the IDT.
    let error = u32::from(event.vector) << 3 | 2;
    let offset = u64::from(event.vector) * len;
    if offset + len - 1 > u64::from(cpu.st.idt.limit) {
        return gp(error);
    }
    let slot = table_address(cpu, cpu.st.idt.base, offset);
    let low = cpu.load(slot, 8, false)?;
    let high = if long { cpu.load(slot.wrapping_add(8), 8, false)? } else { 0 };
    // Type with the S bit, which is 0 in a gate.
    let kind = (low >> 40 & 0x1F) as u32;
    let (interrupt, size) = match kind {
        system_type::INTERRUPT_GATE => (true, 4),
        system_type::TRAP_GATE => (false, 4),
        system_type::INTERRUPT_GATE16 if !long => (true, 2),
        system_type::TRAP_GATE16 if !long => (false, 2),
        system_type::TASK_GATE if !long => (false, 0),
        _ => return gp(error),
    };
    let dpl = (low >> 45 & 3) as u8;
    if event.software && dpl < cpu.st.cpl {
        return gp(error);
    }
    if low >> 47 & 1 == 0 {
        return fail(vector::NP, error);
    }
    let selector = (low >> 16) as u16;
    if kind == system_type::TASK_GATE {
        return Ok(Entry::Task(selector));
    }
    let mut offset = low & 0xFFFF;
    if size == 4 {
        offset |= low >> 32 & 0xFFFF_0000;
    }
    if long {
        offset |= high << 32;
    }
    Ok(Entry::Gate(Gate { selector, offset, ist: low >> 32 & 7, interrupt, size }))
}

/// The gate's code segment and the privilege level of the handler.
fn read_handler(cpu: &mut Cpu, gate: &Gate) -> R<(Segment, u8)> {
    let selector = gate.selector;
    if is_null(selector) {
        return gp(0);
    }
    let code = code_of(selector);
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    if !descriptor.is_code() || descriptor.dpl() > cpu.st.cpl {
        return gp(code);
    }
    if cpu.st.long_mode() && descriptor.attributes() & (attr::L | attr::DB) != attr::L {
        return gp(code);
    }
    if !descriptor.present() {
        return fail(vector::NP, code);
    }
    let cpl = if descriptor.is_conforming() { cpu.st.cpl } else { descriptor.dpl() };
    mark_accessed(cpu, selector, descriptor)?;
    let mut segment = descriptor.segment(selector);
    segment.selector = selector & !3 | u16::from(cpl);
    Ok((segment, cpl))
}

/// Flags on entry to a handler.
fn enter_flags(cpu: &mut Cpu, gate: &Gate) {
    let mut clear = flag::TF | flag::NT | flag::RF | flag::VM;
    if gate.interrupt {
        clear |= flag::IF;
    }
    let flags = cpu.st.rflags() & !clear;
    cpu.st.set_rflags(flags);
}

/// Through a task gate: the handler is a task of its own, which returns by IRET
/// with NT set.
fn enter_task(cpu: &mut Cpu, event: &Event, selector: u16) -> R<()> {
    let from = From { rip: event.return_ip, flags: saved_flags(cpu, event) };
    task::switch(cpu, selector, Reason::Nest, from, event.error)
}

fn enter_long(cpu: &mut Cpu, event: &Event, gate: &Gate) -> R<()> {
    let (code, cpl) = read_handler(cpu, gate)?;
    let inner = cpl < cpu.st.cpl;
    let top = if gate.ist != 0 {
        frame::load_tss(cpu, 0x24 + (gate.ist - 1) * 8, 8)?
    } else if inner {
        frame::inner_stack64(cpu, cpl)?
    } else {
        cpu.st.gpr[reg::RSP]
    };
    let mut frame = Frame::new();
    frame.push(u64::from(cpu.st.seg[seg::SS].selector));
    frame.push(cpu.st.gpr[reg::RSP]);
    frame.push(saved_flags(cpu, event));
    frame.push(u64::from(cpu.st.seg[seg::CS].selector));
    frame.push(event.return_ip);
    if let Some(error) = event.error {
        frame.push(u64::from(error));
    }
    // The frame is aligned to 16 bytes (SDM 3A, 6.14.2).
    let rsp = frame::write64(cpu, top & !15, &frame, cpl == 3, gate.offset)?;
    if inner {
        cpu.st.seg[seg::SS] = null_segment(u16::from(cpl), cpl);
    }
    cpu.st.gpr[reg::RSP] = rsp;
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = gate.offset;
    enter_flags(cpu, gate);
    Ok(())
}

fn enter_protected(cpu: &mut Cpu, event: &Event, gate: &Gate) -> R<()> {
    let (code, cpl) = read_handler(cpu, gate)?;
    let from_vm86 = cpu.st.vm86();
    if from_vm86 && cpl != 0 {
        return gp(code_of(gate.selector));
    }
    let inner = cpl < cpu.st.cpl;
    let selector = |cpu: &Cpu, index: usize| u64::from(cpu.st.seg[index].selector);
    let mut frame = Frame::new();
    let (stack, sp, error) = if inner {
        let (stack, sp) = frame::inner_stack(cpu, cpl)?;
        if from_vm86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(selector(cpu, index));
            }
        }
        frame.push(selector(cpu, seg::SS));
        frame.push(cpu.st.gpr[reg::RSP]);
        (stack, sp, code_of(stack.selector))
    } else {
        (cpu.st.seg[seg::SS], cpu.st.gpr[reg::RSP], 0)
    };
    frame.push(saved_flags(cpu, event));
    frame.push(selector(cpu, seg::CS));
    frame.push(event.return_ip);
    if let Some(error) = event.error {
        frame.push(u64::from(error));
    }
    if gate.offset > u64::from(code.limit) {
        return gp(0);
    }
    let sp = frame::write(cpu, &stack, sp, gate.size, &frame, cpl == 3, error)?;

    if inner {
        cpu.st.seg[seg::SS] = stack;
    }
    frame::set_sp(cpu, &stack, sp);
    if from_vm86 {
        for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
            cpu.st.seg[index] = null_segment(0, 0);
        }
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = gate.offset;
    enter_flags(cpu, gate);
    Ok(())
}

#[cfg(test)]
pub mod fixture;

#[cfg(test)]
mod tests;
