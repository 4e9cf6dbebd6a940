//! The host's end of a guest's vsock ports: Unix sockets, whatever device carries the bytes.
//!
//! As Firecracker's users know it: a program of the host connects to PATH, writes
//! "CONNECT port\n" and gets "OK port\n" when a program in the guest has accepted; one of
//! the guest that connects to port N of the host meets who listens at PATH_N. This crate knows
//! no guest memory and no device.

mod greeting;
mod programs;

pub use greeting::{Greeted, Greeting};
pub use programs::{Programs, Ready, flush};

/// The host's CID (vsock(7)).
pub const HOST: u32 = 2;
/// What a device has at most, with those that are not open yet.
pub const MAX_CONNECTIONS: usize = 1024;
/// Ports of the host for connections that begin there (as in vsock(7): not yet in use).
pub const FIRST_PORT: u32 = 1 << 30;
/// A program that listens and is too busy to accept is called again so often, in this time:
/// 2 s in all, after which Linux's connect(2) gives up too.
pub const CALLS: u32 = 100;
const CALL_AGAIN_NS: i64 = 20_000_000;

/// A port of the host that no connection has, from `next` on; the one behind it is the next.
pub fn free_port(next: &mut u32, mut taken: impl FnMut(u32) -> bool) -> u32 {
    loop {
        let port = *next;
        *next = port.checked_add(1).unwrap_or(FIRST_PORT);
        if !taken(port) {
            return port;
        }
    }
}

/// What the host's program reads when the guest has accepted.
pub fn welcome(port: u32) -> Vec<u8> {
    format!("OK {port}\n").into_bytes()
}
