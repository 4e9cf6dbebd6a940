//! A raw image: the bytes of the disk are those of a file or a block device.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use io_uring::IoUring;
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::backend::SECTOR;
use crate::image::open_file;
use crate::uring::{self, UringQueue};
use crate::workers::{Blocking, WorkerQueue};
use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, ImageError, Request, lock};

/// What the host's page cache does for a disk. Either way a flush that has returned is
/// on the disk, and nothing else is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// It is used: the host's memory speeds up the guest's.
    #[default]
    Writeback,
    /// It is left alone (O_DIRECT), where the file system allows.
    None,
}

/// As many queues as a controller asks for: NVMe's.
const RINGS_AHEAD: usize = 4;

#[derive(Debug, Clone, Copy, Default)]
pub struct RawOptions {
    pub readonly: bool,
    pub cache: Cache,
    /// It was taken for raw by its first bytes: they may not come to look like another
    /// format's, which could name any file of the host, when it is opened again.
    pub guessed: bool,
}

/// What O_DIRECT asks of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub memory: usize,
    pub offset: u64,
}

/// The file of a raw disk, as its queues use it.
pub(crate) struct RawFile {
    /// Holds the lock, and is used for nothing else: what io_uring had of a file it lets
    /// go of some time after its end, or this process's.
    _lock: File,
    /// By the page cache.
    pub file: File,
    /// Past it. A request that it cannot take goes by `file`: the kernel keeps both
    /// coherent (open(2), O_DIRECT), and its pages are the bounce buffer.
    pub direct: Option<(File, Alignment)>,
    pub path: PathBuf,
    pub readonly: bool,
    pub guessed: bool,
    device: bool,
    block_size: u32,
    /// The disk's size: the file's, rounded up to sectors.
    size: AtomicU64,
    /// A way to write zeroes that the file system has refused.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    /// After a flush that failed Linux takes the pages for clean, and the next one
    /// succeeds (fsync(2) tells an error once): so none may succeed any more.
    lost_writes: AtomicBool,
    /// Made ahead, in a process that may make none while the guest runs.
    pub rings: Mutex<Vec<IoUring>>,
}

/// A raw disk.
pub struct RawDisk {
    file: Arc<RawFile>,
}

impl RawDisk {
    pub fn open(path: impl AsRef<Path>, options: RawOptions) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let lock = open_file(path, !options.readonly)?;
        let failed = |source| ImageError::host(path, "cannot open the image", source);
        take_lock(&lock, path, !options.readonly)?;
        let again = |flags| reopen(&lock, !options.readonly, flags);
        let file = again(0).map_err(failed)?;
        let direct = (options.cache == Cache::None).then(|| again(libc::O_DIRECT));
        let direct = match direct {
            None => None,
            Some(Ok(direct)) => {
                let alignment = direct_alignment(&direct);
                Some((direct, alignment))
            }
            Some(Err(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                let path = path.display();
                log::warn!("{path}: its file system has no O_DIRECT; cache=none is writeback here");
                None
            }
            Some(Err(error)) => return Err(failed(error)),
        };
        Self::of_files(lock, file, direct, path, options)
    }

    /// Of a file that somebody else has opened.
    pub fn of_file(lock: File, path: &Path, options: RawOptions) -> Result<Self, ImageError> {
        take_lock(&lock, path, !options.readonly)?;
        // A confined process opens nothing, and the lock then ends with what uses it last.
        let file = reopen(&lock, !options.readonly, 0).or_else(|_| lock.try_clone());
        let file = file.map_err(|e| ImageError::host(path, "cannot open the image", e))?;
        Self::of_files(lock, file, None, path, options)
    }

    fn of_files(
        lock: File,
        file: File,
        direct: Option<(File, Alignment)>,
        path: &Path,
        options: RawOptions,
    ) -> Result<Self, ImageError> {
        let metadata = file.metadata();
        let metadata = metadata.map_err(|e| ImageError::host(path, "cannot open the image", e))?;
        let device = metadata.file_type().is_block_device();
        let file = RawFile {
            _lock: lock,
            direct,
            path: path.to_owned(),
            readonly: options.readonly,
            guessed: options.guessed,
            device,
            // Guests are installed for blocks of 512 bytes: a file serves them at any
            // alignment, a device in its own.
            block_size: if device { device_block_size(&file) } else { SECTOR as u32 },
            size: AtomicU64::new(size_of(&file, path)?.next_multiple_of(SECTOR)),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            lost_writes: AtomicBool::new(false),
            rings: Mutex::default(),
            file,
        };
        if tetrarch_confine::prepared() {
            let made = (0..RINGS_AHEAD).map_while(|_| uring::new_ring(&file).ok()).collect();
            *file.rings.lock() = made;
        }
        Ok(Self { file: Arc::new(file) })
    }

    /// A queue that needs no io_uring.
    fn workers(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        let queue = WorkerQueue::new(Arc::clone(&self.file) as _);
        let failed = |e| ImageError::host(&self.file.path, "cannot start an I/O thread", e);
        Ok(Box::new(queue.map_err(failed)?))
    }
}

/// The same file, whatever has its path by now.
fn reopen(file: &File, writes: bool, flags: i32) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).write(writes).custom_flags(flags).open(path)
}

