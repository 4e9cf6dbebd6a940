//! PUSH and POP of registers and flags, stack frames, CLI and STI.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Flow;
use super::operand::{
    self, linear, op_size, read_op, set_sp, stack_load, stack_mask, stack_store, write_gpr,
    write_op,
};
use crate::cpu::Cpu;
use crate::state::fault::{R, gp};
use crate::state::mask;
use crate::state::{cr, flag, reg, shadow};

/// Whether PUSH or POP names a segment register.
pub fn is_segment(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register()
}

pub fn push(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = read_op(cpu, i, 0)?;
    operand::push(cpu, value, op_size(i, 0))?;
    Ok(Flow::Next)
}

/// A destination in memory is addressed with RSP as it is after the pop, and POP
/// into RSP overwrites the increment (SDM 2B, POP).
pub fn pop(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let before = cpu.st.gpr[reg::RSP];
    let value = operand::pop(cpu, op_size(i, 0))?;
    if let Err(stop) = write_op(cpu, i, 0, value) {
        cpu.st.gpr[reg::RSP] = before;
        return Err(stop);
    }
    Ok(Flow::Next)
}

pub fn pusha(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = if i.code() == Code::Pushaw { 2 } else { 4 };
    let before = cpu.st.gpr[reg::RSP];
    for index in reg::RAX..=reg::RDI {
        let value = if index == reg::RSP { before } else { cpu.st.gpr[index] };
        if let Err(stop) = operand::push(cpu, value, size) {
            cpu.st.gpr[reg::RSP] = before;
            return Err(stop);
        }
    }
    Ok(Flow::Next)
}

pub fn popa(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = if i.code() == Code::Popaw { 2 } else { 4 };
    let m = stack_mask(cpu);
    let mut sp = cpu.st.gpr[reg::RSP] & m;
    let mut values = [0; 8];
    for value in values.iter_mut().rev() {
        *value = stack_load(cpu, sp, size)?;
        sp = sp.wrapping_add(size as u64) & m;
    }
    for (index, value) in values.into_iter().enumerate() {
        // The image's stack pointer is skipped.
        if index != reg::RSP {
            write_gpr(cpu, index, size, value);
        }
    }
    set_sp(cpu, sp);
    Ok(Flow::Next)
}

fn iopl(cpu: &Cpu) -> u8 {
    (cpu.st.flags >> 12 & 3) as u8
}

/// Whether IF of virtual-8086 code is VIF: below IOPL 3 with CR4.VME, and there in PUSHF, POPF
/// and IRET of 16 bits alone (SDM 3B, 20.3.1). What has no such form is #GP(0).
pub fn has_virtual_if(cpu: &Cpu, size: usize) -> R<bool> {
    let virtual_if = cpu.st.vm86() && iopl(cpu) < 3;
    if virtual_if && (size != 2 || cpu.st.cr4 & cr::CR4_VME == 0) {
        return gp(0);
    }
    Ok(virtual_if)
}

/// FLAGS as virtual-8086 code with a virtual IF sees them.
pub fn with_virtual_if(cpu: &Cpu) -> u64 {
    let flags = cpu.st.rflags();
    let shown = if flags & flag::VIF != 0 { flag::IF } else { 0 };
    flags & !flag::IF | flag::IOPL | shown
}

/// The flags after a load of `image` there. #GP(0) where the monitor waits for the code to
/// take interrupts, and for single steps.
pub fn loaded_virtual_flags(cpu: &Cpu, image: u64) -> R<u64> {
    let old = cpu.st.rflags();
    if image & flag::TF != 0 || image & flag::IF != 0 && old & flag::VIP != 0 {
        return gp(0);
    }
    let writable = flag::ARITH | flag::DF | flag::NT;
    let vif = if image & flag::IF != 0 { flag::VIF } else { 0 };
    Ok(old & !(writable | flag::TF | flag::RF | flag::VIF) | image & writable | vif)
}

pub fn pushf(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = match i.code() {
        Code::Pushfw => 2,
        Code::Pushfd => 4,
        _ => 8,
    };
    let flags = if has_virtual_if(cpu, size)? { with_virtual_if(cpu) } else { cpu.st.rflags() };
    // The image has VM and RF clear (SDM 2B, PUSHF).
    let image = (flags & !(flag::VM | flag::RF) | flag::FIXED) & mask(size);
    operand::push(cpu, image, size)?;
    Ok(Flow::Next)
}

