//! What each exit means. The whole map between CPU and devices is one match.

use tetrarch_engine::{DebugStop, Exit, Reply, Vcpu};

use crate::{Bus, DeviceError, Handler, PlatformHandlers, PortAccess};

/// Why a run loop came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// HLT that no interrupt can end.
    Halted,
    /// Triple fault.
    Shutdown,
    /// [`crate::RunControl::request_stop`], or another vCPU came to its end.
    Stopped,
}

/// What the run loop does after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Answer {
        reply: Reply,
        by: Handler,
    },
    End(RunEnd),
    /// Look whether somebody wants something of this vCPU, then go on.
    Attend,
    /// Stop for the debugger, where it is not the guest's own matter.
    Debug(DebugStop),
}

pub fn dispatch(
    exit: Exit,
    vcpu: &mut dyn Vcpu,
    bus: &Bus,
    platform: &dyn PlatformHandlers,
) -> Result<Step, DeviceError> {
    Ok(match exit {
        Exit::PortIn { port, size } => {
            let answer = bus.port_in(port, size)?;
            Step::Answer { reply: Reply::Value(answer.value), by: answer.by }
        }
        Exit::PortOut { port, size, data } => {
            Step::Answer { reply: Reply::Done, by: bus.port_out(port, size, data)? }
        }
        Exit::MmioRead { address, size } => {
            let answer = bus.mmio_read(address, size)?;
            Step::Answer { reply: Reply::Value(answer.value), by: answer.by }
        }
        Exit::MmioWrite { address, size, data } => {
            Step::Answer { reply: Reply::Done, by: bus.mmio_write(address, size, data)? }
        }
        Exit::Halt => Step::End(RunEnd::Halted),
        Exit::Shutdown => Step::End(RunEnd::Shutdown),
        Exit::Kicked => Step::Attend,
        Exit::Hypercall { cpl } => Step::answer(platform.hypercall(vcpu, cpl)?),
        Exit::MsrRead { index } => Step::answer(platform.msr_read(vcpu, index)?),
        Exit::MsrWrite { index, value } => Step::answer(platform.msr_write(vcpu, index, value)?),
        Exit::PortWithRegisters { port, size, input, string } => {
            Step::answer(platform.port(vcpu, PortAccess { port, size, input, string })?)
        }
        Exit::Trap(trap) => Step::answer(platform.trap(vcpu, trap)?),
        Exit::Debug(stop) => Step::Debug(stop),
    })
}

impl Step {
    fn answer((reply, by): (Reply, Handler)) -> Self {
        Self::Answer { reply, by }
    }
}
