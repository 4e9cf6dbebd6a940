//! Instructions that a platform hands to the machine: VMCALL and VMMCALL, its
//! MSRs and its ports.

use iced_x86::{Instruction, Mnemonic};
use tetrarch_engine::{Exit, GuestFault, Hypercalls, Registers, Reply};

use super::Flow;
use crate::cpu::Cpu;
use crate::kvm;
use crate::state::fault::{Fault, R, ud};
use crate::state::reg;

impl From<GuestFault> for Fault {
    fn from(fault: GuestFault) -> Self {
        Self { vector: fault.vector, error: fault.error, address: fault.address }
    }
}

/// VMCALL and VMMCALL, which CPUID does not announce: a hypervisor has them both.
pub fn hypercall(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    let is = matches!(i.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall);
    is.then(|| {
        let cpl = cpu.st.cpl;
        match cpu.vm.platform.hypercalls {
            Hypercalls::None if cpu.vm.kvm_features != 0 => {
                kvm::hypercall(&mut cpu.st, &cpu.vm.irqchip);
                return Ok(Flow::Next);
            }
            Hypercalls::All => {}
            Hypercalls::Kernel if cpl == 0 => {}
            _ => return ud(),
        }
        let reply = cpu.replay.ask_platform(Exit::Hypercall { cpl })?;
        complete(cpu, reply, |cpu, value| cpu.st.gpr[reg::RAX] = value)
    })
}

/// Ends an instruction as the machine says; `put` is where a value goes.
pub fn complete(cpu: &mut Cpu, reply: Reply, put: impl FnOnce(&mut Cpu, u64)) -> R<Flow> {
    match reply {
        Reply::Done => Ok(Flow::Next),
        Reply::Value(value) => {
            put(cpu, value);
            Ok(Flow::Next)
        }
        Reply::Registers(registers) => Ok(replace(cpu, &registers)),
        Reply::Fault(fault) => Err(Fault::from(fault).into()),
    }
}

/// Takes over registers that the machine gives in the middle of an instruction.
pub fn replace(cpu: &mut Cpu, registers: &Registers) -> Flow {
    let jumps = registers.rip != cpu.st.rip;
    cpu.st.gpr = registers.gpr;
    cpu.st.rip = registers.rip;
    if registers.rflags != cpu.st.rflags() {
        cpu.st.set_rflags(registers.rflags);
        cpu.update_mode();
    }
    if jumps { Flow::Jump } else { Flow::Next }
}
