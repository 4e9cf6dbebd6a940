//! Operands: registers, effective addresses, segmentation and the stack.
//!
//! An offset becomes a linear address by [`linear`], which makes all checks of
//! segmentation; paging is behind [`Cpu::load`] and its kin. Everything here
//! that touches memory does so at the current privilege level and checks
//! alignment where the guest has asked for it.

use iced_x86::{CodeSize, Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::state::address::canonical;
use crate::state::fault::{Fault, R, vector};
use crate::state::mask;
use crate::state::{attr, cr, flag, reg, seg};

/// Which part of which general register a name means.
#[derive(Clone, Copy)]
enum Part {
    Low8(usize),
    High8(usize),
    Low16(usize),
    Low32(usize),
    Full(usize),
    Selector(usize),
    None,
}

/// Relies on the order in which iced-x86 numbers registers; a test checks it.
#[inline]
fn part(r: Register) -> Part {
    const AL: usize = Register::AL as usize;
    const AH: usize = Register::AH as usize;
    const SPL: usize = Register::SPL as usize;
    const AX: usize = Register::AX as usize;
    const EAX: usize = Register::EAX as usize;
    const RAX: usize = Register::RAX as usize;
    const EIP: usize = Register::EIP as usize;
    const ES: usize = Register::ES as usize;
    const GS: usize = Register::GS as usize;
    match r as usize {
        n @ AL..AH => Part::Low8(n - AL),
        n @ AH..SPL => Part::High8(n - AH),
        n @ SPL..AX => Part::Low8(n - SPL + 4),
        n @ AX..EAX => Part::Low16(n - AX),
        n @ EAX..RAX => Part::Low32(n - EAX),
        n @ RAX..EIP => Part::Full(n - RAX),
        n @ ES..=GS => Part::Selector(n - ES),
        _ => Part::None,
    }
}

/// The index in `CpuState::gpr` of the register that `r` is part of.
#[inline]
pub fn gpr_index(r: Register) -> usize {
    match part(r) {
        Part::Low8(n) | Part::High8(n) | Part::Low16(n) | Part::Low32(n) | Part::Full(n) => n,
        Part::Selector(_) | Part::None => 0,
    }
}

/// The index in `CpuState::seg` of a segment register.
#[inline]
pub fn segment_index(r: Register) -> usize {
    match part(r) {
        Part::Selector(n) => n,
        _ => seg::DS,
    }
}

/// A general register of any width, zero-extended, or a selector.
#[inline]
pub fn read_reg(cpu: &Cpu, r: Register) -> u64 {
    let gpr = &cpu.st.gpr;
    match part(r) {
        Part::Low8(n) => gpr[n] & 0xFF,
        Part::High8(n) => gpr[n] >> 8 & 0xFF,
        Part::Low16(n) => gpr[n] & 0xFFFF,
        Part::Low32(n) => gpr[n] & 0xFFFF_FFFF,
        Part::Full(n) => gpr[n],
        Part::Selector(n) => u64::from(cpu.st.seg[n].selector),
        Part::None => 0,
    }
}

/// A general register's value where the whole of it is `whole`.
pub fn part_of(whole: u64, r: Register) -> u64 {
    match part(r) {
        Part::Low8(_) => whole & 0xFF,
        Part::High8(_) => whole >> 8 & 0xFF,
        Part::Low16(_) => whole & 0xFFFF,
        Part::Low32(_) => whole & 0xFFFF_FFFF,
        _ => whole,
    }
}

/// Writes a general register. A 32-bit write clears the upper half, narrower
/// ones keep the rest (SDM 1, 3.4.1.1).
#[inline]
pub fn write_reg(cpu: &mut Cpu, r: Register, v: u64) {
    let gpr = &mut cpu.st.gpr;
    match part(r) {
        Part::Low8(n) => gpr[n] = gpr[n] & !0xFF | v & 0xFF,
        Part::High8(n) => gpr[n] = gpr[n] & !0xFF00 | (v & 0xFF) << 8,
        Part::Low16(n) => gpr[n] = gpr[n] & !0xFFFF | v & 0xFFFF,
        Part::Low32(n) => gpr[n] = v & 0xFFFF_FFFF,
        Part::Full(n) => gpr[n] = v,
        // Loading a segment is more than a register write; see `segment`.
        Part::Selector(_) | Part::None => {}
    }
}

/// Writes the low `size` bytes of general register `index`, by the same rules.
#[inline]
pub fn write_gpr(cpu: &mut Cpu, index: usize, size: usize, v: u64) {
    let old = cpu.st.gpr[index];
    cpu.st.gpr[index] = match size {
        1 => old & !0xFF | v & 0xFF,
        2 => old & !0xFFFF | v & 0xFFFF,
        4 => v & 0xFFFF_FFFF,
        _ => v,
    };
}

/// Bytes of an address of this instruction: 2, 4 or 8.
#[inline]
pub fn address_size(i: &Instruction) -> usize {
    let base = i.memory_base();
    let reg = if base != Register::None { base } else { i.memory_index() };
    match part(reg) {
        Part::Low16(_) => return 2,
        Part::Low32(_) => return 4,
        Part::Full(_) => return 8,
        _ => {}
    }
    match reg {
        Register::RIP => return 8,
        Register::EIP => return 4,
        _ => {}
    }
    // Either no register at all, or a vector index (VSIB).
    match i.memory_displ_size() {
        2 => 2,
        4 => 4,
        8 => 8,
        _ => match i.code_size() {
            CodeSize::Code64 => 8,
            CodeSize::Code32 => 4,
            _ => 2,
        },
    }
}

/// The offset of the memory operand in its segment, of the address size.
#[inline]
pub fn effective_address(cpu: &Cpu, i: &Instruction) -> u64 {
    let base = i.memory_base();
    // A RIP-relative displacement comes from the decoder as the whole address.
    let mut offset = i.memory_displacement64();
    if base != Register::None && base != Register::RIP && base != Register::EIP {
        offset = offset.wrapping_add(read_reg(cpu, base));
    }
    let index = i.memory_index();
    if index != Register::None {
        let scale = u64::from(i.memory_index_scale());
        offset = offset.wrapping_add(read_reg(cpu, index).wrapping_mul(scale));
    }
    offset & mask(address_size(i))
}

/// #SS(0) for the stack segment, else #GP(0).
#[cold]
fn segment_fault(segment: Register) -> Fault {
    let vector = if segment == Register::SS { vector::SS } else { vector::GP };
    Fault::with_error(vector, 0)
}

/// Applies segmentation to `size` bytes at `offset` (SDM 3A, 5.3-5.4; 3.3.7.1
/// of volume 1 for 64-bit mode).
#[inline]
pub fn linear(cpu: &Cpu, segment: Register, offset: u64, size: usize, write: bool) -> R<u64> {
    if cpu.st.code64() {
        let base = match segment {
            Register::FS => cpu.st.seg[seg::FS].base,
            Register::GS => cpu.st.seg[seg::GS].base,
            _ => 0,
        };
        let address = base.wrapping_add(offset);
        let last = address.wrapping_add((size as u64).saturating_sub(1));
        if canonical(address) && canonical(last) {
            return Ok(address);
        }
        return Err(segment_fault(segment).into());
    }
    linear_segmented(cpu, segment, offset, size, write)
}

fn linear_segmented(cpu: &Cpu, segment: Register, offset: u64, size: usize, write: bool) -> R<u64> {
    let s = &cpu.st.seg[segment_index(segment)];
    let a = s.attributes;
    let code = a & attr::CODE != 0;
    if cpu.st.protected() && !cpu.st.vm86() {
        // A null selector leaves the register unusable.
        let usable = a & attr::UNUSABLE == 0 && a & attr::P != 0;
        let allowed = match (write, code) {
            (true, true) => false,
            (true, false) | (false, true) => a & attr::RW != 0,
            (false, false) => true,
        };
        if !usable || !allowed {
            return Err(segment_fault(segment).into());
        }
    }
    let last = offset + (size as u64).saturating_sub(1);
    let limit = u64::from(s.limit);
    let inside = if !code && a & attr::DC != 0 {
        let top = if a & attr::DB != 0 { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    if !inside {
        return Err(segment_fault(segment).into());
    }
    Ok(s.base.wrapping_add(offset) & 0xFFFF_FFFF)
}

/// #AC where CR0.AM and EFLAGS.AC ask for it (SDM 3A, 6.15, interrupt 17).
#[inline]
pub fn check_alignment(cpu: &Cpu, linear: u64, size: usize) -> R<()> {
    if linear & (size as u64).wrapping_sub(1) != 0
        && size.is_power_of_two()
        && cpu.st.flags & flag::AC != 0
        && cpu.st.cr0 & cr::CR0_AM != 0
        && cpu.user()
    {
        return Err(Fault::with_error(vector::AC, 0).into());
    }
    Ok(())
}

/// The linear address of the memory operand, checked for `size` bytes.
#[inline]
pub fn mem_linear(cpu: &Cpu, i: &Instruction, size: usize, write: bool) -> R<u64> {
    let address = linear(cpu, i.memory_segment(), effective_address(cpu, i), size, write)?;
    check_alignment(cpu, address, size)?;
    Ok(address)
}

/// Loads the memory operand.
#[inline]
pub fn load_mem(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<u64> {
    let address = mem_linear(cpu, i, size, false)?;
    let user = cpu.user();
    cpu.load(address, size, user)
}

/// Stores the memory operand.
#[inline]
pub fn store_mem(cpu: &mut Cpu, i: &Instruction, size: usize, value: u64) -> R<()> {
    let address = mem_linear(cpu, i, size, true)?;
    let user = cpu.user();
    cpu.store(address, size, value, user)
}

/// Bytes of operand `op`.
#[inline]
pub fn op_size(i: &Instruction, op: u32) -> usize {
    match i.op_kind(op) {
        OpKind::Register => match part(i.op_register(op)) {
            Part::Low8(_) | Part::High8(_) => 1,
            Part::Low16(_) | Part::Selector(_) => 2,
            Part::Low32(_) => 4,
            Part::Full(_) => 8,
            Part::None => i.op_register(op).size(),
        },
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 | OpKind::NearBranch16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 | OpKind::NearBranch32 => 4,
        OpKind::Immediate64
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64
        | OpKind::NearBranch64 => 8,
        _ => i.memory_size().size(),
    }
}

/// The value of a register, memory or immediate operand. Registers and memory
/// are zero-extended, immediates extended as the instruction defines.
#[inline]
pub fn read_op(cpu: &mut Cpu, i: &Instruction, op: u32) -> R<u64> {
    match i.op_kind(op) {
        OpKind::Register => Ok(read_reg(cpu, i.op_register(op))),
        OpKind::Memory => load_mem(cpu, i, i.memory_size().size()),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok(i.near_branch_target())
        }
        _ => Ok(i.try_immediate(op).unwrap_or(0)),
    }
}

/// Writes a register or memory operand.
#[inline]
pub fn write_op(cpu: &mut Cpu, i: &Instruction, op: u32, value: u64) -> R<()> {
    match i.op_kind(op) {
        OpKind::Register => {
            write_reg(cpu, i.op_register(op), value);
            Ok(())
        }
        _ => store_mem(cpu, i, i.memory_size().size(), value),
    }
}

/// Bits of the stack pointer in use (SDM 1, 6.2.3).
#[inline]
pub fn stack_mask(cpu: &Cpu) -> u64 {
    if cpu.st.code64() {
        u64::MAX
    } else if cpu.st.seg[seg::SS].attributes & attr::DB != 0 {
        0xFFFF_FFFF
    } else {
        0xFFFF
    }
}

/// Sets the part of RSP that is the stack pointer.
#[inline]
pub fn set_sp(cpu: &mut Cpu, value: u64) {
    let m = stack_mask(cpu);
    let old = cpu.st.gpr[reg::RSP];
    cpu.st.gpr[reg::RSP] = if m == 0xFFFF { old & !m | value & m } else { value & m };
}

/// Stores at SS:`offset`, at the current privilege level.
#[inline]
pub fn stack_store(cpu: &mut Cpu, offset: u64, size: usize, value: u64) -> R<()> {
    let address = linear(cpu, Register::SS, offset, size, true)?;
    check_alignment(cpu, address, size)?;
    let user = cpu.user();
    cpu.store(address, size, value, user)
}

/// Loads at SS:`offset`, at the current privilege level.
#[inline]
pub fn stack_load(cpu: &mut Cpu, offset: u64, size: usize) -> R<u64> {
    let address = linear(cpu, Register::SS, offset, size, false)?;
    check_alignment(cpu, address, size)?;
    let user = cpu.user();
    cpu.load(address, size, user)
}

/// Pushes 2, 4 or 8 bytes. RSP moves only if the store succeeds.
#[inline]
pub fn push(cpu: &mut Cpu, value: u64, size: usize) -> R<()> {
    let sp = cpu.st.gpr[reg::RSP].wrapping_sub(size as u64) & stack_mask(cpu);
    stack_store(cpu, sp, size, value)?;
    set_sp(cpu, sp);
    Ok(())
}

/// Pops 2, 4 or 8 bytes. RSP moves only if the load succeeds.
#[inline]
pub fn pop(cpu: &mut Cpu, size: usize) -> R<u64> {
    let sp = cpu.st.gpr[reg::RSP] & stack_mask(cpu);
    let value = stack_load(cpu, sp, size)?;
    set_sp(cpu, sp.wrapping_add(size as u64));
    Ok(value)
}

/// The width of addresses in a string instruction: that of rSI, rDI and rCX.
pub fn string_address_size(i: &Instruction) -> usize {
    let of = |kind| match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
        _ => 0,
    };
    match of(i.op0_kind()) {
        0 => of(i.op1_kind()),
        size => size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_parts_follow_the_decoders_numbering() {
        let index = |r| gpr_index(r);
        assert_eq!(
            [Register::AL, Register::CL, Register::DL, Register::BL].map(index),
            [0, 1, 2, 3]
        );
        assert!(matches!(part(Register::AH), Part::High8(0)));
        assert!(matches!(part(Register::BH), Part::High8(3)));
        assert!(matches!(part(Register::SPL), Part::Low8(4)));
        assert!(matches!(part(Register::R15L), Part::Low8(15)));
        assert!(matches!(part(Register::R15W), Part::Low16(15)));
        assert!(matches!(part(Register::R15D), Part::Low32(15)));
        assert!(matches!(part(Register::RSP), Part::Full(4)));
        assert!(matches!(part(Register::R15), Part::Full(15)));
        assert!(matches!(part(Register::RIP), Part::None));
        assert!(matches!(part(Register::XMM0), Part::None));
        let selectors =
            [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        assert_eq!(
            selectors.map(segment_index),
            [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS]
        );
    }
}
