//! Far transfers: JMP, CALL, RETF, INT n and IRET (Intel SDM 2A and 2B; 3A,
//! chapters 5, 6, 20 and 21).
//!
//! What goes through a gate or to another task is in [`super::gate`] and
//! [`super::task`].

use iced_x86::{Code, Instruction, Mnemonic};
use tetrarch_engine::Segment;

use super::gate::{self, Transfer};
use super::segment::{
    Descriptor, check_target, code_of, drop_inner_segments, fail, is_code64, is_null,
    mark_accessed, null_segment, read_descriptor, read_far_pointer, real_segment, usable_code,
};
use super::task::{self, From, Reason};
use super::{Flow, debug, frame, operand, stack};
use crate::cpu::Cpu;
use crate::interp::exception::{SoftwareInterrupt, software_interrupt};
use crate::state::fault::{R, Stop, gp, vector};
use crate::state::mask;
use crate::state::{attr, flag, reg, seg};

/// The flags that a return to virtual-8086 mode loads: all but RF and reserved
/// bits.
const VM86_FLAGS: u64 = 0x3E_7FD7;

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let result =
        match i.code() {
            Code::Jmp_ptr1616 | Code::Jmp_ptr1632 => {
                let (offset, selector) = pointer(i);
                jump(cpu, i, offset, selector)
            }
            Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 => read_far_pointer(cpu, i)
                .and_then(|(offset, selector)| jump(cpu, i, offset, selector)),
            Code::Call_ptr1616 | Code::Call_ptr1632 => {
                let (offset, selector) = pointer(i);
                call(cpu, i, offset, selector)
            }
            Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 => read_far_pointer(cpu, i)
                .and_then(|(offset, selector)| call(cpu, i, offset, selector)),
            Code::Retfw => ret(cpu, 2, 0),
            Code::Retfd => ret(cpu, 4, 0),
            Code::Retfq => ret(cpu, 8, 0),
            Code::Retfw_imm16 => ret(cpu, 2, u64::from(i.immediate16())),
            Code::Retfd_imm16 => ret(cpu, 4, u64::from(i.immediate16())),
            Code::Retfq_imm16 => ret(cpu, 8, u64::from(i.immediate16())),
            Code::Iretw => iret(cpu, i, 2),
            Code::Iretd => iret(cpu, i, 4),
            Code::Iretq => iret(cpu, i, 8),
            _ => match i.mnemonic() {
                Mnemonic::Int => software(cpu, i, i.immediate8(), SoftwareInterrupt::IntN),
                Mnemonic::Int3 => debug::ask_whose_int3(cpu)
                    .and_then(|()| software(cpu, i, vector::BP, SoftwareInterrupt::Int3)),
                Mnemonic::Int1 => software(cpu, i, vector::DB, SoftwareInterrupt::Int1),
                Mnemonic::Into if cpu.st.flags & flag::OF == 0 => Ok(Flow::Next),
                Mnemonic::Into => software(cpu, i, vector::OF, SoftwareInterrupt::Into),
                _ => return None,
            },
        };
    Some(result)
}

fn pointer(i: &Instruction) -> (u64, u16) {
    let offset = if i.code() == Code::Jmp_ptr1616 || i.code() == Code::Call_ptr1616 {
        u64::from(i.far_branch16())
    } else {
        u64::from(i.far_branch32())
    };
    (offset, i.far_branch_selector())
}

fn software(cpu: &mut Cpu, i: &Instruction, number: u8, kind: SoftwareInterrupt) -> R<Flow> {
    software_interrupt(cpu, number, i.next_ip(), kind)?;
    Ok(Flow::Jump)
}

/// Real mode and virtual-8086 mode have no descriptors.
fn without_descriptors(cpu: &Cpu) -> bool {
    !cpu.st.protected() || cpu.st.vm86()
}

/// What the selector of a far JMP or CALL names in protected mode.
fn named_descriptor(cpu: &mut Cpu, selector: u16) -> R<Descriptor> {
    if is_null(selector) { gp(0) } else { read_descriptor(cpu, selector, vector::GP, 0) }
}

/// The code segment that a far JMP or CALL at the same privilege goes to.
fn direct_target(cpu: &mut Cpu, selector: u16, descriptor: Descriptor) -> R<Segment> {
    let error = code_of(selector);
    let cpl = cpu.st.cpl;
    if !descriptor.is_code() {
        return gp(error);
    }
    let allowed = if descriptor.is_conforming() {
        descriptor.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && descriptor.dpl() == cpl
    };
    if !allowed {
        return gp(error);
    }
    usable_code(cpu, selector, descriptor, cpl)
}

fn jump(cpu: &mut Cpu, i: &Instruction, offset: u64, selector: u16) -> R<Flow> {
    let code = if without_descriptors(cpu) {
        real_segment(cpu, seg::CS, selector)
    } else {
        let descriptor = named_descriptor(cpu, selector)?;
        if descriptor.is_system() {
            return gate::transfer(cpu, Transfer::Jump, i.next_ip(), selector, descriptor);
        }
        direct_target(cpu, selector, descriptor)?
    };
    check_target(cpu, &code, offset)?;
    cpu.st.seg[seg::CS] = code;
    cpu.st.rip = offset;
    cpu.update_mode();
    Ok(Flow::Jump)
}

