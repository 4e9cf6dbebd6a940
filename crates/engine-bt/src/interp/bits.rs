//! Bit tests, scans and counts, BMI, CRC32 and random numbers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Flow;
use super::alu::{sign_extend, zsp};
use super::integer::update;
use super::operand::{
    address_size, check_alignment, effective_address, gpr_index, linear, op_size, read_op,
    read_reg, write_op, write_reg,
};
use crate::cpu::Cpu;
use crate::state::fault::{R, ud};
use crate::state::flag;
use crate::state::mask;

fn when(condition: bool, flags: u64) -> u64 {
    if condition { flags } else { 0 }
}

fn changed(mnemonic: Mnemonic, value: u64, bit: u64) -> u64 {
    match mnemonic {
        Mnemonic::Bts => value | bit,
        Mnemonic::Btr => value & !bit,
        Mnemonic::Btc => value ^ bit,
        _ => value,
    }
}

/// BT, BTS, BTR, BTC. With a bit offset in a register the memory operand is a
/// bit string: the offset is signed and reaches beyond the operand (SDM 2A, BT).
pub fn bit_test(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let offset = read_op(cpu, i, 1)?;
    let bits = size as u64 * 8;
    let bit = 1u64 << (offset & (bits - 1));
    let mnemonic = i.mnemonic();
    let old = if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register {
        let unit = (sign_extend(size, offset) as i64) >> bits.trailing_zeros();
        let at = effective_address(cpu, i).wrapping_add((unit as u64).wrapping_mul(size as u64));
        let at = at & mask(address_size(i));
        let write = mnemonic != Mnemonic::Bt;
        let address = linear(cpu, i.memory_segment(), at, size, write)?;
        check_alignment(cpu, address, size)?;
        let user = cpu.user();
        if write {
            let locked = i.has_lock_prefix();
            cpu.read_modify_write(address, size, user, locked, |old| changed(mnemonic, old, bit))?
        } else {
            cpu.load(address, size, user)?
        }
    } else if mnemonic == Mnemonic::Bt {
        read_op(cpu, i, 0)?
    } else {
        update(cpu, i, 0, |old| (changed(mnemonic, old, bit), 0))?.0
    };
    cpu.st.update_flags(flag::CF, when(old & bit != 0, flag::CF));
    Ok(Flow::Next)
}

/// What a scan of zero leaves in its destination. AMD documents that it keeps all
/// of it (APM 3, BSF); on Intel it is undefined, and CPUs differ in the upper half
/// of a 32-bit scan. Translated code runs the host's, so this does too.
fn scan_of_zero(size: usize, mut destination: u64, reverse: bool) -> u64 {
    macro_rules! scan {
        ($text:literal) => {
            // SAFETY: reads and writes two registers and the flags.
            unsafe {
                std::arch::asm!($text, inout(reg) destination, in(reg) 0u64,
                    options(pure, nomem, nostack));
            }
        };
    }
    match (size, reverse) {
        (2, false) => scan!("bsf {0:x}, {1:x}"),
        (2, true) => scan!("bsr {0:x}, {1:x}"),
        (4, false) => scan!("bsf {0:e}, {1:e}"),
        (4, true) => scan!("bsr {0:e}, {1:e}"),
        (_, false) => scan!("bsf {0:r}, {1:r}"),
        (_, true) => scan!("bsr {0:r}, {1:r}"),
    }
    destination
}

/// BSF and BSR (`reverse`); the flags but ZF are undefined, and stay.
pub fn bit_scan(cpu: &mut Cpu, i: &Instruction, reverse: bool) -> R<Flow> {
    let source = read_op(cpu, i, 1)? & mask(op_size(i, 1));
    if source != 0 {
        let index = if reverse { 63 - source.leading_zeros() } else { source.trailing_zeros() };
        write_reg(cpu, i.op0_register(), u64::from(index));
    } else {
        let destination = &mut cpu.st.gpr[gpr_index(i.op0_register())];
        *destination = scan_of_zero(op_size(i, 0), *destination, reverse);
    }
    cpu.st.update_flags(flag::ZF, when(source == 0, flag::ZF));
    Ok(Flow::Next)
}

/// TZCNT: result and flags; SF, OF, AF and PF are undefined.
pub fn tzcnt(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    let r = u64::from(a.trailing_zeros()).min(size as u64 * 8);
    (r, when(a == 0, flag::CF) | when(r == 0, flag::ZF))
}

pub fn lzcnt(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    let r = u64::from(a.leading_zeros()) - (64 - size as u64 * 8);
    (r, when(a == 0, flag::CF) | when(r == 0, flag::ZF))
}

pub fn popcnt(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    (u64::from(a.count_ones()), when(a == 0, flag::ZF))
}

/// TZCNT, LZCNT, POPCNT.
pub fn count(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 1);
    let a = read_op(cpu, i, 1)?;
    let (changes, (r, flags)) = match i.mnemonic() {
        Mnemonic::Tzcnt => (flag::CF | flag::ZF, tzcnt(size, a)),
        Mnemonic::Lzcnt => (flag::CF | flag::ZF, lzcnt(size, a)),
        _ => (flag::ARITH, popcnt(size, a)),
    };
    write_reg(cpu, i.op0_register(), r);
    cpu.st.update_flags(changes, flags);
    Ok(Flow::Next)
}

