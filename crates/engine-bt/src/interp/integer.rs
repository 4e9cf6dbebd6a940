//! Moves, exchanges, addition, logic, decimal adjustment and flag instructions.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::operand::{
    check_alignment, effective_address, linear, mem_linear, op_size, read_op, read_reg, write_gpr,
    write_op, write_reg,
};
use super::{Flow, alu};
use crate::cpu::Cpu;
use crate::state::fault::{Fault, R, gp, ud, vector};
use crate::state::mask;
use crate::state::{flag, reg};

/// Whether a MOV has neither a segment, control, debug nor test register.
#[inline]
pub fn is_plain_mov(i: &Instruction) -> bool {
    let plain = |op| {
        i.op_kind(op) != OpKind::Register || {
            let r = i.op_register(op);
            (Register::AL as u32..=Register::R15 as u32).contains(&(r as u32))
        }
    };
    plain(0) && plain(1)
}

/// MOV, MOVZX, MOVNTI: the source is zero-extended by reading it.
#[inline]
pub fn mov(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = read_op(cpu, i, 1)?;
    write_op(cpu, i, 0, value)?;
    Ok(Flow::Next)
}

/// MOVSX, MOVSXD.
pub fn movsx(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = read_op(cpu, i, 1)?;
    write_reg(cpu, i.op0_register(), alu::sign_extend(op_size(i, 1), value));
    Ok(Flow::Next)
}

fn swap_bytes(size: usize, value: u64) -> u64 {
    value.swap_bytes() >> (64 - size * 8)
}

pub fn movbe(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = read_op(cpu, i, 1)?;
    write_op(cpu, i, 0, swap_bytes(op_size(i, 0), value))?;
    Ok(Flow::Next)
}

pub fn lea(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = effective_address(cpu, i);
    write_reg(cpu, i.op0_register(), value);
    Ok(Flow::Next)
}

pub fn bswap(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let r = i.op0_register();
    // BSWAP of 16 bits is undefined (SDM 2A); CPUs clear the register.
    let value = match r.size() {
        2 => 0,
        size => swap_bytes(size, read_reg(cpu, r)),
    };
    write_reg(cpu, r, value);
    Ok(Flow::Next)
}

/// XCHG with memory is locked, with or without a prefix.
pub fn xchg(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    // Either operand may be the one in memory.
    let (target, source) =
        if i.op1_kind() == OpKind::Memory { (1, i.op0_register()) } else { (0, i.op1_register()) };
    let value = read_reg(cpu, source);
    let old = update(cpu, i, target, |_| (value, 0))?.0;
    write_reg(cpu, source, old);
    Ok(Flow::Next)
}

/// Whether other CPUs may see nothing between its load and its store.
#[inline]
pub fn is_locked(i: &Instruction) -> bool {
    i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg
}

/// Reads operand `op`, computes (result, flags) of it and writes the result:
/// atomically if it is in memory. Returns the old value and the flags.
#[inline]
pub fn update(
    cpu: &mut Cpu,
    i: &Instruction,
    op: u32,
    mut f: impl FnMut(u64) -> (u64, u64),
) -> R<(u64, u64)> {
    if i.op_kind(op) == OpKind::Register {
        let r = i.op_register(op);
        let old = read_reg(cpu, r);
        let (result, flags) = f(old);
        write_reg(cpu, r, result);
        return Ok((old, flags));
    }
    let size = i.memory_size().size();
    let address = mem_linear(cpu, i, size, true)?;
    let user = cpu.user();
    let mut flags = 0;
    let locked = is_locked(i);
    let old = cpu.read_modify_write(address, size, user, locked, |old| {
        let (result, new_flags) = f(old);
        flags = new_flags;
        result
    })?;
    Ok((old, flags))
}

