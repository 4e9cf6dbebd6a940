//! Accesses to devices whose instruction is known: they leave at once, and the
//! answer ends the instruction without another look at it.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use tetrarch_engine::Exit;
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use crate::cpu::Cpu;
use crate::interp::{io, operand};
use crate::state::fault::Fault;
use crate::state::{flag, reg};
use crate::translate::block::PortAccess;

/// What the run loop does next.
pub enum Then {
    Continue,
    /// A block of so many instructions was not begun, since the limit lies in it.
    Limit(u8),
    /// Interpret the instruction at RIP.
    Interpret,
    /// Interpret the instruction at RIP, which is this one.
    Execute(Instruction),
    Raise(Fault),
    /// The machine must answer, which ends the instruction.
    Ask(Exit, Access),
}

/// An access that waits for the machine's answer.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Where the guest goes on.
    next: u64,
    /// Where the value of a read goes.
    to: Option<Target>,
}

#[derive(Clone, Copy, Debug)]
struct Target {
    register: Register,
    /// Bytes read; they are extended to the register's width.
    size: usize,
    signed: bool,
}

impl Access {
    /// Ends the instruction with the answer.
    pub fn finish(self, cpu: &mut Cpu, value: u64) {
        if let Some(Target { register, size, signed }) = self.to {
            let unused = 64 - size as u32 * 8;
            let value = value << unused;
            let value = if signed { (value as i64 >> unused) as u64 } else { value >> unused };
            operand::write_reg(cpu, register, value);
        }
        cpu.st.rip = self.next;
        cpu.st.flags &= !flag::RF;
        cpu.st.count_one();
    }
}

/// A MOV between a register, or a constant, and memory: one access, no other
/// effect.
#[derive(Clone, Copy, Debug)]
pub struct PlainMove {
    size: usize,
    kind: Move,
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Load { to: Register, signed: bool },
    Store(Register),
    StoreConstant(u64),
}

impl PlainMove {
    pub fn of(i: &Instruction) -> Option<Self> {
        let size = i.memory_size().size();
        if !matches!(size, 1 | 2 | 4 | 8) {
            return None;
        }
        let general = |op: u32| i.op_kind(op) == OpKind::Register && i.op_register(op).is_gpr();
        let kind = match i.mnemonic() {
            Mnemonic::Mov if i.op0_kind() == OpKind::Memory && general(1) => {
                Move::Store(i.op1_register())
            }
            Mnemonic::Mov if i.op0_kind() == OpKind::Memory && i.op1_kind() != OpKind::Register => {
                Move::StoreConstant(i.immediate(1))
            }
            Mnemonic::Mov | Mnemonic::Movzx if i.op1_kind() == OpKind::Memory && general(0) => {
                Move::Load { to: i.op0_register(), signed: false }
            }
            Mnemonic::Movsx | Mnemonic::Movsxd if i.op1_kind() == OpKind::Memory => {
                Move::Load { to: i.op0_register(), signed: true }
            }
            _ => return None,
        };
        Some(Self { size, kind })
    }

    /// Whether an access at `linear` stays in its page.
    pub fn fits(&self, linear: u64) -> bool {
        (linear & 0xFFF) + self.size as u64 <= PAGE_SIZE
    }

    /// Makes the access at a physical address that is not RAM; the instruction
    /// after it is at `next`.
    pub fn make(&self, cpu: &mut Cpu, address: GuestPhys, next: u64) -> Then {
        let (access, answer) = match self.kind {
            Move::Load { to, signed } => {
                let to = Some(Target { register: to, size: self.size, signed });
                (Access { next, to }, cpu.read_device(address, self.size))
            }
            Move::Store(from) => {
                let value = operand::read_reg(cpu, from);
                let done = cpu.write_device(address, self.size, value);
                (Access { next, to: None }, done.map(|()| 0))
            }
            Move::StoreConstant(value) => {
                let done = cpu.write_device(address, self.size, value);
                (Access { next, to: None }, done.map(|()| 0))
            }
        };
        settle(cpu, access, answer)
    }
}

/// IN or OUT. Where the rights are not plain the interpreter looks at it.
pub fn port(cpu: &mut Cpu, access: &PortAccess) -> Then {
    let size = access.register.size();
    let port = access.port.map_or(cpu.st.gpr[reg::RDX] as u16, u16::from);
    // The platform may want the registers with it.
    if cpu.vm.platform.register_port(port).is_some() || io::check_port(cpu, port, size).is_err() {
        return Then::Execute(access.instruction);
    }
    let next = access.instruction.next_ip();
    let (to, answer) = if access.out {
        let value = operand::read_reg(cpu, access.register);
        (None, cpu.port_out(port, size, value).map(|()| 0))
    } else {
        let to = Target { register: access.register, size, signed: false };
        (Some(to), cpu.port_in(port, size))
    };
    settle(cpu, Access { next, to }, answer)
}

fn settle(cpu: &mut Cpu, access: Access, answer: Result<u64, Exit>) -> Then {
    match answer {
        Ok(value) => {
            access.finish(cpu, value);
            Then::Continue
        }
        Err(exit) if cpu.vm.doorbells.rang(&exit) => {
            access.finish(cpu, 0);
            Then::Continue
        }
        Err(exit) => Then::Ask(exit, access),
    }
}
