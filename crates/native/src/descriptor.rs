//! Descriptors that Python gives.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::error::Failure;

/// A copy of a descriptor of Python's, which keeps its own.
pub fn own_descriptor(number: i32) -> Result<OwnedFd, Failure> {
    // SAFETY: fcntl takes any number, and says where it is no descriptor.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Failure::refused(format!("descriptor {number}: {error}")));
    }
    // SAFETY: fcntl has just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
