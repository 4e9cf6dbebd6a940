//! vhost-user (QEMU's docs/interop/vhost-user.rst): the front end's side of the protocol.
//!
//! A back end is another process, which serves the queues of a virtio device in memory that it
//! is given. This crate speaks to it over a Unix socket; it knows no queue and no device. What a
//! back end says is not trusted: every answer is checked, and has to come in time. rust-vmm's
//! crate `vhost` waits for an answer without end, and so is not used.

mod connection;
mod frontend;
mod message;

pub use connection::BackEndError;
pub use frontend::{Frontend, MemoryRegion, VERSION_1, VringSetup};
pub use message::Request;
