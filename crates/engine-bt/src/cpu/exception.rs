//! Delivery of exceptions and interrupts (Intel SDM 3A, chapter 6; 20.1.4 for
//! real mode, 21.3 for virtual-8086 mode).
//!
//! All that can fault is read, checked or probed before the first change of
//! state, so that a fault met on the way finds the CPU as it was.

use tetrarch_engine::Segment;

use crate::cpu::Cpu;
use crate::cpu::fault::{Fault, R, Stop, gp, vector};
use crate::cpu::state::{attr, flag, reg, seg};
use crate::interp::segment::{
    code_of, fail, inside, is_null, mark_accessed, null_segment, read_descriptor, system_type,
    table_address, with_ext,
};
use crate::memory::mmu::canonical;

/// DR6: the breakpoints hit, BD, BS and BT.
const DR6_CAUSES: u64 = 0xE00F;
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
/// For #DB the causes of DR6 are in `fault.address`, if they are not there yet.
pub fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), Stop> {
    record(cpu, fault);
    let event = Event::exception(cpu, fault);
    dispatch(cpu, event, true)
}

/// Delivers an external interrupt.
pub fn interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), Stop> {
    cpu.st.halted = 0;
    let event = Event::external(cpu, vector);
    dispatch(cpu, event, false)
}

