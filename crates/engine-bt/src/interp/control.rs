//! Near branches, calls and returns.
//!
//! The target is checked before any state changes: it must be canonical in
//! 64-bit mode and inside the limit of CS elsewhere, or #GP(0) comes of the
//! branch itself (SDM 2A, JMP, CALL; 2B, RET).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::Flow;
use super::integer::condition;
use super::operand::{op_size, push, read_op, set_sp, stack_load, stack_mask, write_gpr};
use crate::cpu::Cpu;
use crate::state::address::canonical;
use crate::state::fault::{R, gp};
use crate::state::mask;
use crate::state::{flag, reg, seg};

/// Whether a JMP or CALL stays in its code segment.
pub fn is_near(i: &Instruction) -> bool {
    i.is_jmp_short_or_near()
        || i.is_jmp_near_indirect()
        || i.is_call_near()
        || i.is_call_near_indirect()
}

/// Whether RIP may become `target`.
#[inline]
pub fn check_target(cpu: &Cpu, target: u64) -> R<()> {
    let allowed = if cpu.st.code64() {
        canonical(target)
    } else {
        target <= u64::from(cpu.st.seg[seg::CS].limit)
    };
    if allowed { Ok(()) } else { gp(0) }
}

#[inline]
fn branch(cpu: &mut Cpu, target: u64) -> R<Flow> {
    check_target(cpu, target)?;
    cpu.st.rip = target;
    Ok(Flow::Jump)
}

pub fn jmp(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let target = read_op(cpu, i, 0)?;
    branch(cpu, target)
}

#[inline]
pub fn jcc(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    if condition(cpu, i) { branch(cpu, i.near_branch_target()) } else { Ok(Flow::Next) }
}

pub fn call(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let target = read_op(cpu, i, 0)?;
    check_target(cpu, target)?;
    push(cpu, i.next_ip(), op_size(i, 0))?;
    cpu.st.rip = target;
    Ok(Flow::Jump)
}

pub fn ret(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let sp = cpu.st.gpr[reg::RSP] & stack_mask(cpu);
    let target = stack_load(cpu, sp, size)?;
    check_target(cpu, target)?;
    let extra = if i.op0_kind() == OpKind::Immediate16 { u64::from(i.immediate16()) } else { 0 };
    set_sp(cpu, sp.wrapping_add(size as u64 + extra));
    cpu.st.rip = target;
    Ok(Flow::Jump)
}

/// The width of the counter of LOOPcc and JrCXZ: that of addresses.
fn counter_size(code: Code) -> usize {
    match code {
        Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Jecxz_rel8_16
        | Code::Jecxz_rel8_32
        | Code::Jecxz_rel8_64
        | Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}

/// JCXZ, JECXZ, JRCXZ, LOOP, LOOPE, LOOPNE.
pub fn count_branch(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = counter_size(i.code());
    let counter = cpu.st.gpr[reg::RCX] & mask(size);
    let zero = cpu.st.flags & flag::ZF != 0;
    let (decrement, taken) = match i.mnemonic() {
        Mnemonic::Loop => (1, counter != 1),
        Mnemonic::Loope => (1, counter != 1 && zero),
        Mnemonic::Loopne => (1, counter != 1 && !zero),
        _ => (0, counter == 0),
    };
    if taken {
        check_target(cpu, i.near_branch_target())?;
    }
    if decrement != 0 {
        write_gpr(cpu, reg::RCX, size, counter.wrapping_sub(decrement));
    }
    if !taken {
        return Ok(Flow::Next);
    }
    cpu.st.rip = i.near_branch_target();
    Ok(Flow::Jump)
}
