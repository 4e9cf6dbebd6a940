//! The contract between a disk's front end and its back end.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use tetrarch_memory::ScatterList;

use crate::{BlockError, ImageError};

/// The unit of a disk's size, whatever its blocks: ATA's, virtio's and every format's.
pub const SECTOR: u64 = 512;

/// What a front end shows of a disk. The size may change while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockInfo {
    /// In bytes, a multiple of [`SECTOR`].
    pub size: u64,
    /// A request of one such block, or of several, at a multiple of it, is served
    /// without another to read what lies around.
    pub block_size: u32,
    pub readonly: bool,
    /// Whether `Discard` gives space back to the host.
    pub discards: bool,
    /// The granularity at which it does.
    pub discard_granularity: u32,
}

impl BlockInfo {
    /// Where a disk was: the machine has ended.
    pub const NONE: Self = Self {
        size: 0,
        block_size: 512,
        readonly: true,
        discards: false,
        discard_granularity: 512,
    };
}

/// A request to a disk. Data moves between guest memory and `offset` bytes into the
/// disk, at any alignment.
#[derive(Debug, Clone)]
pub enum Request {
    Read {
        offset: u64,
        data: ScatterList,
    },
    Write {
        offset: u64,
        data: ScatterList,
    },
    /// All that was completed before this was submitted is durable when it completes.
    Flush,
    /// The bytes are needed no more; what they read as is undefined.
    Discard {
        offset: u64,
        length: u64,
    },
    /// The bytes read as 0; with `unmap` they may be given back to the host.
    WriteZeroes {
        offset: u64,
        length: u64,
        unmap: bool,
    },
}

impl Request {
    /// Where on the disk, and how many bytes; none for a flush.
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, data } | Self::Write { offset, data } => (*offset, data.len()),
            Self::Discard { offset, length } | Self::WriteZeroes { offset, length, .. } => {
                (*offset, *length)
            }
            Self::Flush => (0, 0),
        }
    }

    pub fn writes(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Flush)
    }

    /// Refuses what no disk of this kind can do.
    pub(crate) fn check(&self, info: &BlockInfo) -> Result<(), BlockError> {
        let (offset, length) = self.range();
        if self.writes() && info.readonly {
            return Err(BlockError::ReadOnly);
        }
        match offset.checked_add(length) {
            Some(end) if end <= info.size => Ok(()),
            _ => Err(BlockError::Beyond { offset, length, size: info.size }),
        }
    }
}

/// A request's tag, as it was submitted, and how it ended.
pub type Completion = (u64, Result<(), BlockError>);

/// A disk. Any number of queues may be open, each for one thread.
pub trait BlockBackend: Send + Sync {
    fn info(&self) -> BlockInfo;

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError>;

    /// Gives the disk another size. Requests beyond a smaller one fail from now on.
    fn resize(&self, size: u64) -> Result<(), ImageError>;

    /// All that was completed is durable when it returns, as after [`Request::Flush`]: for who has
    /// no queue. It waits for the host.
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Tries anew what waits for the host to be mended, where anything does.
    fn retry(&self) {}

    /// What was done so far, by the names of QEMU's BlockDeviceStats; empty where nobody counts.
    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }
}

/// Requests to a disk, in the hands of one thread. Dropping it waits for what is in
/// flight, since the kernel may write to guest memory until then.
pub trait BlockQueue: Send {
    /// Takes a request; a refused one is a completion too. `tag` is the caller's.
    fn submit(&mut self, tag: u64, request: Request);

    /// Starts what was submitted. [`completions`](Self::completions) is due after it:
    /// some may have completed already.
    fn kick(&mut self);

    /// Becomes readable when there are completions, and stays so until they are taken.
    fn event(&self) -> BorrowedFd<'_>;

    /// Moves what has completed, in no order, to the end of `done`.
    fn completions(&mut self, done: &mut Vec<Completion>);

    /// The machine is to come to rest: what waits for a limit goes now.
    fn hurry(&mut self) {}

    /// How many requests wait for [`BlockBackend::retry`]: nothing else moves them.
    fn stopped(&self) -> usize {
        0
    }
}
