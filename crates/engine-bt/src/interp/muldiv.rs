//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic};

use super::alu::sign_extend;
use super::operand::{op_size, read_op, write_gpr, write_reg};
use super::{Flow, host_alu};
use crate::cpu::Cpu;
use crate::state::fault::{Fault, R, vector};
use crate::state::mask;
use crate::state::{flag, reg};

/// Whether the quotient of DIV fits; else it is #DE, as division by zero is.
pub fn divides(size: usize, high: u64, divisor: u64) -> bool {
    high & mask(size) < divisor & mask(size)
}

/// Whether the quotient of IDIV fits.
pub fn divides_signed(size: usize, high: u64, low: u64, divisor: u64) -> bool {
    let high = i128::from(sign_extend(size, high) as i64);
    let dividend = high << (size * 8) | i128::from(low & mask(size));
    let divisor = i128::from(sign_extend(size, divisor) as i64);
    // The one overflow here, -2^127 / -1, does not fit either.
    dividend
        .checked_div(divisor)
        .is_some_and(|quotient| i128::from(sign_extend(size, quotient as u64) as i64) == quotient)
}

/// Writes what an instruction of rDX:rAX leaves there; of a byte it is AX.
fn write_pair(cpu: &mut Cpu, size: usize, (rax, rdx, flags): (u64, u64, u64)) {
    if size == 1 {
        write_gpr(cpu, reg::RAX, 2, rax);
    } else {
        write_gpr(cpu, reg::RAX, size, rax);
        write_gpr(cpu, reg::RDX, size, rdx);
    }
    cpu.st.update_flags(flag::ARITH, flags);
}

/// MUL, and IMUL of one operand.
pub fn mul(cpu: &mut Cpu, i: &Instruction, signed: bool) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 0)?;
    let f = if signed { host_alu::imul_wide } else { host_alu::mul };
    let (rax, rdx) = (cpu.st.gpr[reg::RAX], cpu.st.gpr[reg::RDX]);
    write_pair(cpu, size, f(size, rax, rdx, b, cpu.st.flags));
    Ok(Flow::Next)
}

pub fn imul(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    if i.op_count() == 1 {
        return mul(cpu, i, true);
    }
    let size = op_size(i, 0);
    let first = if i.op_count() == 3 { 1 } else { 0 };
    let a = read_op(cpu, i, first)?;
    let b = read_op(cpu, i, first + 1)?;
    let (low, flags) = host_alu::imul(size, a, b, cpu.st.flags);
    write_reg(cpu, i.op0_register(), low);
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// MULX: no flags; the high half wins if both targets are one register.
pub fn mulx(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 2)?;
    let (low, high, _) = host_alu::mul(size, cpu.st.gpr[reg::RDX], 0, b, 0);
    write_reg(cpu, i.op1_register(), low);
    write_reg(cpu, i.op0_register(), high);
    Ok(Flow::Next)
}

/// DIV and IDIV.
pub fn div(cpu: &mut Cpu, i: &Instruction, signed: bool) -> R<Flow> {
    debug_assert_eq!(signed, i.mnemonic() == Mnemonic::Idiv);
    let size = op_size(i, 0);
    let divisor = read_op(cpu, i, 0)?;
    let (rax, rdx) = (cpu.st.gpr[reg::RAX], cpu.st.gpr[reg::RDX]);
    let high = if size == 1 { rax >> 8 } else { rdx };
    let (fits, f): (_, fn(_, _, _, _, _) -> _) = if signed {
        (divides_signed(size, high, rax, divisor), host_alu::idiv)
    } else {
        (divides(size, high, divisor), host_alu::div)
    };
    if !fits {
        return Err(Fault::new(vector::DE).into());
    }
    write_pair(cpu, size, f(size, rax, rdx, divisor, cpu.st.flags));
    Ok(Flow::Next)
}
