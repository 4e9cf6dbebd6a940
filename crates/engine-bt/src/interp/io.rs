//! Ports: IN, OUT, INS and OUTS (Intel SDM 1, chapter 19).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use tetrarch_engine::Exit;

use super::Flow;
use super::operand;
use super::platform;
use super::segment::{system_type, table_address};
use crate::cpu::Cpu;
use crate::state::fault::{R, gp};
use crate::state::mask;
use crate::state::{attr, flag, reg, seg};

/// Iterations of REP in one step, so that interrupts get in between.
const MAX_ITERATIONS: usize = 4096;
/// Where the TSS holds the offset of the I/O permission bit map.
const MAP_BASE: u64 = 0x66;

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    if !cpu.vm.platform.ports.is_empty()
        && let Some(result) = with_registers(cpu, i)
    {
        return Some(result);
    }
    let result = match i.mnemonic() {
        Mnemonic::In => input(cpu, i),
        Mnemonic::Out => output(cpu, i),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => repeat(cpu, i, ins),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => repeat(cpu, i, outs),
        _ => return None,
    };
    Some(result)
}

/// An access to a port whose handler sees the registers.
fn with_registers(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let (input, string) = match i.mnemonic() {
        Mnemonic::In => (true, false),
        Mnemonic::Out => (false, false),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => (true, true),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => (false, true),
        _ => return None,
    };
    let (port, size) = match (string, input) {
        (true, _) => (cpu.st.gpr[reg::RDX] as u16, item_size(i)),
        (false, true) => (port_of(cpu, i, 1), operand::op_size(i, 0)),
        (false, false) => (port_of(cpu, i, 0), operand::op_size(i, 1)),
    };
    let any_privilege = cpu.vm.platform.register_port(port)?.any_privilege;
    Some((|| {
        if !any_privilege {
            check_port(cpu, port, size)?;
        }
        let exit = Exit::PortWithRegisters { port, size: size as u8, input, string };
        let reply = cpu.replay.ask_platform(exit)?;
        platform::complete(cpu, reply, |cpu, value| {
            if input && !string {
                operand::write_reg(cpu, i.op0_register(), value & mask(size));
            }
        })
    })())
}

/// #GP(0) unless IOPL or the TSS allows the port (SDM 1, 19.5).
pub fn check_port(cpu: &mut Cpu, port: u16, size: usize) -> R<()> {
    let iopl = (cpu.st.flags & flag::IOPL) >> 12;
    if !cpu.st.protected() || !cpu.st.vm86() && u64::from(cpu.st.cpl) <= iopl {
        return Ok(());
    }
    let tr = cpu.st.seg[seg::TR];
    let kind = tr.attributes & attr::TYPE;
    let limit = u64::from(tr.limit);
    let has_map = matches!(kind, system_type::TSS_AVAILABLE | system_type::TSS_BUSY);
    if !has_map || tr.attributes & attr::P == 0 || limit < MAP_BASE + 1 {
        return gp(0);
    }
    let base = cpu.load(table_address(cpu, tr.base, MAP_BASE), 2, false)?;
    // Two bytes are always read: the ports of an access may span them.
    let at = base + u64::from(port) / 8;
    if at + 1 > limit {
        return gp(0);
    }
    let bits = cpu.load(table_address(cpu, tr.base, at), 2, false)?;
    let wanted = ((1 << size) - 1) << (port % 8);
    if bits & wanted != 0 { gp(0) } else { Ok(()) }
}

fn port_in(cpu: &mut Cpu, port: u16, size: usize) -> R<u64> {
    match cpu.port_in(port, size) {
        Ok(value) => Ok(value),
        Err(exit) => Ok(cpu.ask(exit)? & mask(size)),
    }
}

fn port_out(cpu: &mut Cpu, port: u16, size: usize, value: u64) -> R<()> {
    match cpu.port_out(port, size, value) {
        Ok(()) => Ok(()),
        Err(exit) => cpu.ask(exit).map(drop),
    }
}