/// ADD, ADC, SUB, SBB, AND, OR, XOR.
#[inline]
pub fn binary(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 1)?;
    let carry = cpu.st.flags & flag::CF != 0;
    let (_, flags) = match i.mnemonic() {
        Mnemonic::Add => update(cpu, i, 0, |a| alu::add(size, a, b, false)),
        Mnemonic::Adc => update(cpu, i, 0, |a| alu::add(size, a, b, carry)),
        Mnemonic::Sub => update(cpu, i, 0, |a| alu::sub(size, a, b, false)),
        Mnemonic::Sbb => update(cpu, i, 0, |a| alu::sub(size, a, b, carry)),
        Mnemonic::And => update(cpu, i, 0, |a| alu::and(size, a, b)),
        Mnemonic::Or => update(cpu, i, 0, |a| alu::or(size, a, b)),
        _ => update(cpu, i, 0, |a| alu::xor(size, a, b)),
    }?;
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// CMP and TEST.
#[inline]
pub fn compare(cpu: &mut Cpu, i: &Instruction, flags_of: fn(usize, u64, u64) -> u64) -> R<Flow> {
    let a = read_op(cpu, i, 0)?;
    let b = read_op(cpu, i, 1)?;
    cpu.st.update_flags(flag::ARITH, flags_of(op_size(i, 0), a, b));
    Ok(Flow::Next)
}

/// INC, DEC, NEG, NOT; `changes` are the flags that the instruction writes.
#[inline]
pub fn unary(
    cpu: &mut Cpu,
    i: &Instruction,
    changes: u64,
    f: fn(usize, u64) -> (u64, u64),
) -> R<Flow> {
    let size = op_size(i, 0);
    let (_, flags) = update(cpu, i, 0, |a| f(size, a))?;
    cpu.st.update_flags(changes, flags);
    Ok(Flow::Next)
}

