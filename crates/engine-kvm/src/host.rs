//! Opening /dev/kvm, and in plain words what is wrong with it.

use std::ffi::CString;
use std::io::Error;
use std::os::unix::fs::FileTypeExt;

use kvm_ioctls::{Cap, Kvm};
use tetrarch_engine::Unusable;

pub const DEVICE: &str = "/dev/kvm";

/// The only version there is since Linux 2.6.22 (api.rst, 4.1).
const API_VERSION: i32 = 12;

/// What no machine of ours runs without; all are older than Linux 4.13.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::Irqchip, "interrupt controllers in the kernel (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "the interval timer in the kernel (KVM_CAP_PIT2)"),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (Cap::ExtCpuid, "CPUID tables (KVM_CAP_EXT_CPUID)"),
    (Cap::MpState, "processor states (KVM_CAP_MP_STATE)"),
    (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// The KVM device, or why it cannot be used.
pub fn open(path: &str) -> Result<Kvm, Unusable> {
    let name = CString::new(path)
        .map_err(|_| Unusable::new(format!("{path:?} is no file name"), "name a device"))?;
    let kvm = Kvm::new_with_path(&name).map_err(|error| open_failed(path, error.errno()))?;
    let is_device =
        std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_char_device());
    let version = if is_device { kvm.get_api_version() } else { -1 };
    if version < 0 {
        return Err(Unusable::new(
            format!("{path} is not KVM: it does not answer KVM_GET_API_VERSION"),
            "remove it and load kvm_intel or kvm_amd, which makes the right one",
        ));
    }
    if version != API_VERSION {
        return Err(Unusable::new(
            format!("{path} speaks version {version} of KVM's interface, not {API_VERSION}"),
            "use a kernel of Linux 4.13 or later",
        ));
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(Unusable::new(
                format!("{path} lacks {name}"),
                "use a kernel of Linux 4.13 or later with a full KVM",
            ));
        }
    }
    Ok(kvm)
}

fn open_failed(path: &str, errno: i32) -> Unusable {
    match errno {
        libc::ENOENT => Unusable::new(
            format!(
                "there is no {path}: the host has no hardware virtualization, or its kernel no kvm \
                 module loaded"
            ),
            "turn VT-x or AMD-V on in the firmware, then: modprobe kvm_intel (or kvm_amd)",
        ),
        // What grants it depends on the device's owner, group and access list.
        libc::EACCES | libc::EPERM => Unusable::new(
            format!("no permission to open {path}"),
            "see tetrarch doctor for what grants it",
        ),
        libc::ENXIO | libc::ENODEV => Unusable::new(
            format!("{path} has no driver behind it"),
            "load one: modprobe kvm_intel (or kvm_amd)",
        ),
        libc::EMFILE | libc::ENFILE => Unusable::new(
            format!("{path} cannot be opened: too many open files"),
            "raise the limit with ulimit -n",
        ),
        _ => Unusable::new(
            format!("{path} cannot be opened: {}", Error::from_raw_os_error(errno)),
            "look into the kernel's log",
        ),
    }
}

/// Why the engine cannot run here, if it cannot. Opens the device and no more.
pub fn available() -> Result<(), Unusable> {
    open(DEVICE).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_names_modules() {
        let reason = open("/nonexistent/kvm").err().unwrap();
        assert!(reason.mend.contains("modprobe"), "{reason}");
    }

    #[test]
    fn device_that_is_not_kvm_is_told_apart() {
        let reason = open("/dev/null").err().unwrap();
        assert!(reason.cause.starts_with("/dev/null is not KVM"), "{reason}");
        let reason = open("/etc/hostname").err().unwrap();
        assert!(reason.cause.contains("is not KVM"), "{reason}");
    }
}