fn call(cpu: &mut Cpu, i: &Instruction, offset: u64, selector: u16) -> R<Flow> {
    let size = match i.code() {
        Code::Call_ptr1616 | Code::Call_m1616 => 2,
        Code::Call_ptr1632 | Code::Call_m1632 => 4,
        _ => 8,
    };
    let code = if without_descriptors(cpu) {
        real_segment(cpu, seg::CS, selector)
    } else {
        let descriptor = named_descriptor(cpu, selector)?;
        if descriptor.is_system() {
            return gate::transfer(cpu, Transfer::Call, i.next_ip(), selector, descriptor);
        }
        direct_target(cpu, selector, descriptor)?
    };
    check_target(cpu, &code, offset)?;
    let rsp = cpu.st.gpr[reg::RSP];
    let old = u64::from(cpu.st.seg[seg::CS].selector);
    operand::push(cpu, old, size)?;
    if let Err(stop) = operand::push(cpu, i.next_ip() & mask(size), size) {
        cpu.st.gpr[reg::RSP] = rsp;
        return Err(stop);
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.rip = offset;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// Reads slot `n` above the stack pointer, `extra` bytes further up.
fn slot(cpu: &mut Cpu, n: u64, size: usize, extra: u64) -> R<u64> {
    let offset = n * size as u64 + extra;
    let sp = cpu.st.gpr[reg::RSP].wrapping_add(offset) & operand::stack_mask(cpu);
    operand::stack_load(cpu, sp, size)
}

/// The code segment of RETF or IRET; its RPL is the new privilege level.
fn return_target(cpu: &mut Cpu, selector: u16, offset: u64) -> R<Segment> {
    if is_null(selector) {
        return gp(0);
    }
    let error = code_of(selector);
    let rpl = (selector & 3) as u8;
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    if !descriptor.is_code() || rpl < cpu.st.cpl {
        return gp(error);
    }
    let allowed =
        if descriptor.is_conforming() { descriptor.dpl() <= rpl } else { descriptor.dpl() == rpl };
    if !allowed {
        return gp(error);
    }
    let code = usable_code(cpu, selector, descriptor, rpl)?;
    check_target(cpu, &code, offset)?;
    Ok(code)
}

/// The stack segment that goes with `code` at privilege `cpl`.
fn return_stack(cpu: &mut Cpu, selector: u16, code: &Segment, cpl: u8) -> R<Segment> {
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if is_code64(cpu, code) && cpl != 3 && rpl == cpl {
            return Ok(null_segment(selector, cpl));
        }
        return gp(0);
    }
    let error = code_of(selector);
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
        return gp(error);
    }
    if !descriptor.present() {
        return fail(vector::SS, error);
    }
    mark_accessed(cpu, selector, descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Loads RSP as far as the returned-to stack uses it. The rest of it stays as
/// it was: what a 16-bit stack segment does on hardware.
fn set_return_sp(cpu: &mut Cpu, code: &Segment, stack: &Segment, sp: u64) {
    let code64 = is_code64(cpu, code);
    let rsp = &mut cpu.st.gpr[reg::RSP];
    *rsp = if code64 {
        sp
    } else if stack.attributes & attr::DB != 0 {
        sp & 0xFFFF_FFFF
    } else {
        *rsp & !0xFFFF | sp & 0xFFFF
    };
}

fn ret(cpu: &mut Cpu, size: usize, release: u64) -> R<Flow> {
    let offset = slot(cpu, 0, size, 0)?;
    let selector = slot(cpu, 1, size, 0)? as u16;
    let popped = 2 * size as u64 + release;
    if without_descriptors(cpu) {
        let code = real_segment(cpu, seg::CS, selector);
        check_target(cpu, &code, offset)?;
        cpu.st.seg[seg::CS] = code;
        cpu.st.rip = offset;
        let sp = cpu.st.gpr[reg::RSP].wrapping_add(popped);
        operand::set_sp(cpu, sp);
        cpu.update_mode();
        return Ok(Flow::Jump);
    }
    let code = return_target(cpu, selector, offset)?;
    let cpl = (selector & 3) as u8;
    if cpl == cpu.st.cpl {
        // The width of the stack pointer is that of the code that returns.
        let sp = cpu.st.gpr[reg::RSP].wrapping_add(popped);
        operand::set_sp(cpu, sp);
    } else {
        let sp = slot(cpu, 2, size, release)?;
        let stack_selector = slot(cpu, 3, size, release)? as u16;
        let stack = return_stack(cpu, stack_selector, &code, cpl)?;
        set_return_sp(cpu, &code, &stack, sp.wrapping_add(release));
        cpu.st.seg[seg::SS] = stack;
        cpu.st.cpl = cpl;
        drop_inner_segments(cpu, cpl);
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.rip = offset;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// Loads the flags that IRET may change.
fn return_flags(cpu: &mut Cpu, value: u64, size: usize) {
    let mut change = flag::ARITH | flag::TF | flag::DF | flag::NT;
    if size > 2 {
        change |= flag::AC | flag::ID;
        // RF only guards against instruction breakpoints; without them it would
        // stay until an interpreted instruction clears it.
        if cpu.st.dr[7] & 0xFF != 0 {
            change |= flag::RF;
        }
    }
    let old = cpu.st.rflags();
    let iopl = (old & flag::IOPL) >> 12;
    if !cpu.st.protected() {
        change |= flag::IF | flag::IOPL;
    } else {
        if u64::from(cpu.st.cpl) <= iopl {
            change |= flag::IF;
        }
        if cpu.st.cpl == 0 {
            change |= flag::IOPL;
            if size > 2 {
                change |= flag::VIF | flag::VIP;
            }
        }
    }
    cpu.st.set_rflags(old & !(change | flag::RF) | value & change);
}

/// IRET ends the blocking of NMIs, also where it faults (SDM 3A, 6.7.1).
fn iret(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<Flow> {
    let result = return_from_handler(cpu, i, size);
    if matches!(result, Ok(()) | Err(Stop::Fault(_))) {
        cpu.st.nmi_blocked = 0;
    }
    result?;
    cpu.update_mode();
    Ok(Flow::Jump)
}

fn return_from_handler(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<()> {
    if without_descriptors(cpu) {
        return iret_real(cpu, size);
    }
    if cpu.st.flags & flag::NT != 0 {
        return if cpu.st.long_mode() { gp(0) } else { return_to_task(cpu, i) };
    }
    let offset = slot(cpu, 0, size, 0)?;
    let selector = slot(cpu, 1, size, 0)? as u16;
    let flags = slot(cpu, 2, size, 0)?;
    if size == 4 && flags & flag::VM != 0 && cpu.st.cpl == 0 && !cpu.st.long_mode() {
        return iret_vm86(cpu, offset, selector, flags);
    }
    let code = return_target(cpu, selector, offset)?;
    let cpl = (selector & 3) as u8;
    let outer = cpl > cpu.st.cpl;
    if outer || cpu.st.code64() {
        let sp = slot(cpu, 3, size, 0)?;
        let stack_selector = slot(cpu, 4, size, 0)? as u16;
        let stack = return_stack(cpu, stack_selector, &code, cpl)?;
        // The flags depend on the old privilege level.
        return_flags(cpu, flags, size);
        set_return_sp(cpu, &code, &stack, sp);
        cpu.st.seg[seg::SS] = stack;
    } else {
        return_flags(cpu, flags, size);
        let sp = cpu.st.gpr[reg::RSP].wrapping_add(3 * size as u64);
        operand::set_sp(cpu, sp);
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = offset;
    if outer {
        drop_inner_segments(cpu, cpl);
    }
    Ok(())
}

/// IRET with NT set: back to the task that the link of this one names.
fn return_to_task(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let link = frame::load_tss(cpu, 0, 2)? as u16;
    let from = From { rip: i.next_ip(), flags: cpu.st.rflags() };
    task::switch(cpu, link, Reason::Return, from, None)?;
    Ok(())
}

fn iret_real(cpu: &mut Cpu, size: usize) -> R<()> {
    let virtual_if = stack::has_virtual_if(cpu, size)?;
    let offset = slot(cpu, 0, size, 0)?;
    let selector = slot(cpu, 1, size, 0)? as u16;
    let flags = slot(cpu, 2, size, 0)?;
    let code = real_segment(cpu, seg::CS, selector);
    check_target(cpu, &code, offset)?;
    if virtual_if {
        let flags = stack::loaded_virtual_flags(cpu, flags)?;
        cpu.st.set_rflags(flags);
    } else {
        return_flags(cpu, flags, size);
    }
    let sp = cpu.st.gpr[reg::RSP].wrapping_add(3 * size as u64);
    operand::set_sp(cpu, sp);
    cpu.st.seg[seg::CS] = code;
    cpu.st.rip = offset;
    Ok(())
}

/// To virtual-8086 mode, with all segment registers on the stack (SDM 3A,
/// 21.2.5).
fn iret_vm86(cpu: &mut Cpu, offset: u64, selector: u16, flags: u64) -> R<()> {
    let mut values = [0; 6];
    for (n, value) in values.iter_mut().enumerate() {
        *value = slot(cpu, 3 + n as u64, 4, 0)?;
    }
    if offset > 0xFFFF {
        return gp(0);
    }
    cpu.st.set_rflags(flags & VM86_FLAGS);
    cpu.st.cpl = 3;
    cpu.st.gpr[reg::RSP] = values[0];
    cpu.st.rip = offset;
    let selectors = [
        (seg::CS, selector),
        (seg::SS, values[1] as u16),
        (seg::ES, values[2] as u16),
        (seg::DS, values[3] as u16),
        (seg::FS, values[4] as u16),
        (seg::GS, values[5] as u16),
    ];
    for (index, selector) in selectors {
        cpu.st.seg[index] = real_segment(cpu, index, selector);
    }
    Ok(())
}

#[cfg(test)]
#[path = "far_tests.rs"]
mod tests;
