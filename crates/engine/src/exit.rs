//! Why a vCPU stopped, and what it is told before it goes on.

/// What the guest did that only the machine can answer.
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
    /// HLT that no interrupt can end: interrupts are off and no NMI is wired.
    Halt,
    /// Triple fault: the CPU is in shutdown until a reset.
    Shutdown,
    /// [`crate::Kick::kick`] was called.
    Kicked,
}

/// The answer to an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The access is done; there is nothing to hand back.
    Done,
    /// What the guest reads; bits over the size of the access are ignored.
    Value(u64),
}
