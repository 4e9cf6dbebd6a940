//! AF_VSOCK stream sockets (vsock(7)), which std does not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn listen(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain calls; the address is a whole one of the family, and lives as long as
    // the call; what socket gives is nobody else's.
    unsafe {
        let socket =
            checked(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        checked(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        checked(libc::listen(socket.as_raw_fd(), 16))?;
        Ok(socket)
    }
}

/// A stream as a file: that is all that is needed of it.
pub fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: no address is asked for; what accept4 gives is nobody else's.
    unsafe {
        let (none, no_length) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = libc::SOCK_CLOEXEC;
        let stream = checked(libc::accept4(listener.as_raw_fd(), none, no_length, flags))?;
        Ok(File::from_raw_fd(stream))
    }
}