impl BlockBackend for RawDisk {
    fn info(&self) -> BlockInfo {
        self.file.info()
    }

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        match UringQueue::new(Arc::clone(&self.file)) {
            Ok(queue) => Ok(Box::new(queue)),
            // A kernel without it, a sysctl (kernel.io_uring_disabled), a seccomp filter
            // as container runtimes have, or a memory limit of old kernels.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOSYS | Errno::PERM | Errno::ACCESS | Errno::NOMEM)
                ) =>
            {
                static TOLD: std::sync::Once = std::sync::Once::new();
                TOLD.call_once(|| {
                    log::warn!("the host gives no io_uring ({error}): disks are slower by threads");
                });
                self.workers()
            }
            Err(error) => Err(ImageError::host(&self.file.path, "cannot set up io_uring", error)),
        }
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        self.file.resize(size)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.file.serve(&Request::Flush)
    }
}

impl RawFile {
    pub fn info(&self) -> BlockInfo {
        BlockInfo {
            size: self.size.load(Ordering::Relaxed),
            block_size: self.block_size,
            readonly: self.readonly,
            discards: !self.no_punch.load(Ordering::Relaxed),
            discard_granularity: 4096.max(self.block_size),
        }
    }

    /// Whether bytes that are not in the file are zeroes of the disk's last sector.
    pub fn is_padding(&self, offset: u64) -> bool {
        let end = self.file.metadata().map_or(0, |metadata| metadata.len());
        !self.device && offset >= end && end.next_multiple_of(SECTOR) == self.info().size
    }

    /// The descriptor for a request with these pieces of memory.
    pub fn takes_direct(&self, offset: u64, iovecs: &[libc::iovec]) -> bool {
        self.direct.as_ref().is_some_and(|(_, alignment)| {
            offset.is_multiple_of(alignment.offset)
                && iovecs.iter().all(|iovec| {
                    iovec.iov_base.addr().is_multiple_of(alignment.memory)
                        && (iovec.iov_len as u64).is_multiple_of(alignment.offset)
                })
        })
    }

    /// How the kernel makes these bytes zeroes without their being written; `None` where
    /// they must be.
    pub fn zero_mode(&self, unmap: bool) -> Option<FallocateFlags> {
        if unmap && !self.no_punch.load(Ordering::Relaxed) {
            return Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
        }
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        (!self.no_zero_range.load(Ordering::Relaxed)).then_some(zero_range)
    }

    /// Whether the file system has just said that it knows no such way, for good or for
    /// this range.
    pub fn refused(&self, mode: FallocateFlags, errno: Errno) -> bool {
        let never = matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV);
        if never {
            let punch = mode.contains(FallocateFlags::PUNCH_HOLE);
            let flag = if punch { &self.no_punch } else { &self.no_zero_range };
            flag.store(true, Ordering::Relaxed);
        }
        never || errno == Errno::INVAL
    }

    /// What a flush is to say, after the kernel's answer.
    pub fn flushed(&self, result: Result<(), Errno>) -> Result<(), BlockError> {
        if let Err(errno) = result {
            self.lost_writes.store(true, Ordering::Relaxed);
            return Err(errno.into());
        }
        let lost = self.lost_writes.load(Ordering::Relaxed);
        if lost { Err(BlockError::LostWrites) } else { Ok(()) }
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        let size = size.next_multiple_of(SECTOR);
        if self.device {
            // A device has its own size: the disk takes it up.
            let now = size_of(&self.file, &self.path)?.next_multiple_of(SECTOR);
            if size > now {
                let cause = format!("the device has {now} bytes");
                return Err(ImageError::new(&self.path, cause, "ask for no more"));
            }
        } else {
            let failed = |e| ImageError::host(&self.path, "cannot resize the image", e);
            self.file.set_len(size).map_err(failed)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

/// Refuses an image that somebody else writes, or uses while this would write.
pub(crate) fn take_lock(file: &File, path: &Path, writes: bool) -> Result<(), ImageError> {
    match lock::lock(file, writes) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let path = path.display();
            log::warn!("{path}: its file system has no locks; see to it that one machine uses it");
            Ok(())
        }
        Err(Errno::AGAIN | Errno::ACCESS) => {
            // A reader is kept off by a writer alone.
            let mend = if writes && lock::lock(file, false).is_ok() {
                "stop the machine or program that reads it, or add snapshot=on"
            } else {
                "stop the machine or program that writes to it"
            };
            Err(ImageError::new(path, "the image is in use", mend))
        }
        Err(errno) => Err(ImageError::host(path, "cannot lock the image", errno.into())),
    }
}

pub(crate) fn size_of(file: &File, path: &Path) -> Result<u64, ImageError> {
    // Of a device metadata says 0; its end is its size.
    rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| ImageError::host(path, "cannot find the image's size", errno.into()))
}

fn device_block_size(file: &File) -> u32 {
    rustix::fs::ioctl_blksszget(file).unwrap_or(SECTOR as u32).max(SECTOR as u32)
}

/// By statx(2), from Linux 6.1 on; where that says nothing, what every device takes.
fn direct_alignment(file: &File) -> Alignment {
    // SAFETY: all zeroes are a statx structure.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open as long as the borrow of `file`; the path is an empty
    // C string, the structure lives through the call.
    let result = unsafe {
        let (empty, mask) = (c"".as_ptr(), libc::STATX_DIOALIGN);
        libc::statx(file.as_raw_fd(), empty, libc::AT_EMPTY_PATH, mask, &mut found)
    };
    let known = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
    if known && found.stx_dio_mem_align > 0 && found.stx_dio_offset_align > 0 {
        let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
        return Alignment { memory: memory as usize, offset: u64::from(offset) };
    }
    Alignment { memory: 4096, offset: 4096 }
}

#[cfg(test)]
#[path = "raw_tests.rs"]
mod tests;
