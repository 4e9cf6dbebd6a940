//! KVM's hypercalls (Documentation/virt/kvm/x86/hypercalls.rst): number in RAX,
//! arguments in RBX, RCX, RDX and RSI, result in RAX.

use crate::irqchip::IrqChip;
use crate::state::{CpuState, reg};

/// include/uapi/linux/kvm_para.h.
mod number {
    pub const VAPIC_POLL_IRQ: u64 = 1;
    pub const KICK_CPU: u64 = 5;
    pub const SEND_IPI: u64 = 10;
    pub const SCHED_YIELD: u64 = 11;
}

/// The errors there, negated as they are returned.
pub mod error {
    pub const PERMISSION: i64 = -1;
    pub const INVALID: i64 = -22;
    pub const UNKNOWN: i64 = -1000;
}

/// A VMCALL or VMMCALL where the hypercalls are KVM's.
pub fn hypercall(st: &mut CpuState, irqchip: &IrqChip) {
    let wide = st.code64();
    let argument = |register: usize| {
        let value = st.gpr[register];
        if wide { value } else { value & 0xFFFF_FFFF }
    };
    let call = argument(reg::RAX);
    let arguments = [reg::RBX, reg::RCX, reg::RDX, reg::RSI].map(argument);
    let result =
        if st.cpl == 0 { serve(irqchip, call, arguments, wide) } else { error::PERMISSION };
    st.gpr[reg::RAX] = if wide { result as u64 } else { u64::from(result as u32) };
}

fn serve(irqchip: &IrqChip, call: u64, arguments: [u64; 4], wide: bool) -> i64 {
    let [a0, a1, a2, a3] = arguments;
    match call {
        number::VAPIC_POLL_IRQ => 0,
        number::KICK_CPU => {
            irqchip.unhalt(a1 as u32);
            0
        }
        number::SEND_IPI => {
            let bits = if wide { 64 } else { 32 };
            let targets = u128::from(a1) << bits | u128::from(a0);
            irqchip.send_ipis(targets, a2 as u32, a3).map_or(error::INVALID, i64::from)
        }
        // Which thread goes on is the host's affair: no vCPU has a CPU to give.
        number::SCHED_YIELD => {
            std::thread::yield_now();
            0
        }
        _ => error::UNKNOWN,
    }
}