pub fn xadd(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let source = i.op1_register();
    let b = read_reg(cpu, source);
    if i.op0_kind() == OpKind::Register {
        let target = i.op0_register();
        let a = read_reg(cpu, target);
        let (sum, flags) = alu::add(size, a, b, false);
        // The sum wins if both are one register (SDM 2B, XADD, operation).
        write_reg(cpu, source, a);
        write_reg(cpu, target, sum);
        cpu.st.update_flags(flag::ARITH, flags);
        return Ok(Flow::Next);
    }
    let (old, flags) = update(cpu, i, 0, |a| alu::add(size, a, b, false))?;
    write_reg(cpu, source, old);
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// CMPXCHG writes its destination in either case (SDM 2A).
pub fn cmpxchg(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let new = read_reg(cpu, i.op1_register());
    let expected = cpu.st.gpr[reg::RAX] & mask(size);
    if i.op0_kind() == OpKind::Register {
        let target = i.op0_register();
        let old = read_reg(cpu, target);
        if old == expected {
            write_reg(cpu, target, new);
        } else {
            write_gpr(cpu, reg::RAX, size, old);
        }
        cpu.st.update_flags(flag::ARITH, alu::cmp(size, expected, old));
        return Ok(Flow::Next);
    }
    let (old, _) = update(cpu, i, 0, |old| (if old == expected { new } else { old }, 0))?;
    if old != expected {
        write_gpr(cpu, reg::RAX, size, old);
    }
    cpu.st.update_flags(flag::ARITH, alu::cmp(size, expected, old));
    Ok(Flow::Next)
}

pub fn cmpxchg8b(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let half = 0xFFFF_FFFF;
    let g = &cpu.st.gpr;
    let expected = g[reg::RAX] & half | g[reg::RDX] << 32;
    let new = g[reg::RBX] & half | g[reg::RCX] << 32;
    let (old, _) = update(cpu, i, 0, |old| (if old == expected { new } else { old }, 0))?;
    let equal = old == expected;
    if !equal {
        cpu.st.gpr[reg::RAX] = old & half;
        cpu.st.gpr[reg::RDX] = old >> 32;
    }
    cpu.st.update_flags(flag::ZF, if equal { flag::ZF } else { 0 });
    Ok(Flow::Next)
}

pub fn cmpxchg16b(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    // Misalignment comes before a stack address that is not canonical: Zen 5
    // reports #GP, not #SS. Segment bases are rarely odd, so the offset decides.
    let aligned = effective_address(cpu, i).is_multiple_of(16);
    let address = match mem_linear(cpu, i, 16, true) {
        Err(_) if !aligned && cpu.st.code64() => return gp(0),
        result => result?,
    };
    if !address.is_multiple_of(16) {
        return gp(0);
    }
    let user = cpu.user();
    let g = &cpu.st.gpr;
    let expected = u128::from(g[reg::RDX]) << 64 | u128::from(g[reg::RAX]);
    let new = u128::from(g[reg::RCX]) << 64 | u128::from(g[reg::RBX]);
    let old = match cpu.writable_16(address, user)? {
        Some((host, code)) => {
            // SAFETY: 16 mapped and aligned bytes; the CPU has the instruction,
            // since CPUID of the guest shows only what the host has.
            let old = unsafe { exchange_16(host, expected, new) };
            if let Some(written) = code {
                cpu.vm.code.wrote(written, 16);
            }
            old
        }
        None => {
            let low = cpu.load(address, 8, user)?;
            let high = cpu.load(address.wrapping_add(8), 8, user)?;
            let old = u128::from(high) << 64 | u128::from(low);
            let write = if old == expected { new } else { old };
            cpu.store(address, 8, write as u64, user)?;
            cpu.store(address.wrapping_add(8), 8, (write >> 64) as u64, user)?;
            old
        }
    };
    let equal = old == expected;
    if !equal {
        cpu.st.gpr[reg::RAX] = old as u64;
        cpu.st.gpr[reg::RDX] = (old >> 64) as u64;
    }
    cpu.st.update_flags(flag::ZF, if equal { flag::ZF } else { 0 });
    Ok(Flow::Next)
}

/// # Safety
/// `host` must point to 16 mapped bytes, aligned to 16.
unsafe fn exchange_16(host: *mut u8, expected: u128, new: u128) -> u128 {
    let (low, high): (u64, u64);
    // SAFETY: the caller's promise. RBX belongs to the compiler and is put back.
    unsafe {
        core::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{host}]",
            "mov rbx, {new_low}",
            host = in(reg) host,
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") expected as u64 => low,
            inout("rdx") (expected >> 64) as u64 => high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

pub fn xlat(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    // The decoder gives [rBX + AL] as base and index.
    let address = mem_linear(cpu, i, 1, false)?;
    let user = cpu.user();
    let value = cpu.load(address, 1, user)?;
    write_gpr(cpu, reg::RAX, 1, value);
    Ok(Flow::Next)
}

pub fn bound(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let user = cpu.user();
    let offset = effective_address(cpu, i);
    let low = linear(cpu, i.memory_segment(), offset, size * 2, false)?;
    check_alignment(cpu, low, size)?;
    let lower = cpu.load(low, size, user)?;
    let upper = cpu.load(low.wrapping_add(size as u64), size, user)?;
    let signed = |value| alu::sign_extend(size, value) as i64;
    let index = signed(read_reg(cpu, i.op0_register()));
    if index < signed(lower) || index > signed(upper) {
        return Err(Fault::new(vector::BR).into());
    }
    Ok(Flow::Next)
}

/// ADCX and ADOX: a chain through CF or OF alone.
pub fn adcx_adox(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = op_size(i, 0);
    let b = read_op(cpu, i, 1)?;
    let a = read_reg(cpu, i.op0_register());
    let chain = if i.mnemonic() == Mnemonic::Adcx { flag::CF } else { flag::OF };
    let (sum, flags) = alu::add(size, a, b, cpu.st.flags & chain != 0);
    write_reg(cpu, i.op0_register(), sum);
    cpu.st.update_flags(chain, if flags & flag::CF != 0 { chain } else { 0 });
    Ok(Flow::Next)
}

/// DAA, DAS, AAA, AAS, AAM, AAD.
pub fn bcd(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let ax = cpu.st.gpr[reg::RAX] as u16;
    let flags = cpu.st.flags;
    let (ax, flags) = match i.mnemonic() {
        m @ (Mnemonic::Daa | Mnemonic::Das) => {
            let (al, flags) = alu::decimal_adjust(ax as u8, flags, m == Mnemonic::Das);
            (ax & 0xFF00 | u16::from(al), flags)
        }
        m @ (Mnemonic::Aaa | Mnemonic::Aas) => alu::ascii_adjust(ax, flags, m == Mnemonic::Aas),
        Mnemonic::Aam => {
            let base = i.immediate8();
            if base == 0 {
                return Err(Fault::new(vector::DE).into());
            }
            let al = ax as u8;
            let r = u16::from(al / base) << 8 | u16::from(al % base);
            (r, alu::zsp(1, u64::from(r & 0xFF)))
        }
        _ => {
            let [al, ah] = ax.to_le_bytes();
            let r = al.wrapping_add(ah.wrapping_mul(i.immediate8()));
            (u16::from(r), alu::zsp(1, u64::from(r)))
        }
    };
    write_gpr(cpu, reg::RAX, 2, u64::from(ax));
    cpu.st.update_flags(flag::ARITH, flags);
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE and CWD, CDQ, CQO.
pub fn convert(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let rax = cpu.st.gpr[reg::RAX];
    let high = |size| if rax & alu::sign_bit(size) != 0 { u64::MAX } else { 0 };
    match i.mnemonic() {
        Mnemonic::Cbw => write_gpr(cpu, reg::RAX, 2, alu::sign_extend(1, rax)),
        Mnemonic::Cwde => write_gpr(cpu, reg::RAX, 4, alu::sign_extend(2, rax)),
        Mnemonic::Cdqe => write_gpr(cpu, reg::RAX, 8, alu::sign_extend(4, rax)),
        Mnemonic::Cwd => write_gpr(cpu, reg::RDX, 2, high(2)),
        Mnemonic::Cdq => write_gpr(cpu, reg::RDX, 4, high(4)),
        _ => write_gpr(cpu, reg::RDX, 8, high(8)),
    }
    Ok(Flow::Next)
}

/// LAHF, SAHF, SALC and those that set one flag.
pub fn flag_instruction(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    const IN_AH: u64 = flag::CF | flag::PF | flag::AF | flag::ZF | flag::SF;
    let st = &mut *cpu.st;
    match i.mnemonic() {
        Mnemonic::Lahf => {
            let ah = st.flags & IN_AH | flag::FIXED;
            st.gpr[reg::RAX] = st.gpr[reg::RAX] & !0xFF00 | ah << 8;
        }
        Mnemonic::Sahf => {
            let ah = st.gpr[reg::RAX] >> 8;
            st.update_flags(IN_AH, ah);
        }
        Mnemonic::Salc => {
            let al = if st.flags & flag::CF != 0 { 0xFF } else { 0 };
            write_gpr(cpu, reg::RAX, 1, al);
        }
        Mnemonic::Clc => st.flags &= !flag::CF,
        Mnemonic::Stc => st.flags |= flag::CF,
        Mnemonic::Cmc => st.flags ^= flag::CF,
        Mnemonic::Cld => {
            st.flags &= !flag::DF;
            cpu.update_mode();
        }
        _ => {
            st.flags |= flag::DF;
            cpu.update_mode();
        }
    }
    Ok(Flow::Next)
}

/// The condition of Jcc, SETcc or CMOVcc.
#[inline]
pub fn condition(cpu: &Cpu, i: &Instruction) -> bool {
    let flags = cpu.st.flags;
    let code = match i.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        ConditionCode::None => return false,
    };
    alu::condition(code, flags)
}

pub fn setcc(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let value = u64::from(condition(cpu, i));
    write_op(cpu, i, 0, value)?;
    Ok(Flow::Next)
}

/// CMOVcc reads its source and writes its destination in either case: 32 bits
/// are zero-extended even if the condition is false.
pub fn cmovcc(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let source = read_op(cpu, i, 1)?;
    let target = i.op0_register();
    let value = if condition(cpu, i) { source } else { read_reg(cpu, target) };
    write_reg(cpu, target, value);
    Ok(Flow::Next)
}

/// CLFLUSH and its kin check their operand as a load of one byte does (SDM 2A);
/// caches are coherent here.
pub fn cache_line(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    if i.op0_kind() != OpKind::Memory {
        return ud();
    }
    if i.mnemonic() == Mnemonic::Cldemote {
        return Ok(Flow::Next);
    }
    let address = mem_linear(cpu, i, 1, false)?;
    let user = cpu.user();
    cpu.walk(address, crate::cpu::mmu::Access::Read, user)?;
    Ok(Flow::Next)
}

/// CLZERO: zeroes the line that rAX points into (AMD APM 3).
pub fn clear_line(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    const LINE: u64 = 64;
    let segment = match i.segment_prefix() {
        Register::None => Register::DS,
        other => other,
    };
    let size = match i.code() {
        Code::Clzerow => 2,
        Code::Clzerod => 4,
        _ => 8,
    };
    let offset = cpu.st.gpr[reg::RAX] & mask(size) & !(LINE - 1);
    let address = linear(cpu, segment, offset, LINE as usize, true)?;
    let user = cpu.user();
    cpu.probe_write(address, LINE as usize, user)?;
    cpu.store_bytes(address, &[0; LINE as usize], user)?;
    Ok(Flow::Next)
}
