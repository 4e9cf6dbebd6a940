//! Connections of the guest to programs of the host, until these have taken them.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// What the guest has said when it asked, and how often the program was called.
pub(super) struct Dial {
    pub buffer: u32,
    pub forwarded: u32,
    pub calls: u32,
}

/// Connects to who listens at a path. `WouldBlock` where its backlog is full (unix(7)), which
/// no descriptor becomes ready for.
pub(super) fn dial(path: &OsStr) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
