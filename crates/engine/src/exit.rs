//! Why a vCPU stopped, and what it is told before it goes on.

use crate::{DebugStop, Registers};

/// What the guest did that only the machine can answer.
///
/// Those from `Hypercall` to `Trap` come only where the [`crate::Platform`] asks for
/// them. [`crate::Vcpu::registers`] are then those before the instruction, with
/// RIP at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// IN (INS one item at a time): reply with the value.
    PortIn {
        port: u16,
        size: u8,
    },
    PortOut {
        port: u16,
        size: u8,
        data: u32,
    },
    /// A read of guest physical memory that is not RAM: reply with the value.
    MmioRead {
        address: u64,
        size: u8,
    },
    MmioWrite {
        address: u64,
        size: u8,
        data: u64,
    },
    /// The machine has ended in HLT: every vCPU is halted with interrupts off or
    /// was never started, and none can wake another.
    Halt,
    /// Triple fault: the CPU is in shutdown until a reset.
    Shutdown,
    /// [`crate::Kick::kick`] was called.
    Kicked,
    /// VMCALL or VMMCALL: a value in reply goes to RAX.
    Hypercall {
        cpl: u8,
    },
    /// RDMSR: reply with the value.
    MsrRead {
        index: u32,
    },
    MsrWrite {
        index: u32,
        value: u64,
    },
    /// IN, OUT, INS or OUTS on one of the platform's ports: a value in reply goes
    /// to AL, AX or EAX of an input.
    PortWithRegisters {
        port: u16,
        size: u8,
        input: bool,
        /// INS or OUTS: the whole of it, REP prefix included, is the machine's.
        string: bool,
    },
    /// An event of a deprivileged guest, which has not been delivered.
    Trap(Trap),
    /// What [`crate::GuestDebug`] asked for. Registers are those between two instructions.
    /// After [`Reply::Done`] the guest goes on at RIP; [`Reply::Fault`] says that an INT3
    /// is the guest's own.
    Debug(DebugStop),
}

/// What happened at CPL 3 (see [`crate::Traps`]).
///
/// System registers can be set before the reply, as no other exit allows. An
/// exception is no instruction that could be done: after any reply but a fault,
/// which is then delivered, the guest goes on at RIP as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    Exception(GuestFault),
    /// RIP is at the instruction; `next` is behind it.
    Syscall {
        next: u64,
    },
}

/// An exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    pub vector: u8,
    pub error: Option<u32>,
    /// Of a page fault: what CR2 is to hold.
    pub address: u64,
}

impl GuestFault {
    pub const UD: Self = Self { vector: 6, error: None, address: 0 };
    /// #GP(0).
    pub const GP: Self = Self { vector: 13, error: Some(0), address: 0 };
}

/// The answer to an [`Exit`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The access is done; there is nothing to hand back.
    Done,
    /// What the guest reads; bits over the size of the access are ignored.
    Value(u64),
    /// The registers after the instruction. RIP left at the instruction moves
    /// behind it; RIP changed stands.
    Registers(Box<Registers>),
    /// The instruction raises this instead.
    Fault(GuestFault),
}
