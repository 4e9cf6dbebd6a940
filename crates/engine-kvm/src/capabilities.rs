//! What the host's KVM may lack, and what is lost without it.

use kvm_ioctls::{Cap, Kvm};
use tetrarch_engine::Unusable;

/// One optional part of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// As in linux/kvm.h.
    pub name: &'static str,
    /// What KVM_CHECK_EXTENSION says; 0 or less: it is missing.
    pub value: i32,
    /// What a machine does without where it is missing.
    pub lost: &'static str,
}

impl Capability {
    pub fn present(&self) -> bool {
        self.value > 0
    }
}

const OPTIONAL: [(Cap, &str, &str); 16] = [
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "message-signalled interrupts are not delivered"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "other processes cannot raise interrupts by a file descriptor"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "each notification of a device costs a full exit"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "AVX state cannot be read or set"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "XCR0 cannot be saved"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "pending exceptions cannot be saved"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "debug registers cannot be saved"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG", "no debugger can stop the guest"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "the guest's kvm-clock cannot be saved"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL", "a pause may look like a lockup to the guest"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "the guest's timer costs more exits"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "real mode may fail on old Intel CPUs"),
    (
        Cap::SetIdentityMapAddr,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "real mode may fail on old Intel CPUs",
    ),
    (Cap::ExitHypercall, "KVM_CAP_EXIT_HYPERCALL", "hypercalls of the guest end in the kernel"),
    (
        Cap::DirtyLogRing,
        "KVM_CAP_DIRTY_LOG_RING",
        "written pages are found by a bitmap, which costs more on large memory",
    ),
    (
        Cap::InternalErrorData,
        "KVM_CAP_INTERNAL_ERROR_DATA",
        "an internal error of KVM comes without its details",
    ),
];

/// Each optional capability of an open /dev/kvm.
pub fn capabilities(device: &str) -> Result<Vec<Capability>, Unusable> {
    Ok(of(&crate::host::open(device)?))
}

fn of(kvm: &Kvm) -> Vec<Capability> {
    OPTIONAL
        .into_iter()
        .map(|(cap, name, lost)| Capability { name, value: kvm.check_extension_int(cap), lost })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_is_not_kvm_has_no_capabilities_but_a_reason() {
        assert!(capabilities("/dev/null").is_err());
    }

    #[test]
    fn each_loss_is_said_in_words() {
        for (_, name, lost) in OPTIONAL {
            assert!(name.starts_with("KVM_CAP_") && lost.len() > 10, "{name}: {lost}");
        }
    }
}
