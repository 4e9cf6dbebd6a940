//! JMP and CALL to a system descriptor: call gates, task gates and task-state
//! segments (Intel SDM 3A, 5.8.3 to 5.8.5 and 7.3; 2A, "CALL" and "JMP").

use tetrarch_engine::Segment;

use super::frame::{self, Frame};
use super::segment::{
    Descriptor, check_target, code_of, fail, is_null, null_segment, read_descriptor, system_type,
    upper_half, usable_code,
};
use super::task::{self, From, Reason};
use super::{Flow, operand};
use crate::cpu::Cpu;
use crate::state::fault::{R, gp, vector};
use crate::state::mask;
use crate::state::{attr, reg, seg};

/// Which instruction transfers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    Jump,
    Call,
}

/// JMP or CALL to `selector`, whose descriptor is none of code.
pub fn transfer(
    cpu: &mut Cpu,
    how: Transfer,
    next_ip: u64,
    selector: u16,
    descriptor: Descriptor,
) -> R<Flow> {
    let error = code_of(selector);
    let long = cpu.st.long_mode();
    let kind = descriptor.kind();
    let is_gate = match kind {
        system_type::CALL_GATE => true,
        system_type::CALL_GATE16 | system_type::TASK_GATE if !long => true,
        system_type::TSS_AVAILABLE | system_type::TSS16_AVAILABLE if !long => false,
        _ => return gp(error),
    };
    if descriptor.dpl() < cpu.st.cpl.max((selector & 3) as u8) {
        return gp(error);
    }
    if is_gate && !descriptor.present() {
        return fail(vector::NP, error);
    }
    match kind {
        system_type::CALL_GATE | system_type::CALL_GATE16 => {
            call_gate(cpu, how, next_ip, selector, descriptor)
        }
        _ => {
            let tss = if is_gate { (descriptor.0 >> 16) as u16 } else { selector };
            let reason = if how == Transfer::Jump { Reason::Jump } else { Reason::Nest };
            let from = From { rip: next_ip, flags: cpu.st.rflags() };
            task::switch(cpu, tss, reason, from, None)?;
            Ok(Flow::Jump)
        }
    }
}

fn call_gate(
    cpu: &mut Cpu,
    how: Transfer,
    next_ip: u64,
    selector: u16,
    gate: Descriptor,
) -> R<Flow> {
    let long = cpu.st.long_mode();
    let size = match gate.kind() {
        _ if long => 8,
        system_type::CALL_GATE => 4,
        _ => 2,
    };
    let mut offset = gate.0 & 0xFFFF;
    if size > 2 {
        offset |= gate.0 >> 32 & 0xFFFF_0000;
    }
    if long {
        offset |= upper_half(cpu, selector)? << 32;
    }
    let (code, cpl) = gate_target(cpu, how, (gate.0 >> 16) as u16)?;
    if how == Transfer::Call {
        push_frame(cpu, next_ip, size, cpl, gate, &code, offset)?;
    } else {
        check_target(cpu, &code, offset)?;
    }
    cpu.st.seg[seg::CS] = code;
    cpu.st.cpl = cpl;
    cpu.st.rip = offset;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// The code segment of a call gate, and the privilege level that it leads to.
fn gate_target(cpu: &mut Cpu, how: Transfer, selector: u16) -> R<(Segment, u8)> {
    if is_null(selector) {
        return gp(0);
    }
    let error = code_of(selector);
    let cpl = cpu.st.cpl;
    let descriptor = read_descriptor(cpu, selector, vector::GP, 0)?;
    let dpl = descriptor.dpl();
    let same_level = how == Transfer::Jump && !descriptor.is_conforming();
    if !descriptor.is_code() || dpl > cpl || same_level && dpl != cpl {
        return gp(error);
    }
    // In long mode a call gate leads to 64-bit code alone.
    if cpu.st.long_mode() && descriptor.attributes() & (attr::L | attr::DB) != attr::L {
        return gp(error);
    }
    let cpl = if descriptor.is_conforming() { cpl } else { dpl };
    Ok((usable_code(cpu, selector, descriptor, cpl)?, cpl))
}

/// Pushes what the procedure returns to, with the parameters if the stack
/// changes, and leaves RSP and SS as the procedure finds them.
fn push_frame(
    cpu: &mut Cpu,
    next_ip: u64,
    size: usize,
    cpl: u8,
    gate: Descriptor,
    code: &Segment,
    target: u64,
) -> R<()> {
    let inner = cpl < cpu.st.cpl;
    let mut values = Frame::new();
    if inner {
        values.push(u64::from(cpu.st.seg[seg::SS].selector));
        values.push(cpu.st.gpr[reg::RSP]);
    }
    if size == 8 {
        values.push(u64::from(cpu.st.seg[seg::CS].selector));
        values.push(next_ip);
        let top = if inner { frame::inner_stack64(cpu, cpl)? } else { cpu.st.gpr[reg::RSP] };
        let rsp = frame::write64(cpu, top, &values, cpl == 3, target)?;
        cpu.st.gpr[reg::RSP] = rsp;
        if inner {
            cpu.st.seg[seg::SS] = null_segment(u16::from(cpl), cpl);
        }
        return Ok(());
    }
    let (stack, sp, error) = if inner {
        let (stack, sp) = frame::inner_stack(cpu, cpl)?;
        copy_parameters(cpu, &mut values, (gate.0 >> 32 & 31) as usize, size)?;
        (stack, sp, code_of(stack.selector))
    } else {
        (cpu.st.seg[seg::SS], cpu.st.gpr[reg::RSP], 0)
    };
    values.push(u64::from(cpu.st.seg[seg::CS].selector));
    values.push(next_ip & mask(size));
    let top = frame::check(&stack, sp, size, &values, error)?;
    check_target(cpu, code, target)?;
    frame::write(cpu, &stack, sp, size, &values, cpl == 3, error)?;
    if inner {
        cpu.st.seg[seg::SS] = stack;
    }
    frame::set_sp(cpu, &stack, top);
    Ok(())
}

/// Parameters lie on the caller's stack, the last one pushed lowest; they keep
/// their order on the new one.
fn copy_parameters(cpu: &mut Cpu, values: &mut Frame, count: usize, size: usize) -> R<()> {
    let sp = cpu.st.gpr[reg::RSP];
    for n in (0..count).rev() {
        let at = sp.wrapping_add((n * size) as u64) & operand::stack_mask(cpu);
        let parameter = operand::stack_load(cpu, at, size)?;
        values.push(parameter);
    }
    Ok(())
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
