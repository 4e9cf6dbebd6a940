//! A debugger outside the guest, by KVM_SET_GUEST_DEBUG (Linux, api.rst, 4.87).

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_guest_debug_arch,
};
use kvm_ioctls::{Kvm, VcpuFd};
use tetrarch_engine::{DebugStop, EngineError, GuestDebug, GuestFault};

use crate::error::refused;

const DB: u32 = 1;
const BP: u32 = 3;
const DR6_BREAKPOINTS: u64 = 0xF;
const DR6_BS: u64 = 1 << 14;
/// Bits that a debug exception sets.
const DR6_CAUSES: u64 = 0xE00F;

/// What KVM_EXIT_DEBUG reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    pub exception: u32,
    pub pc: u64,
    pub dr6: u64,
}

/// Whether this KVM can hold interrupts back while a debugger steps.
pub fn may_block_interrupts(kvm: &Kvm) -> bool {
    let controls = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
    controls > 0 && controls as u32 & KVM_GUESTDBG_BLOCKIRQ != 0
}

/// Asks for the exits. `may_block` says that this KVM can hold interrupts back.
pub fn set(fd: &VcpuFd, debug: &GuestDebug, may_block: bool) -> Result<(), EngineError> {
    let hardware = debug.hardware.iter().any(Option::is_some);
    let block = debug.step && debug.block_interrupts && may_block;
    let control = [
        (debug.step, KVM_GUESTDBG_SINGLESTEP),
        (debug.software, KVM_GUESTDBG_USE_SW_BP),
        (hardware, KVM_GUESTDBG_USE_HW_BP),
        (block, KVM_GUESTDBG_BLOCKIRQ),
    ]
    .into_iter()
    .filter(|&(on, _)| on)
    .fold(0, |control, (_, bit)| control | bit | KVM_GUESTDBG_ENABLE);
    let (addresses, dr7) = debug.registers();
    let mut arch = kvm_guest_debug_arch::default();
    arch.debugreg[..4].copy_from_slice(&addresses);
    arch.debugreg[7] = dr7;
    fd.set_guest_debug(&kvm_guest_debug { control, pad: 0, arch })
        .map_err(|error| refused("let a debugger stop the guest", error))
}

/// Why the debugger is told of an exit; `None`: it is a debug exception of the guest's.
pub fn stop(debug: &GuestDebug, exit: &DebugExit) -> Option<DebugStop> {
    if exit.exception == BP {
        return Some(DebugStop::Software { linear: exit.pc });
    }
    let set = |n: usize| debug.hardware[n].is_some() && exit.dr6 >> n & 1 != 0;
    let hits = (0..4).filter(|&n| set(n)).fold(0, |hits, n| hits | 1 << n);
    if hits != 0 {
        return Some(DebugStop::Hardware { hits });
    }
    (debug.step && exit.dr6 & DR6_BS != 0).then_some(DebugStop::Step)
}

/// Gives the guest an exception that KVM has handed out, of those without an error code.
pub fn give_back(fd: &VcpuFd, fault: GuestFault) -> Result<(), EngineError> {
    let failed = |error| refused("give the guest its exception", error);
    let mut events = fd.get_vcpu_events().map_err(failed)?;
    events.exception.injected = 1;
    events.exception.nr = fault.vector;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events).map_err(failed)
}

/// Gives the guest its debug exception. What it is to see in DR6 is not there yet.
pub fn give_back_debug(fd: &VcpuFd, exit: &DebugExit) -> Result<(), EngineError> {
    let failed = |error| refused("give the guest its debug exception", error);
    let mut registers = fd.get_debug_regs().map_err(failed)?;
    registers.dr6 = registers.dr6 & !DR6_BREAKPOINTS | exit.dr6 & DR6_CAUSES;
    fd.set_debug_regs(&registers).map_err(failed)?;
    give_back(fd, GuestFault { vector: DB as u8, error: None, address: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tetrarch_engine::{HardwareBreakpoint, Watched};

    fn exit(exception: u32, dr6: u64) -> DebugExit {
        DebugExit { exception, pc: 0x1000, dr6 }
    }

    #[test]
    fn debugger_hears_of_its_own_debug_exceptions_alone() {
        let mut debug = GuestDebug { step: true, ..GuestDebug::default() };
        debug.hardware[1] = HardwareBreakpoint::new(Watched::Write, 0x2000, 4);
        assert_eq!(stop(&debug, &exit(DB, 0xFFFF_0FF0 | DR6_BS)), Some(DebugStop::Step));
        assert_eq!(stop(&debug, &exit(DB, DR6_BS | 2)), Some(DebugStop::Hardware { hits: 2 }));
        assert_eq!(stop(&debug, &exit(DB, 1)), None);
        debug.step = false;
        assert_eq!(stop(&debug, &exit(DB, DR6_BS)), None);
    }

    #[test]
    fn every_int3_is_told() {
        let told = stop(&GuestDebug::default(), &exit(BP, 0));
        assert_eq!(told, Some(DebugStop::Software { linear: 0x1000 }));
    }
}