/// The port of operand `op`: DX or an immediate byte.
fn port_of(cpu: &Cpu, i: &Instruction, op: u32) -> u16 {
    match i.op_kind(op) {
        OpKind::Register => cpu.st.gpr[reg::RDX] as u16,
        _ => u16::from(i.immediate8()),
    }
}

fn input(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = operand::op_size(i, 0);
    let port = port_of(cpu, i, 1);
    check_port(cpu, port, size)?;
    let value = port_in(cpu, port, size)?;
    operand::write_reg(cpu, i.op0_register(), value);
    Ok(Flow::Next)
}

fn output(cpu: &mut Cpu, i: &Instruction) -> R<Flow> {
    let size = operand::op_size(i, 1);
    let port = port_of(cpu, i, 0);
    check_port(cpu, port, size)?;
    let value = operand::read_reg(cpu, i.op1_register());
    port_out(cpu, port, size, value)?;
    Ok(Flow::Next)
}

/// Runs `item` once, or for each iteration of a REP prefix.
fn repeat(cpu: &mut Cpu, i: &Instruction, item: fn(&mut Cpu, &Instruction) -> R<()>) -> R<Flow> {
    if !i.has_rep_prefix() && !i.has_repne_prefix() {
        item(cpu, i)?;
        return Ok(Flow::Next);
    }
    let width = address_width(i);
    for _ in 0..MAX_ITERATIONS {
        let count = cpu.st.gpr[reg::RCX] & mask(width);
        if count == 0 {
            return Ok(Flow::Next);
        }
        item(cpu, i)?;
        operand::write_gpr(cpu, reg::RCX, width, count - 1);
        let answered = cpu.replay.in_progress();
        cpu.replay.clear();
        if count == 1 {
            return Ok(Flow::Next);
        }
        if answered {
            // As in `string::repeat`.
            break;
        }
    }
    Ok(Flow::Jump)
}

/// Bytes of the index and count registers.
fn address_width(i: &Instruction) -> usize {
    let op = if matches!(i.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd) {
        i.op0_kind()
    } else {
        i.op1_kind()
    };
    match op {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 2,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 4,
        _ => 8,
    }
}

fn item_size(i: &Instruction) -> usize {
    match i.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        _ => 4,
    }
}

/// Moves an index register by one item, down if DF is set.
fn advance(cpu: &mut Cpu, register: usize, width: usize, size: usize) {
    let step =
        if cpu.st.flags & flag::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
    let value = cpu.st.gpr[register].wrapping_add(step);
    operand::write_gpr(cpu, register, width, value);
}

fn ins(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let (size, width) = (item_size(i), address_width(i));
    let port = cpu.st.gpr[reg::RDX] as u16;
    check_port(cpu, port, size)?;
    let offset = cpu.st.gpr[reg::RDI] & mask(width);
    let address = operand::linear(cpu, Register::ES, offset, size, true)?;
    operand::check_alignment(cpu, address, size)?;
    let user = cpu.user();
    // A fault must come before the port is read, which can't be taken back.
    cpu.probe_write(address, size, user)?;
    let value = port_in(cpu, port, size)?;
    cpu.store(address, size, value, user)?;
    advance(cpu, reg::RDI, width, size);
    Ok(())
}

fn outs(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let (size, width) = (item_size(i), address_width(i));
    let port = cpu.st.gpr[reg::RDX] as u16;
    check_port(cpu, port, size)?;
    let offset = cpu.st.gpr[reg::RSI] & mask(width);
    let address = operand::linear(cpu, i.memory_segment(), offset, size, false)?;
    operand::check_alignment(cpu, address, size)?;
    let user = cpu.user();
    let value = cpu.load(address, size, user)?;
    port_out(cpu, port, size, value)?;
    advance(cpu, reg::RSI, width, size);
    Ok(())
}
