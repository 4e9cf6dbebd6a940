//! What of a platform the host's KVM can hand to us, and asking for it.
//!
//! MSRs come by a filter (api.rst, 4.97, KVM_X86_SET_MSR_FILTER). For hypercalls
//! there is one way to all of them: KVM's support for Xen's guests, told to
//! leave them to us (4.28, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL); its kernel
//! option is off in some distributions. Ports need nothing: an exit for a port
//! leaves the registers where they can be read and set.

use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
    KVMIO, kvm_enable_cap, kvm_xen_hvm_config,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use tetrarch_engine::{EngineError, Hypercalls, Platform};

use crate::error::refused;

vmm_sys_util::ioctl_iow_nr!(KVM_XEN_HVM_CONFIG, KVMIO, 0x7a, kvm_xen_hvm_config);

/// The ports that KVM lets user mode reach where the host's administrator says
/// so (arch/x86/kvm/x86.h, is_vmware_backdoor_opcode and VMWARE_PORT_*).
const BACKDOOR_PORTS: [u16; 2] = [0x5658, 0x5659];
const BACKDOOR_PARAMETER: &str = "/sys/module/kvm/parameters/enable_vmware_backdoor";

/// The kernel intercepts hypercalls only where Xen's MSR for the hypercall page
/// has an index (arch/x86/kvm/xen.c, kvm_xen_hvm_config), of 0x40000000 to
/// 0x4FFFFFFF. This one is nobody's, and filtered, so that it is as absent as
/// any other.
const XEN_PAGE_MSR: u32 = 0x4FFF_FFFF;

/// MSRs that no filter reaches (api.rst, 4.97).
const X2APIC: RangeInclusive<u32> = 0x800..=0x8FF;
const MSRS_PER_RANGE: u32 = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;

fn lacks(what: &str, mend: &str) -> EngineError {
    EngineError::Unavailable(what.into()).mended_by(format!("{mend}, or use engine bt"))
}

/// Makes the VM hand over what the platform answers, or says why it cannot.
pub fn prepare(kvm: &Kvm, fd: &VmFd, platform: &Platform) -> Result<(), EngineError> {
    if platform.traps.any() {
        return Err(EngineError::Unavailable(
            "KVM delivers a deprivileged guest's traps to the guest itself".into(),
        )
        .mended_by("use engine bt"));
    }
    check_ports(platform, std::fs::read_to_string(BACKDOOR_PARAMETER).ok().as_deref())?;
    let mut msrs = platform.msrs.clone();
    if platform.hypercalls != Hypercalls::None {
        intercept_hypercalls(kvm, fd)?;
        msrs.push(XEN_PAGE_MSR..=XEN_PAGE_MSR);
    }
    if msrs.is_empty() { Ok(()) } else { filter_msrs(kvm, fd, &msrs) }
}

/// To be called with the vCPU's CPUID set.
pub fn prepare_vcpu(fd: &VcpuFd, platform: &Platform) {
    if !platform.kvm {
        let mut enforce =
            kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
        enforce.args[0] = 1;
        // Before Linux 5.10 KVM's MSRs answer a guest that was not told of them.
        let _ = fd.enable_cap(&enforce);
    }
}

fn check_ports(platform: &Platform, parameter: Option<&str>) -> Result<(), EngineError> {
    for ports in platform.ports.iter().filter(|ports| ports.any_privilege) {
        if ports.ports.clone().any(|port| !BACKDOOR_PORTS.contains(&port)) {
            return Err(EngineError::Unavailable(format!(
                "KVM lets user mode past IOPL to the ports 0x5658 and 0x5659 alone, not to \
                 {:#x}-{:#x}",
                ports.ports.start(),
                ports.ports.end()
            ))
            .mended_by("use engine bt"));
        }
        if parameter.is_none_or(|value| value.trim() != "Y") {
            return Err(lacks(
                "KVM on this host lets no user mode past IOPL to the platform's ports",
                "load the kvm module with enable_vmware_backdoor=Y",
            ));
        }
    }
    Ok(())
}

