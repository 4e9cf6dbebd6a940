//! SYSCALL, SYSRET, SYSENTER and SYSEXIT.
//!
//! The vendors differ: SYSCALL outside of 64-bit mode is AMD's alone, SYSENTER
//! in long mode Intel's (AMD APM 3, "SYSCALL" and "SYSENTER"; Intel SDM 2B).

use iced_x86::{Code, Instruction, Mnemonic};
use tetrarch_engine::{Exit, Segment, Trap};

use super::Flow;
use crate::cpu::Cpu;
use crate::cpu::cpuid::Vendor;
use crate::state::address::canonical;
use crate::state::fault::{R, Stop, gp, ud};
use crate::state::{attr, cr, flag, reg, seg};

const R11: usize = 11;
/// What SYSRET takes from R11: all but RF, VM and reserved bits.
pub const SYSRET_FLAGS: u64 = 0x3C_7FD7;

/// Width of the code that a fixed code segment holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let result = match i.mnemonic() {
        Mnemonic::Syscall => syscall(cpu, i.next_ip()),
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret(cpu, i.code() == Code::Sysretq),
        Mnemonic::Sysenter => sysenter(cpu),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => sysexit(cpu, i.code() == Code::Sysexitq),
        _ => return None,
    };
    if matches!(result, Ok(Flow::Jump)) {
        cpu.update_mode();
    }
    Some(result)
}

/// A flat code segment, which these instructions load without a descriptor.
fn flat_code(selector: u16, cpl: u8, width: Width) -> Segment {
    let size = if width == Width::Bits64 { attr::L } else { attr::DB };
    let kind = attr::CODE | attr::RW | attr::ACCESSED | attr::S | attr::P | attr::G;
    let attributes = kind | size | u32::from(cpl) << attr::DPL_SHIFT;
    Segment { base: 0, limit: 0xFFFF_FFFF, attributes, selector }
}

/// What SYSCALL and SYSRET load into CS for 64-bit code.
pub fn flat_code64(selector: u16, cpl: u8) -> Segment {
    flat_code(selector, cpl, Width::Bits64)
}

/// What they load into SS.
pub fn flat_stack(selector: u16, cpl: u8) -> Segment {
    let kind = attr::RW | attr::ACCESSED | attr::S | attr::P | attr::G | attr::DB;
    let attributes = kind | u32::from(cpl) << attr::DPL_SHIFT;
    Segment { base: 0, limit: 0xFFFF_FFFF, attributes, selector }
}

fn load(cpu: &mut Cpu, code: u16, stack: u16, cpl: u8, width: Width) {
    cpu.st.seg[seg::CS] = flat_code(code, cpl, width);
    cpu.st.seg[seg::SS] = flat_stack(stack, cpl);
    cpu.st.cpl = cpl;
}

fn intel(cpu: &Cpu) -> bool {
    cpu.vm.cpuid.vendor() == Vendor::Intel
}

/// Whether SYSCALL and SYSRET exist in this mode.
fn syscall_enabled(cpu: &Cpu) -> bool {
    cpu.st.efer & cr::EFER_SCE != 0
        && cpu.st.protected()
        && !cpu.st.vm86()
        && (cpu.st.code64() || !intel(cpu))
}

fn syscall(cpu: &mut Cpu, next: u64) -> R<Flow> {
    if !syscall_enabled(cpu) {
        return ud();
    }
    if cpu.st.cpl == 3 && cpu.vm.platform.traps.syscall {
        return Err(Stop::Exit(Exit::Trap(Trap::Syscall { next })));
    }
    let code = (cpu.st.star >> 32) as u16 & !3;
    let stack = code.wrapping_add(8);
    let flags = cpu.st.rflags() & !flag::RF;
    if cpu.st.long_mode() {
        let from64 = cpu.st.code64();
        cpu.st.gpr[reg::RCX] = next;
        cpu.st.gpr[R11] = flags;
        cpu.st.rip = if from64 { cpu.st.lstar } else { cpu.st.cstar };
        let clear = cpu.st.sfmask;
        cpu.st.set_rflags(flags & !clear);
        load(cpu, code, stack, 0, Width::Bits64);
    } else {
        cpu.st.gpr[reg::RCX] = next & 0xFFFF_FFFF;
        cpu.st.rip = cpu.st.star & 0xFFFF_FFFF;
        cpu.st.set_rflags(flags & !(flag::IF | flag::VM));
        load(cpu, code, stack, 0, Width::Bits32);
    }
    Ok(Flow::Jump)
}

fn sysret(cpu: &mut Cpu, wide: bool) -> R<Flow> {
    if !syscall_enabled(cpu) {
        return ud();
    }
    if cpu.st.cpl != 0 {
        return gp(0);
    }
    let rcx = cpu.st.gpr[reg::RCX];
    let target = if wide { rcx } else { rcx & 0xFFFF_FFFF };
    // AMD faults after the return, at the first fetch.
    if wide && intel(cpu) && !canonical(target) {
        return gp(0);
    }
    let base = (cpu.st.star >> 48) as u16;
    let (code, width) =
        if wide { (base.wrapping_add(16) | 3, Width::Bits64) } else { (base | 3, Width::Bits32) };
    let flags = if cpu.st.long_mode() {
        cpu.st.gpr[R11] & SYSRET_FLAGS
    } else {
        cpu.st.rflags() | flag::IF
    };
    cpu.st.rip = target;
    cpu.st.set_rflags(flags & !flag::RF);
    load(cpu, code, base.wrapping_add(8) | 3, 3, width);
    Ok(Flow::Jump)
}

fn sysenter(cpu: &mut Cpu) -> R<Flow> {
    let long = cpu.st.long_mode();
    if long && !intel(cpu) {
        return ud();
    }
    let code = cpu.st.sysenter_cs as u16 & !3;
    if !cpu.st.protected() || code == 0 {
        return gp(0);
    }
    let width = if long { Width::Bits64 } else { Width::Bits32 };
    let all = if long { u64::MAX } else { 0xFFFF_FFFF };
    let flags = cpu.st.rflags() & !(flag::VM | flag::IF | flag::RF);
    cpu.st.set_rflags(flags);
    cpu.st.gpr[reg::RSP] = cpu.st.sysenter_esp & all;
    cpu.st.rip = cpu.st.sysenter_eip & all;
    load(cpu, code, code.wrapping_add(8), 0, width);
    Ok(Flow::Jump)
}

fn sysexit(cpu: &mut Cpu, wide: bool) -> R<Flow> {
    if cpu.st.long_mode() && !intel(cpu) {
        return ud();
    }
    let base = cpu.st.sysenter_cs as u16 & !3;
    if !cpu.st.protected() || base == 0 || cpu.st.cpl != 0 {
        return gp(0);
    }
    let (rip, rsp) = (cpu.st.gpr[reg::RDX], cpu.st.gpr[reg::RCX]);
    if wide {
        if !canonical(rip) || !canonical(rsp) {
            return gp(0);
        }
        cpu.st.rip = rip;
        cpu.st.gpr[reg::RSP] = rsp;
        load(cpu, base.wrapping_add(32) | 3, base.wrapping_add(40) | 3, 3, Width::Bits64);
    } else {
        cpu.st.rip = rip & 0xFFFF_FFFF;
        cpu.st.gpr[reg::RSP] = rsp & 0xFFFF_FFFF;
        load(cpu, base.wrapping_add(16) | 3, base.wrapping_add(24) | 3, 3, Width::Bits32);
    }
    Ok(Flow::Jump)
}
