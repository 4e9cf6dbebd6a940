//! Guest memory: RAM in one memfd, addressed by guest physical address.
//!
//! RAM is always a memfd, so that it can be shared with other processes
//! (vhost-user back ends, other domains) and saved without a copy. This crate
//! knows no device and no engine.

mod address;
mod guest_memory;

pub use address::{GuestPhys, GuestVirt, PAGE_SHIFT, PAGE_SIZE};
pub use guest_memory::{GuestMemory, MemoryError, Region, WriteObserver};