fn intercept_hypercalls(kvm: &Kvm, fd: &VmFd) -> Result<(), EngineError> {
    let flags = kvm.check_extension_int(Cap::XenHvm);
    if flags <= 0 || flags as u32 & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL == 0 {
        return Err(lacks(
            "KVM on this host keeps hypercalls to itself: its kernel lacks CONFIG_KVM_XEN",
            "boot a kernel that has it",
        ));
    }
    let config = kvm_xen_hvm_config {
        flags: KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
        msr: XEN_PAGE_MSR,
        ..Default::default()
    };
    // SAFETY: the kernel reads the structure, which lives through the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_XEN_HVM_CONFIG(), &raw const config) };
    if done < 0 {
        return Err(refused("hand over hypercalls", kvm_ioctls::Error::last()));
    }
    Ok(())
}

fn filter_msrs(kvm: &Kvm, fd: &VmFd, msrs: &[RangeInclusive<u32>]) -> Result<(), EngineError> {
    if !kvm.check_extension(Cap::X86UserSpaceMsr) || !kvm.check_extension(Cap::X86MsrFilter) {
        return Err(lacks(
            "KVM on this host keeps MSRs to itself",
            "boot a kernel of Linux 5.10 or later",
        ));
    }
    if let Some(range) = msrs.iter().find(|range| overlaps(range, &X2APIC)) {
        return Err(EngineError::Unavailable(format!(
            "KVM does not hand over the x2APIC's MSRs, of which {:#x}-{:#x} are some; \
             use engine bt",
            range.start(),
            range.end()
        )));
    }
    let zeros = [0; KVM_MSR_FILTER_MAX_BITMAP_SIZE as usize];
    let mut ranges = Vec::new();
    for range in msrs {
        let (mut base, mut left) = (*range.start(), u64::from(range.end() - range.start()) + 1);
        while left > 0 {
            let msr_count = left.min(u64::from(MSRS_PER_RANGE)) as u32;
            let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
            let bitmap = &zeros[..msr_count.div_ceil(8) as usize];
            ranges.push(MsrFilterRange { flags, base, msr_count, bitmap });
            if ranges.len() > KVM_MSR_FILTER_MAX_RANGES as usize {
                return Err(EngineError::Unavailable(format!(
                    "KVM hands over MSRs of {KVM_MSR_FILTER_MAX_RANGES} ranges at most, of \
                     {MSRS_PER_RANGE} each"
                ))
                .mended_by("use engine bt"));
            }
            left -= u64::from(msr_count);
            base = base.wrapping_add(msr_count);
        }
    }
    let mut exits = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    exits.args[0] = u64::from(KVM_MSR_EXIT_REASON_FILTER);
    fd.enable_cap(&exits).map_err(|error| refused("hand over MSRs", error))?;
    fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(|error| refused("filter MSRs", error))
}

fn overlaps(a: &RangeInclusive<u32>, b: &RangeInclusive<u32>) -> bool {
    a.start() <= b.end() && b.start() <= a.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tetrarch_engine::RegisterPorts;

    fn ports(ports: RangeInclusive<u16>, any_privilege: bool) -> Platform {
        Platform { ports: vec![RegisterPorts { ports, any_privilege }], ..Platform::default() }
    }

    #[test]
    fn ports_past_iopl_need_the_hosts_consent() {
        let backdoor = ports(0x5658..=0x5659, true);
        assert!(check_ports(&backdoor, Some("Y\n")).is_ok());
        for refusal in [Some("N\n"), None] {
            let line = check_ports(&backdoor, refusal).unwrap_err().to_string();
            assert!(line.contains("enable_vmware_backdoor=Y") && line.contains("engine bt"));
        }
        let line = check_ports(&ports(0x5658..=0x5670, true), Some("Y")).unwrap_err().to_string();
        assert!(line.contains("0x5658-0x5670"), "{line}");
        assert!(check_ports(&ports(0x500..=0x500, false), None).is_ok());
    }
}
