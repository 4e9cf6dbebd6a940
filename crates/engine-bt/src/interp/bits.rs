//! Bit tests, scans and counts, BMI, CRC32 and random numbers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::sign_extend;
use super::integer::update;
use super::operand::{
    address_size, check_alignment, effective_address, gpr_index, linear, op_size, read_op,
    read_reg, write_op, write_reg,
};
use super::{Flow, host_alu};
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

/// BSF and BSR (`reverse`). What a scan of zero leaves in its destination is AMD's
/// word alone, which keeps all of it (APM 3, BSF); Intel's CPUs differ in the upper
/// half of a 32-bit scan.
pub fn bit_scan(cpu: &mut Cpu, i: &Instruction, reverse: bool) -> R<Flow> {
    let size = op_size(i, 0);
    let source = read_op(cpu, i, 1)?;
    let scan = if reverse { host_alu::bsr } else { host_alu::bsf };
    let before = cpu.st.flags;
    let destination = &mut cpu.st.gpr[gpr_index(i.op0_register())];
    let (r, flags) = scan(size, source, *destination, before);
    *destination = r;
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

pub fn popcnt(size: usize, a: u64) -> (u64, u64) {
    let a = a & mask(size);
    (u64::from(a.count_ones()), when(a == 0, flag::ZF))
}

/// TZCNT, LZCNT, POPCNT.
pub fn count(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 1);
    let a = read_op(cpu, i, 1)?;
    let before = cpu.st.flags;
    let (r, flags) = match i.mnemonic() {
        Mnemonic::Tzcnt => host_alu::tzcnt(size, a, 0, before),
        Mnemonic::Lzcnt => host_alu::lzcnt(size, a, 0, before),
        _ => popcnt(size, a),
    };
    write_reg(cpu, i.op0_register(), r);
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
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
    let (r, flags) = match i.mnemonic() {
        Mnemonic::Andn => host_alu::andn(size, a, b),
        Mnemonic::Bextr => host_alu::bextr(size, a, b),
        Mnemonic::Bzhi => host_alu::bzhi(size, a, b),
        Mnemonic::Pdep => (pdep(a, b), cpu.st.flags),
        _ => (pext(a, b), cpu.st.flags),
    };
    write_reg(cpu, i.op0_register(), r);
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// BLSI, BLSMSK, BLSR.
pub fn bmi_lowest(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let a = read_op(cpu, i, 1)?;
    let (r, flags) = match i.mnemonic() {
        Mnemonic::Blsi => host_alu::blsi(size, a),
        Mnemonic::Blsmsk => host_alu::blsmsk(size, a),
        _ => host_alu::blsr(size, a),
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
