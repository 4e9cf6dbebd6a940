//! Who answers what a platform adds to the CPU.

use tetrarch_engine::{GuestFault, Reply, Trap, Vcpu};

use crate::{DeviceError, Handler};

/// An access to one of the platform's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    pub port: u16,
    pub size: u8,
    pub input: bool,
    /// INS or OUTS, REP prefix included.
    pub string: bool,
}

/// The reply to an exit, and who gave it.
pub type Answered = Result<(Reply, Handler), DeviceError>;

/// The handlers behind a [`tetrarch_engine::Platform`].
///
/// `vcpu` is at the exit: its registers are those before the instruction. A
/// handler gives new ones in its reply, not by setting them, but for the system
/// registers of a trapped guest. vCPUs call concurrently. What nobody answers
/// is what a CPU without the platform does.
pub trait PlatformHandlers: Send + Sync {
    fn hypercall(&self, _vcpu: &mut dyn Vcpu, _cpl: u8) -> Answered {
        Ok((Reply::Fault(GuestFault::UD), Handler::Nobody))
    }

    fn msr_read(&self, _vcpu: &mut dyn Vcpu, _index: u32) -> Answered {
        Ok((Reply::Fault(GuestFault::GP), Handler::Nobody))
    }

    fn msr_write(&self, _vcpu: &mut dyn Vcpu, _index: u32, _value: u64) -> Answered {
        Ok((Reply::Fault(GuestFault::GP), Handler::Nobody))
    }

    fn port(&self, _vcpu: &mut dyn Vcpu, access: PortAccess) -> Answered {
        let reply = if access.input { Reply::Value(u64::MAX) } else { Reply::Done };
        Ok((reply, Handler::Nobody))
    }

    fn trap(&self, _vcpu: &mut dyn Vcpu, trap: Trap) -> Answered {
        let fault = match trap {
            Trap::Exception(fault) => fault,
            Trap::Syscall { .. } => GuestFault::UD,
        };
        Ok((Reply::Fault(fault), Handler::Nobody))
    }
}

/// The platform that adds nothing.
pub struct NoHandlers;

impl PlatformHandlers for NoHandlers {}
