//! Shifts and rotates: SHL to RCR, SHLD and SHRD, and those of BMI2.
//!
//! The pure functions take the flags before and return the flags after, since a
//! count of zero changes none and rotates leave four of them alone. OF of counts
//! other than one and AF are undefined (SDM 2B); here, as on AMD Zen, OF is what
//! the last step of one bit makes, and shifts set AF.

use iced_x86::{Instruction, Mnemonic};

use super::Flow;
use super::alu::{sign_bit, sign_extend, zsp};
use super::integer::update;
use super::operand::{op_size, read_op, read_reg, write_reg};
use crate::cpu::Cpu;
use crate::state::fault::R;
use crate::state::flag;
use crate::state::mask;

/// The part of a count that counts (SDM 2B, SAL: masked to 5 bits, 6 for 64-bit
/// operands).
#[inline]
pub fn masked_count(size: usize, count: u64) -> u32 {
    (count & if size == 8 { 63 } else { 31 }) as u32
}

#[inline]
fn bit(value: u64, index: u32) -> bool {
    value >> index & 1 != 0
}

#[inline]
fn carry_overflow(carry: bool, overflow: bool) -> u64 {
    (if carry { flag::CF } else { 0 }) | if overflow { flag::OF } else { 0 }
}

/// All arithmetic flags anew, with AF set.
#[inline]
fn shifted(size: usize, r: u64, carry: bool, overflow: bool) -> (u64, u64) {
    (r, zsp(size, r) | flag::AF | carry_overflow(carry, overflow))
}

/// CF and OF anew, the others kept.
#[inline]
fn rotated(r: u64, flags: u64, carry: bool, overflow: bool) -> (u64, u64) {
    (r, flags & flag::ARITH & !(flag::CF | flag::OF) | carry_overflow(carry, overflow))
}

pub fn shl(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, count, a) = (size as u32 * 8, masked_count(size, count), a & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let wide = u128::from(a) << count;
    let r = wide as u64 & mask(size);
    let carry = wide >> bits & 1 != 0;
    shifted(size, r, carry, carry != (r & sign_bit(size) != 0))
}

pub fn shr(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (count, a) = (masked_count(size, count), a & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let before = a >> (count - 1);
    shifted(size, before >> 1, bit(before, 0), before & sign_bit(size) != 0)
}

pub fn sar(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (count, a) = (masked_count(size, count), a & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let before = sign_extend(size, a) as i64 >> (count - 1);
    let r = (before >> 1) as u64 & mask(size);
    shifted(size, r, before & 1 != 0, false)
}

pub fn rol(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, count, a) = (size as u32 * 8, masked_count(size, count), a & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let turn = count % bits;
    let r = if turn == 0 { a } else { (a << turn | a >> (bits - turn)) & mask(size) };
    let carry = bit(r, 0);
    rotated(r, flags, carry, carry != bit(r, bits - 1))
}

pub fn ror(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, count, a) = (size as u32 * 8, masked_count(size, count), a & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let turn = count % bits;
    let r = if turn == 0 { a } else { (a >> turn | a << (bits - turn)) & mask(size) };
    let carry = bit(r, bits - 1);
    rotated(r, flags, carry, carry != bit(r, bits - 2))
}

/// RCL turns a value of one bit more, CF on top.
pub fn rcl(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, a) = (size as u32 * 8, a & mask(size));
    let count = masked_count(size, count);
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let turn = count % (bits + 1);
    let whole = u128::from(flags & flag::CF) << bits | u128::from(a);
    let turned = whole << turn | whole >> (bits + 1 - turn);
    let r = turned as u64 & mask(size);
    let carry = turned >> bits & 1 != 0;
    rotated(r, flags, carry, carry != bit(r, bits - 1))
}

pub fn rcr(size: usize, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, a) = (size as u32 * 8, a & mask(size));
    let count = masked_count(size, count);
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let turn = count % (bits + 1);
    let whole = u128::from(flags & flag::CF) << bits | u128::from(a);
    let turned = whole >> turn | whole << (bits + 1 - turn);
    let r = turned as u64 & mask(size);
    let carry = turned >> bits & 1 != 0;
    rotated(r, flags, carry, bit(r, bits - 1) != bit(r, bits - 2))
}

/// SHLD. A 16-bit operand with a count over 16 is undefined; the source's bits
/// are then followed by the destination's, as on Intel CPUs.
pub fn shld(size: usize, a: u64, b: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, count) = (size as u32 * 8, masked_count(size, count));
    let (a, b) = (a & mask(size), b & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let (r, carry) = if count <= bits {
        let whole = u128::from(a) << bits | u128::from(b);
        ((whole << count >> bits) as u64 & mask(size), bit(a, bits - count))
    } else {
        let whole = a << 32 | b << 16 | a;
        let turned = whole << count;
        (turned >> 32 & mask(size), bit(b, 2 * bits - count))
    };
    shifted(size, r, carry, carry != (r & sign_bit(size) != 0))
}

/// SHRD, with the same remark.
pub fn shrd(size: usize, a: u64, b: u64, count: u64, flags: u64) -> (u64, u64) {
    let (bits, count) = (size as u32 * 8, masked_count(size, count));
    let (a, b) = (a & mask(size), b & mask(size));
    if count == 0 {
        return (a, flags & flag::ARITH);
    }
    let (r, carry) = if count <= bits {
        let whole = u128::from(b) << bits | u128::from(a);
        ((whole >> count) as u64 & mask(size), bit(a, count - 1))
    } else {
        let whole = a << 32 | b << 16 | a;
        (whole >> count & mask(size), bit(b, count - bits - 1))
    };
    // What the last step of one bit does to the sign.
    let overflow = bit(r, bits - 1) != bit(r, bits - 2);
    shifted(size, r, carry, overflow)
}

/// SHL, SHR, SAR, ROL, ROR, RCL, RCR.
pub fn shift(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let count = read_op(cpu, i, 1)?;
    let before = cpu.st.flags;
    let (_, flags) = match i.mnemonic() {
        Mnemonic::Shr => update(cpu, i, 0, |a| shr(size, a, count, before)),
        Mnemonic::Sar => update(cpu, i, 0, |a| sar(size, a, count, before)),
        Mnemonic::Rol => update(cpu, i, 0, |a| rol(size, a, count, before)),
        Mnemonic::Ror => update(cpu, i, 0, |a| ror(size, a, count, before)),
        Mnemonic::Rcl => update(cpu, i, 0, |a| rcl(size, a, count, before)),
        Mnemonic::Rcr => update(cpu, i, 0, |a| rcr(size, a, count, before)),
        _ => update(cpu, i, 0, |a| shl(size, a, count, before)),
    }?;
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
