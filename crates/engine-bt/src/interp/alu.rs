//! Integer arithmetic and its flags, as pure functions of operand size and
//! values.
//!
//! Each returns the result, truncated to `size` bytes, and the arithmetic flags
//! (SDM 1, appendix A). Operands may have junk above `size`. Where the manual
//! leaves a flag undefined, the functions do what AMD Zen does if that is simple.

use crate::state::flag;
use crate::state::mask;

/// What INC and DEC change: not CF.
pub const MASK_INC: u64 = flag::ARITH & !flag::CF;

/// The sign bit of a value of `size` bytes.
#[inline]
pub fn sign_bit(size: usize) -> u64 {
    1 << (size * 8 - 1)
}

/// Extends the sign of a value of `size` bytes.
#[inline]
pub fn sign_extend(size: usize, value: u64) -> u64 {
    let unused = 64 - size as u32 * 8;
    ((value << unused) as i64 >> unused) as u64
}

#[inline]
fn when(condition: bool, flags: u64) -> u64 {
    if condition { flags } else { 0 }
}

/// ZF, SF and PF of a truncated result.
#[inline]
pub fn zsp(size: usize, result: u64) -> u64 {
    when(result == 0, flag::ZF)
        | when(result & sign_bit(size) != 0, flag::SF)
        | when((result as u8).count_ones() & 1 == 0, flag::PF)
}

#[inline]
pub fn add(size: usize, a: u64, b: u64, carry: bool) -> (u64, u64) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_add(b).wrapping_add(u64::from(carry)) & m;
    // The carry out of each bit.
    let carries = a & b | (a | b) & !r;
    let flags = zsp(size, r)
        | when(carries & sign_bit(size) != 0, flag::CF)
        | when(carries & 8 != 0, flag::AF)
        | when((a ^ r) & (b ^ r) & sign_bit(size) != 0, flag::OF);
    (r, flags)
}

#[inline]
pub fn sub(size: usize, a: u64, b: u64, borrow: bool) -> (u64, u64) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & m;
    let borrows = !a & b | (!a | b) & r;
    let flags = zsp(size, r)
        | when(borrows & sign_bit(size) != 0, flag::CF)
        | when(borrows & 8 != 0, flag::AF)
        | when((a ^ b) & (a ^ r) & sign_bit(size) != 0, flag::OF);
    (r, flags)
}

/// Flags of AND, OR, XOR and TEST; AF is undefined and comes out clear.
#[inline]
fn logic(size: usize, r: u64) -> (u64, u64) {
    let r = r & mask(size);
    (r, zsp(size, r))
}

#[inline]
pub fn and(size: usize, a: u64, b: u64) -> (u64, u64) {
    logic(size, a & b)
}

#[inline]
pub fn or(size: usize, a: u64, b: u64) -> (u64, u64) {
    logic(size, a | b)
}

#[inline]
pub fn xor(size: usize, a: u64, b: u64) -> (u64, u64) {
    logic(size, a ^ b)
}

/// The flags of CMP.
#[inline]
pub fn cmp(size: usize, a: u64, b: u64) -> u64 {
    sub(size, a, b, false).1
}

/// The flags of TEST.
#[inline]
pub fn test(size: usize, a: u64, b: u64) -> u64 {
    and(size, a, b).1
}

#[inline]
pub fn inc(size: usize, a: u64) -> (u64, u64) {
    add(size, a, 1, false)
}

#[inline]
pub fn dec(size: usize, a: u64) -> (u64, u64) {
    sub(size, a, 1, false)
}

#[inline]
pub fn neg(size: usize, a: u64) -> (u64, u64) {
    sub(size, 0, a, false)
}

#[inline]
pub fn not(size: usize, a: u64) -> (u64, u64) {
    (!a & mask(size), 0)
}

/// DAA (`subtract` false) and DAS (SDM 2A): AL and flags to AL and flags. OF is
/// undefined and comes out clear.
pub fn decimal_adjust(al: u8, flags: u64, subtract: bool) -> (u8, u64) {
    let low = al & 0xF > 9 || flags & flag::AF != 0;
    let high = al > 0x99 || flags & flag::CF != 0;
    let adjust = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let r = if subtract { al.wrapping_sub(adjust) } else { al.wrapping_add(adjust) };
    // DAS also sets CF where its first subtraction borrows.
    let carry = high || subtract && low && al < 6;
    (r, zsp(1, u64::from(r)) | when(low, flag::AF) | when(carry, flag::CF))
}

/// AAA (`subtract` false) and AAS: AX and flags to AX and flags. Only AF and CF
/// are defined; the rest follow AL.
pub fn ascii_adjust(ax: u16, flags: u64, subtract: bool) -> (u16, u64) {
    let adjust = ax & 0xF > 9 || flags & flag::AF != 0;
    let r = match (adjust, subtract) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        // SDM 2A: AX - 6, then AH - 1.
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
    } & 0xFF0F;
    (r, zsp(1, u64::from(r & 0xFF)) | when(adjust, flag::AF | flag::CF))
}

/// Reads a condition code as encoded in Jcc, SETcc and CMOVcc (SDM 1, B.1).
#[inline]
pub fn condition(code: u8, flags: u64) -> bool {
    let set = |mask| flags & mask != 0;
    let value = match code >> 1 {
        0 => set(flag::OF),
        1 => set(flag::CF),
        2 => set(flag::ZF),
        3 => set(flag::CF | flag::ZF),
        4 => set(flag::SF),
        5 => set(flag::PF),
        6 => set(flag::SF) != set(flag::OF),
        _ => set(flag::ZF) || set(flag::SF) != set(flag::OF),
    };
    value != (code & 1 != 0)
}
