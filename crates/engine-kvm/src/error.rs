//! Refusals of the kernel, as errors with cause and mend.

use std::io::Error;

use tetrarch_engine::{EngineError, Unusable};

/// An ioctl that failed: what for, why, and what may help.
pub fn refused(what: &str, error: kvm_ioctls::Error) -> EngineError {
    unusable(what, error).into()
}

/// The same, where nothing of a machine is there yet.
pub fn unusable(what: &str, error: kvm_ioctls::Error) -> Unusable {
    let otherwise = match error.errno() {
        libc::EBUSY => "end other hypervisors on the host",
        _ => "look into the host's kernel log, or use engine bt",
    };
    let cause = Error::from_raw_os_error(error.errno());
    Unusable::refused(&format!("KVM cannot {what}"), &cause, otherwise)
}
