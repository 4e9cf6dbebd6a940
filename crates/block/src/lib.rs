//! Disks: what a controller asks of one, and the host's files behind it.
//!
//! A front end (virtio-blk, NVMe, AHCI) knows requests over guest memory and bytes of
//! a disk; it opens a queue of a [`BlockBackend`], submits, and hears of completions
//! by a file descriptor, so that one I/O thread serves it without a lock. Files,
//! formats and the kernel's interfaces are behind the trait, and so are limits and
//! policies, each a backend around another.

mod backend;
mod error;
mod lock;
mod pread;
mod raw;
#[cfg(test)]
mod testing;
mod transfer;
mod uring;
mod workers;

pub use backend::{BlockBackend, BlockInfo, BlockQueue, Completion, Request, SECTOR};
pub use error::{BlockError, ImageError};
pub use raw::{Cache, RawDisk, RawOptions};