/// Delivers an NMI and blocks further ones until IRET.
pub fn nmi(cpu: &mut Cpu) -> Result<(), Stop> {
    cpu.st.halted = 0;
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
    if kind == SoftwareInterrupt::IntN && cpu.st.vm86() && cpu.st.flags & flag::IOPL != flag::IOPL {
        return gp(0);
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
    enter(cpu, &event)
}

/// What an exception leaves in registers whether or not its handler is reached.
fn record(cpu: &mut Cpu, fault: Fault) {
    match fault.vector {
        vector::PF => cpu.st.cr2 = fault.address,
        vector::DB => {
            cpu.st.dr[6] |= fault.address & DR6_CAUSES;
            cpu.st.dr[7] &= !DR7_GD;
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
    } else if cpu.st.long_mode() {
        enter_long(cpu, event)
    } else {
        enter_protected(cpu, event)
    };
    result.map_err(|stop| with_ext(stop, event.ext))?;
    cpu.st.shadow = 0;
    cpu.replay.clear();
    cpu.update_mode();
    Ok(())
}

/// The flags to save.
fn saved_flags(cpu: &Cpu, event: &Event) -> u64 {
    cpu.st.rflags() | if event.resume { flag::RF } else { 0 }
}

/// Values for a stack, in the order of their pushes.
#[derive(Default)]
struct Frame {
    values: [u64; 10],
    len: usize,
}

impl Frame {
    fn push(&mut self, value: u64) {
        self.values[self.len] = value;
        self.len += 1;
    }

    fn values(&self) -> &[u64] {
        &self.values[..self.len]
    }
}

/// Writes `frame` below `sp` of a segmented stack and returns the new stack
/// pointer. Faults with #SS(`error`) before anything is written.
fn write_frame(
    cpu: &mut Cpu,
    stack: &Segment,
    sp: u64,
    size: usize,
    frame: &Frame,
    user: bool,
    error: u32,
) -> R<u64> {
    let mask = if stack.attributes & attr::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
    let slot = |n: usize| sp.wrapping_sub((size * (n + 1)) as u64) & mask;
    let linear = |offset: u64| stack.base.wrapping_add(offset) & 0xFFFF_FFFF;
    for n in 0..frame.len {
        if !inside(stack, slot(n), size) {
            return fail(vector::SS, error);
        }
    }
    for n in 0..frame.len {
        cpu.probe_write(linear(slot(n)), size, user)?;
    }
    for (n, &value) in frame.values().iter().enumerate() {
        cpu.store(linear(slot(n)), size, value, user)?;
    }
    Ok(slot(frame.len.wrapping_sub(1)))
}

/// Sets the part of RSP that a stack of this segment uses.
fn set_sp(cpu: &mut Cpu, stack: &Segment, sp: u64) {
    let rsp = &mut cpu.st.gpr[reg::RSP];
    *rsp = if stack.attributes & attr::DB != 0 { sp } else { *rsp & !0xFFFF | sp & 0xFFFF };
}

fn enter_real(cpu: &mut Cpu, event: &Event) -> R<()> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(cpu.st.idt.limit) {
        return gp(0);
    }
    let slot = table_address(cpu, cpu.st.idt.base, offset);
    let entry = cpu.load(slot, 4, false)?;
    let mut frame = Frame::default();
    frame.push(cpu.st.rflags() & 0xFFFF);
    frame.push(u64::from(cpu.st.seg[seg::CS].selector));
    frame.push(event.return_ip & 0xFFFF);
    let stack = cpu.st.seg[seg::SS];
    let sp = write_frame(cpu, &stack, cpu.st.gpr[reg::RSP], 2, &frame, false, 0)?;
    set_sp(cpu, &stack, sp);
    let selector = (entry >> 16) as u16;
    cpu.st.seg[seg::CS] = crate::interp::segment::real_segment(cpu, seg::CS, selector);
    cpu.st.rip = entry & 0xFFFF;
    let clear = flag::IF | flag::TF | flag::AC | flag::RF;
    let flags = cpu.st.rflags() & !clear;
    cpu.st.set_rflags(flags);
    Ok(())
}

/// A gate of the IDT, checked as far as the gate itself goes.
struct Gate {
    selector: u16,
    offset: u64,
    ist: u64,
    /// Clears IF.
    interrupt: bool,
    /// Bytes of a slot of its frame: 2 or 4; in long mode always 8.
    size: usize,
}

fn read_gate(cpu: &mut Cpu, event: &Event) -> R<Gate> {
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
        // Task gates are refused: there are no task switches here.
        _ => return gp(error),
    };
    let dpl = (low >> 45 & 3) as u8;
    if event.software && dpl < cpu.st.cpl {
        return gp(error);
    }
    if low >> 47 & 1 == 0 {
        return fail(vector::NP, error);
    }
    let mut offset = low & 0xFFFF;
    if size == 4 {
        offset |= low >> 32 & 0xFFFF_0000;
    }
    if long {
        offset |= high << 32;
    }
    Ok(Gate { selector: (low >> 16) as u16, offset, ist: low >> 32 & 7, interrupt, size })
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

/// Loads a field of the TSS; #TS with the selector of the TSS if it is too short.
fn load_tss(cpu: &mut Cpu, offset: u64, size: usize) -> R<u64> {
    let tr = cpu.st.seg[seg::TR];
    if offset + size as u64 - 1 > u64::from(tr.limit) {
        return fail(vector::TS, code_of(tr.selector));
    }
    let address = table_address(cpu, tr.base, offset);
    cpu.load(address, size, false)
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

fn enter_long(cpu: &mut Cpu, event: &Event) -> R<()> {
    let gate = read_gate(cpu, event)?;
    let (code, cpl) = read_handler(cpu, &gate)?;
    let inner = cpl < cpu.st.cpl;
    let top = if gate.ist != 0 {
        load_tss(cpu, 0x24 + (gate.ist - 1) * 8, 8)?
    } else if inner {
        load_tss(cpu, 4 + u64::from(cpl) * 8, 8)?
    } else {
        cpu.st.gpr[reg::RSP]
    };
    let mut frame = Frame::default();
    frame.push(u64::from(cpu.st.seg[seg::SS].selector));
    frame.push(cpu.st.gpr[reg::RSP]);
    frame.push(saved_flags(cpu, event));
    frame.push(u64::from(cpu.st.seg[seg::CS].selector));
    frame.push(event.return_ip);
    if let Some(error) = event.error {
        frame.push(u64::from(error));
    }
    // The frame is aligned to 16 bytes (SDM 3A, 6.14.2).
    let top = top & !15;
    let len = frame.len * 8;
    let rsp = top.wrapping_sub(len as u64);
    if !canonical(rsp) || !canonical(top.wrapping_sub(1)) {
        return fail(vector::SS, 0);
    }
    if !canonical(gate.offset) {
        return gp(0);
    }
    let mut bytes = [0; 48];
    for (n, value) in frame.values().iter().enumerate() {
        let at = len - (n + 1) * 8;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    cpu.store_bytes(rsp, &bytes[..len], cpl == 3)?;

    if inner {
        cpu.st.seg[seg::SS] = null_segment(u16::from(cpl), cpl);
    }
    cpu.st.gpr[reg::RSP] = rsp;
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = gate.offset;
    enter_flags(cpu, &gate);
    Ok(())
}

/// SS:ESP of `cpl` in a 32-bit or 16-bit TSS, and the loaded segment.
fn inner_stack(cpu: &mut Cpu, cpl: u8) -> R<(Segment, u64)> {
    let level = u64::from(cpl);
    let kind = cpu.st.seg[seg::TR].attributes & attr::TYPE;
    let (sp, selector) = if kind == system_type::TSS_BUSY {
        (load_tss(cpu, 4 + level * 8, 4)?, load_tss(cpu, 8 + level * 8, 2)?)
    } else {
        (load_tss(cpu, 2 + level * 4, 2)?, load_tss(cpu, 4 + level * 4, 2)?)
    };
    let selector = selector as u16;
    if is_null(selector) {
        return fail(vector::TS, 0);
    }
    let code = code_of(selector);
    let descriptor = read_descriptor(cpu, selector, vector::TS, 0)?;
    if (selector & 3) as u8 != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
        return fail(vector::TS, code);
    }
    if !descriptor.present() {
        return fail(vector::SS, code);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok((descriptor.segment(selector), sp))
}

fn enter_protected(cpu: &mut Cpu, event: &Event) -> R<()> {
    let gate = read_gate(cpu, event)?;
    let (code, cpl) = read_handler(cpu, &gate)?;
    let from_vm86 = cpu.st.vm86();
    if from_vm86 && cpl != 0 {
        return gp(code_of(gate.selector));
    }
    let inner = cpl < cpu.st.cpl;
    let selector = |cpu: &Cpu, index: usize| u64::from(cpu.st.seg[index].selector);
    let mut frame = Frame::default();
    let (stack, sp, error) = if inner {
        let (stack, sp) = inner_stack(cpu, cpl)?;
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
    let sp = write_frame(cpu, &stack, sp, gate.size, &frame, cpl == 3, error)?;

    if inner {
        cpu.st.seg[seg::SS] = stack;
    }
    set_sp(cpu, &stack, sp);
    if from_vm86 {
        for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
            cpu.st.seg[index] = null_segment(0, 0);
        }
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = gate.offset;
    enter_flags(cpu, &gate);
    Ok(())
}

#[cfg(test)]
pub mod fixture;

#[cfg(test)]
mod tests;
