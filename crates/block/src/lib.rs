//! Disks: what a controller asks of one, and the host's files behind it.
//!
//! A front end (virtio-blk, NVMe, AHCI) knows requests over guest memory and bytes of
//! a disk; it opens a queue of a [`BlockBackend`], submits, and hears of completions
//! by a file descriptor, so that one I/O thread serves it without a lock. Files,
//! formats and the kernel's interfaces are behind the trait, and so are limits and
//! policies, each a backend around another.

mod backend;
mod check;
mod counted;
mod create;
mod error;
mod failures;
mod foreign;
mod format;
mod image;
mod lock;
mod metadata;
mod new_file;
mod pread;
mod qcow2;
mod raw;
mod stop;
#[cfg(test)]
mod testing;
mod throttle;
mod transfer;
mod uring;
mod vmdk;
mod waited;
mod wakers;
mod workers;

pub use backend::{BlockBackend, BlockInfo, BlockQueue, Completion, Request, SECTOR};
pub use check::{CheckReport, check};
pub use counted::{Counted, OnError, Operation};
pub use create::{Description, NewImage, Source, Target, create, describe};
pub use error::{BlockError, ImageError};
pub use failures::Failures;
pub use image::{
    Format, ImageOptions, UnknownFormat, backing_path, guess_format, open, open_handed,
};
pub use qcow2::Qcow2Header;
pub use raw::{Cache, RawDisk, RawOptions};
pub use stop::{OnStop, StopOnError, Waits};
pub use throttle::{Limits, Throttled};
pub use waited::Waited;