/// The flags after POPF or an equal load of `image` at the current privilege:
/// IOPL changes only at CPL 0, IF only where CPL <= IOPL (SDM 2B, POPF).
pub fn loaded_flags(cpu: &Cpu, image: u64, size: usize) -> u64 {
    let mut writable = flag::ARITH | flag::TF | flag::DF | flag::NT;
    if size > 2 {
        // RF is cleared; VM, VIF and VIP stay.
        writable |= flag::AC | flag::ID;
    }
    if !cpu.st.protected() || cpu.st.cpl <= iopl(cpu) {
        writable |= flag::IF;
    }
    if !cpu.st.protected() || cpu.st.cpl == 0 {
        writable |= flag::IOPL;
    }
    let kept = cpu.st.rflags() & !if size > 2 { flag::RF } else { 0 };
    kept & !writable | image & writable
}

pub fn popf(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = match i.code() {
        Code::Popfw => 2,
        Code::Popfd => 4,
        _ => 8,
    };
    let flags = if has_virtual_if(cpu, size)? {
        let before = cpu.st.gpr[reg::RSP];
        let image = operand::pop(cpu, size)?;
        loaded_virtual_flags(cpu, image).inspect_err(|_| cpu.st.gpr[reg::RSP] = before)?
    } else {
        let image = operand::pop(cpu, size)?;
        loaded_flags(cpu, image, size)
    };
    cpu.st.set_rflags(flags);
    cpu.update_mode();
    Ok(Flow::Next)
}

/// CLI and STI (SDM 2A, CLI; 2B, STI). STI that sets IF holds interrupts back
/// for one more instruction.
pub fn cli_sti(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let set = i.mnemonic() == iced_x86::Mnemonic::Sti;
    if cpu.st.protected() && cpu.st.cpl > iopl(cpu) {
        return cli_sti_virtual(cpu, set);
    }
    if set && cpu.st.iflag == 0 {
        cpu.st.shadow = shadow::STI;
    }
    cpu.st.iflag = u8::from(set);
    Ok(Flow::Next)
}

/// User code below IOPL 3 has VIF instead: in virtual-8086 mode with CR4.VME, else with CR4.PVI
/// (SDM 3B, 20.3.1 and 20.4).
fn cli_sti_virtual(cpu: &mut Cpu, set: bool) -> R<Flow> {
    let offered = if cpu.st.vm86() { cr::CR4_VME } else { cr::CR4_PVI };
    let pending = cpu.st.flags & flag::VIP != 0;
    if cpu.st.cpl != 3 || cpu.st.cr4 & offered == 0 || set && pending {
        return gp(0);
    }
    cpu.st.update_flags(flag::VIF, if set { flag::VIF } else { 0 });
    Ok(Flow::Next)
}

/// ENTER. Nothing but the stack's memory has changed if it faults.
pub fn enter(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let allocate = u64::from(i.immediate16());
    let level = i.immediate8_2nd() & 31;
    let m = stack_mask(cpu);
    let step = size as u64;
    let rbp = cpu.st.gpr[reg::RBP];

    let mut sp = cpu.st.gpr[reg::RSP].wrapping_sub(step) & m;
    stack_store(cpu, sp, size, rbp)?;
    let frame = sp;
    let mut outer = rbp;
    for _ in 1..level {
        outer = outer.wrapping_sub(step) & m;
        let link = stack_load(cpu, outer, size)?;
        sp = sp.wrapping_sub(step) & m;
        stack_store(cpu, sp, size, link)?;
    }
    if level > 0 {
        sp = sp.wrapping_sub(step) & m;
        stack_store(cpu, sp, size, frame)?;
    }
    sp = sp.wrapping_sub(allocate) & m;
    // A write at the final stack pointer must be possible (SDM 2A, ENTER).
    let last = linear(cpu, Register::SS, sp, size, true)?;
    let user = cpu.user();
    cpu.probe_write(last, size, user)?;
    write_gpr(cpu, reg::RBP, size, frame);
    set_sp(cpu, sp);
    Ok(Flow::Next)
}

pub fn leave(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let frame = cpu.st.gpr[reg::RBP] & stack_mask(cpu);
    let value = stack_load(cpu, frame, size)?;
    set_sp(cpu, frame.wrapping_add(size as u64));
    write_gpr(cpu, reg::RBP, size, value);
    Ok(Flow::Next)
}
