//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic};

use super::Flow;
use super::alu::sign_extend;
use super::operand::{op_size, read_op, write_gpr, write_reg};
use crate::cpu::Cpu;
use crate::state::fault::{Fault, R, vector};
use crate::state::mask;
use crate::state::{flag, reg};

/// What multiplication defines; it leaves the other flags alone here.
pub const MASK_MUL: u64 = flag::CF | flag::OF;

/// MUL: low half, high half, flags.
pub fn mul_unsigned(size: usize, a: u64, b: u64) -> (u64, u64, u64) {
    let m = mask(size);
    let product = u128::from(a & m) * u128::from(b & m);
    let (low, high) = (product as u64 & m, (product >> (size * 8)) as u64 & m);
    (low, high, if high != 0 { MASK_MUL } else { 0 })
}

/// IMUL: low half, high half, flags.
pub fn mul_signed(size: usize, a: u64, b: u64) -> (u64, u64, u64) {
    let m = mask(size);
    let signed = |value| i128::from(sign_extend(size, value) as i64);
    let product = signed(a) * signed(b);
    let (low, high) = (product as u64 & m, (product >> (size * 8)) as u64 & m);
    (low, high, if signed(low) == product { 0 } else { MASK_MUL })
}

/// DIV: quotient and remainder; `None` is #DE.
pub fn div_unsigned(size: usize, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let m = mask(size);
    let dividend = u128::from(high & m) << (size * 8) | u128::from(low & m);
    let divisor = u128::from(divisor & m);
    let quotient = dividend.checked_div(divisor)?;
    (quotient <= u128::from(m)).then(|| (quotient as u64, (dividend % divisor) as u64))
}

/// IDIV: quotient and remainder; `None` is #DE.
pub fn div_signed(size: usize, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let m = mask(size);
    let bits = size * 8;
    let high = i128::from(sign_extend(size, high) as i64);
    let dividend = high << bits | i128::from(low & m);
    let divisor = i128::from(sign_extend(size, divisor) as i64);
    // The one overflow of the host's division, -2^127 / -1, is #DE too.
    let quotient = dividend.checked_div(divisor)?;
    let low = quotient as u64 & m;
    (i128::from(sign_extend(size, low) as i64) == quotient)
        .then(|| (low, (dividend % divisor) as u64 & m))
}

/// Writes a double-width result: AX, or rDX:rAX.
fn write_pair(cpu: &mut Cpu, size: usize, low: u64, high: u64) {
    if size == 1 {
        write_gpr(cpu, reg::RAX, 2, high << 8 | low);
    } else {
        write_gpr(cpu, reg::RAX, size, low);
        write_gpr(cpu, reg::RDX, size, high);
    }
}

/// MUL, and IMUL of one operand.
pub fn mul(cpu: &mut Cpu, i: &Instruction, signed: bool) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 0)?;
    let f = if signed { mul_signed } else { mul_unsigned };
    let (low, high, flags) = f(size, cpu.st.gpr[reg::RAX], b);
    write_pair(cpu, size, low, high);
    cpu.st.update_flags(MASK_MUL, flags);
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
    let (low, _, flags) = mul_signed(size, a, b);
    write_reg(cpu, i.op0_register(), low);
    cpu.st.update_flags(MASK_MUL, flags);
    Ok(Flow::Next)
}

/// MULX: no flags; the high half wins if both targets are one register.
pub fn mulx(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 2)?;
    let (low, high, _) = mul_unsigned(size, cpu.st.gpr[reg::RDX], b);
    write_reg(cpu, i.op1_register(), low);
    write_reg(cpu, i.op0_register(), high);
    Ok(Flow::Next)
}

/// DIV and IDIV. All flags are undefined and stay as they are.
pub fn div(cpu: &mut Cpu, i: &Instruction, signed: bool) -> R<Flow> {
    debug_assert_eq!(signed, i.mnemonic() == Mnemonic::Idiv);
    let size = op_size(i, 0);
    let divisor = read_op(cpu, i, 0)?;
    let (rax, rdx) = (cpu.st.gpr[reg::RAX], cpu.st.gpr[reg::RDX]);
    let high = if size == 1 { rax >> 8 } else { rdx };
    let f = if signed { div_signed } else { div_unsigned };
    let Some((quotient, remainder)) = f(size, high, rax, divisor) else {
        return Err(Fault::new(vector::DE).into());
    };
    write_pair(cpu, size, quotient, remainder);
    Ok(Flow::Next)
}
