//! What a guest interface (KVM's, VMware's, Xen's) adds to the bare CPU.
//!
//! A [`Platform`] is data that goes into `create_vm`: it says what the guest's
//! CPUID shows and which instructions leave the CPU for the machine. Each of
//! those becomes an [`crate::Exit`] with which the machine sees and changes the
//! registers; who answers is the machine's affair. An engine knows no platform
//! by name.

use std::ops::RangeInclusive;

/// A leaf of CPUID that is added, or that replaces the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLeaf {
    pub leaf: u32,
    /// `None`: the answer does not depend on ECX.
    pub subleaf: Option<u32>,
    /// `None`: on every vCPU.
    pub vcpu: Option<u32>,
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

/// Ports whose handler sees the registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterPorts {
    pub ports: RangeInclusive<u16>,
    /// The CPU's check of IOPL and of the I/O permission map is left out, so
    /// that user programs reach the ports, as VMware's backdoor demands.
    pub any_privilege: bool,
}

/// What VMCALL and VMMCALL do; either vendor's works on each host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hypercalls {
    /// #UD, as on a CPU without a hypervisor.
    #[default]
    None,
    /// [`crate::Exit::Hypercall`] at CPL 0, #UD elsewhere.
    Kernel,
    /// [`crate::Exit::Hypercall`] at every CPL.
    All,
}

/// Which events of a deprivileged guest kernel come as [`crate::Exit::Trap`]
/// instead of going through the IDT: those at CPL 3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traps {
    /// Exceptions, one bit a vector.
    pub exceptions: u32,
    pub syscall: bool,
}

impl Traps {
    pub fn any(self) -> bool {
        self.exceptions != 0 || self.syscall
    }

    pub fn exception(self, vector: u8) -> bool {
        vector < 32 && self.exceptions >> vector & 1 != 0
    }
}

/// What a guest interface adds to the bare CPU. The default adds nothing.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// The engine offers KVM's own interface (leaves, clock, hypercalls) from leaf
    /// 0x4000_0000 on: the kernel's, or as the kernel's.
    pub kvm: bool,
    pub cpuid: Vec<CpuidLeaf>,
    /// Registers that the machine answers, whatever the CPU knows of them.
    pub msrs: Vec<RangeInclusive<u32>>,
    pub hypercalls: Hypercalls,
    pub ports: Vec<RegisterPorts>,
    pub traps: Traps,
}

impl Platform {
    #[inline]
    pub fn answers_msr(&self, index: u32) -> bool {
        self.msrs.iter().any(|range| range.contains(&index))
    }

    /// Whether an access to `port` shows the registers.
    #[inline]
    pub fn register_port(&self, port: u16) -> Option<&RegisterPorts> {
        self.ports.iter().find(|range| range.ports.contains(&port))
    }

    pub fn cpuid(&self, leaf: u32, subleaf: u32, vcpu: u32) -> Option<[u32; 4]> {
        let answers = |entry: &&CpuidLeaf| {
            entry.leaf == leaf
                && entry.subleaf.is_none_or(|own| own == subleaf)
                && entry.vcpu.is_none_or(|own| own == vcpu)
        };
        self.cpuid.iter().find(answers).map(|entry| entry.registers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuid_tells_leaves_subleaves_and_vcpus_apart() {
        let leaf =
            |leaf, subleaf, vcpu, eax| CpuidLeaf { leaf, subleaf, vcpu, registers: [eax, 0, 0, 0] };
        let platform = Platform {
            cpuid: vec![
                leaf(0x4000_0000, None, None, 1),
                leaf(0x4000_0003, Some(2), None, 2),
                leaf(0x4000_0004, None, Some(0), 3),
                leaf(0x4000_0004, None, Some(1), 4),
            ],
            ..Platform::default()
        };
        let eax = |leaf, subleaf, vcpu| Some(platform.cpuid(leaf, subleaf, vcpu)?[0]);
        assert_eq!(eax(0x4000_0000, 7, 5), Some(1));
        assert_eq!(eax(0x4000_0003, 2, 0), Some(2));
        assert_eq!(eax(0x4000_0003, 1, 0), None);
        assert_eq!(eax(0x4000_0004, 0, 0), Some(3));
        assert_eq!(eax(0x4000_0004, 0, 1), Some(4));
        assert_eq!(eax(0x4000_0001, 0, 0), None);
    }

    #[test]
    fn ranges_hold_both_their_ends() {
        let platform = Platform {
            msrs: vec![0x4000_0000..=0x4000_0001],
            ports: vec![RegisterPorts { ports: 0x5658..=0x5659, any_privilege: true }],
            ..Platform::default()
        };
        assert!(platform.answers_msr(0x4000_0000) && platform.answers_msr(0x4000_0001));
        assert!(!platform.answers_msr(0x4000_0002) && !platform.answers_msr(0x3FFF_FFFF));
        assert!(platform.register_port(0x5659).is_some_and(|ports| ports.any_privilege));
        assert!(platform.register_port(0x565A).is_none());
    }

    #[test]
    fn traps_are_of_exceptions_alone() {
        let traps = Traps { exceptions: 1 << 6 | 1 << 31, syscall: false };
        assert!(traps.exception(6) && traps.exception(31));
        assert!(!traps.exception(13) && !traps.exception(32) && !traps.exception(255));
    }
}