/// ANDN; AF and PF are undefined: here AF is clear and PF follows the result, as
/// on AMD Zen.
pub fn andn(size: usize, a: u64, b: u64) -> (u64, u64) {
    let r = !a & b & mask(size);
    (r, zsp(size, r))
}

/// BEXTR: `control` is start (bits 7:0) and length (bits 15:8). AF, SF and PF are
/// undefined.
pub fn bextr(size: usize, a: u64, control: u64) -> (u64, u64) {
    let (start, len) = (control & 0xFF, control >> 8 & 0xFF);
    let field = (a & mask(size)).checked_shr(start as u32).unwrap_or(0);
    let r = if len < 64 { field & ((1 << len) - 1) } else { field };
    (r, zsp(size, r) | flag::AF)
}

/// BZHI; AF and PF are undefined.
pub fn bzhi(size: usize, a: u64, index: u64) -> (u64, u64) {
    let (a, index, bits) = (a & mask(size), index & 0xFF, size as u64 * 8);
    let r = if index < bits { a & ((1 << index) - 1) } else { a };
    (r, zsp(size, r) | when(index >= bits, flag::CF))
}

pub fn pdep(a: u64, selector: u64) -> u64 {
    let (mut rest, mut source, mut r) = (selector, a, 0);
    while rest != 0 {
        let lowest = rest & rest.wrapping_neg();
        if source & 1 != 0 {
            r |= lowest;
        }
        source >>= 1;
        rest ^= lowest;
    }
    r
}

pub fn pext(a: u64, selector: u64) -> u64 {
    let (mut rest, mut r, mut at) = (selector, 0, 0);
    while rest != 0 {
        let lowest = rest & rest.wrapping_neg();
        if a & lowest != 0 {
            r |= 1 << at;
        }
        at += 1;
        rest ^= lowest;
    }
    r
}

/// ANDN, BEXTR, BZHI, PDEP, PEXT.
pub fn bmi_two_sources(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let a = read_op(cpu, i, 1)?;
    let b = read_op(cpu, i, 2)?;
    let (r, changes, flags) = match i.mnemonic() {
        Mnemonic::Andn => {
            let (r, flags) = andn(size, a, b);
            (r, flag::ARITH, flags)
        }
        Mnemonic::Bextr => {
            let (r, flags) = bextr(size, a, b);
            (r, flag::ARITH, flags)
        }
        Mnemonic::Bzhi => {
            let (r, flags) = bzhi(size, a, b);
            (r, flag::ARITH, flags)
        }
        Mnemonic::Pdep => (pdep(a, b), 0, 0),
        _ => (pext(a, b), 0, 0),
    };
    write_reg(cpu, i.op0_register(), r);
    cpu.st.update_flags(changes, flags);
    Ok(Flow::Next)
}

pub fn blsi(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    let r = a & a.wrapping_neg();
    (r, zsp(size, r) | when(a != 0, flag::CF))
}

pub fn blsmsk(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    let r = (a ^ a.wrapping_sub(1)) & mask(size);
    (r, zsp(size, r) & !flag::ZF | when(a == 0, flag::CF))
}

pub fn blsr(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    let r = a & a.wrapping_sub(1);
    (r, zsp(size, r) | when(a == 0, flag::CF))
}

/// BLSI, BLSMSK, BLSR; AF and PF are undefined.
pub fn bmi_lowest(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let a = read_op(cpu, i, 1)?;
    let (r, flags) = match i.mnemonic() {
        Mnemonic::Blsi => blsi(size, a),
        Mnemonic::Blsmsk => blsmsk(size, a),
        _ => blsr(size, a),
    };
    write_reg(cpu, i.op0_register(), r);
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// CRC32 of the Castagnoli polynomial, reflected (SDM 2A, CRC32).
pub fn crc32c(crc: u32, size: usize, data: u64) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut crc = crc;
    for byte in &data.to_le_bytes()[..size] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
        }
    }
    crc
}

pub fn crc32(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 1);
    let data = read_op(cpu, i, 1)?;
    let target = i.op0_register();
    let crc = crc32c(read_reg(cpu, target) as u32, size, data);
    write_reg(cpu, target, u64::from(crc));
    Ok(Flow::Next)
}

/// RDRAND and RDSEED, from the host's kernel: CF says that there is a number, and
/// without one the destination is zero (SDM 2B, RDRAND).
pub fn random(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    if i.op0_kind() != OpKind::Register {
        return ud();
    }
    let mut bytes = [0u8; 8];
    let mut ok = true;
    let value = cpu.vm.value(|| {
        // SAFETY: the buffer has the length that is passed.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        ok = got == bytes.len() as isize;
        if ok { u64::from_le_bytes(bytes) } else { 0 }
    });
    // 0 stands for "none", as the instruction has it (Intel SDM 2B, RDRAND).
    let ok = ok && value != 0;
    write_op(cpu, i, 0, value)?;
    cpu.st.update_flags(flag::ARITH, when(ok, flag::CF));
    Ok(Flow::Next)
}
