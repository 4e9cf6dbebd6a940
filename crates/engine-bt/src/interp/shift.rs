//! Shifts and rotates: SHL to RCR, SHLD and SHRD, and those of BMI2.
//!
//! A count of zero changes no flags, and rotates leave four of them alone. OF of
//! counts other than one, AF, and CF of counts over the size are undefined (SDM 2B).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Flow;
use super::host_alu::{
    rcl, rcr, rol, ror, rotate_by_constant_keeps_overflow, sar, shl, shld, shr, shrd,
};
use super::integer::update;
use super::operand::{op_size, read_op, read_reg, write_reg};
use crate::cpu::Cpu;
use crate::state::fault::R;
use crate::state::flag;

/// SHL, SHR, SAR, ROL, ROR, RCL, RCR.
pub fn shift(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let count = read_op(cpu, i, 1)?;
    let before = cpu.st.flags;
    let (_, mut flags) = match i.mnemonic() {
        Mnemonic::Shr => update(cpu, i, 0, |a| shr(size, a, count, before)),
        Mnemonic::Sar => update(cpu, i, 0, |a| sar(size, a, count, before)),
        Mnemonic::Rol => update(cpu, i, 0, |a| rol(size, a, count, before)),
        Mnemonic::Ror => update(cpu, i, 0, |a| ror(size, a, count, before)),
        Mnemonic::Rcl => update(cpu, i, 0, |a| rcl(size, a, count, before)),
        Mnemonic::Rcr => update(cpu, i, 0, |a| rcr(size, a, count, before)),
        _ => update(cpu, i, 0, |a| shl(size, a, count, before)),
    }?;
    let by_constant = i.op1_kind() == OpKind::Immediate8;
    if by_constant
        && matches!(i.mnemonic(), Mnemonic::Rol | Mnemonic::Ror)
        && count & if size == 8 { 63 } else { 31 } != 1
        && rotate_by_constant_keeps_overflow()
    {
        flags = flags & !flag::OF | before & flag::OF;
    }
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// SHLD, SHRD.
pub fn double_shift(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_reg(cpu, i.op1_register());
    let count = read_op(cpu, i, 2)?;
    let before = cpu.st.flags;
    let f = if i.mnemonic() == Mnemonic::Shld { shld } else { shrd };
    let (_, flags) = update(cpu, i, 0, |a| f(size, a, b, count, before))?;
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// RORX, SARX, SHLX, SHRX.
pub fn shift_without_flags(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let a = read_op(cpu, i, 1)?;
    let count = read_op(cpu, i, 2)?;
    let f = match i.mnemonic() {
        Mnemonic::Rorx => ror,
        Mnemonic::Sarx => sar,
        Mnemonic::Shlx => shl,
        _ => shr,
    };
    write_reg(cpu, i.op0_register(), f(size, a, count, 0).0);
    Ok(Flow::Next)
}
