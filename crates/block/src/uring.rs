//! The queue of a raw disk by io_uring: guest memory goes to the kernel as it is, and
//! one system call starts a batch.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;

use crate::raw::RawFile;
use crate::transfer::{By, Operation, Transfer};
use crate::wakers::either;
use crate::{BlockQueue, Completion, Request};

/// Operations that the ring has at a time. More requests wait in this process: a queue
/// of virtio has 256 places, and few disks serve more at once.
const ENTRIES: u32 = 256;

/// Of the operation that only has the ring's descriptor become readable.
const WAKE: u64 = u64::MAX;

/// A request in flight, in a box: the kernel reads its iovecs from there.
type Slot = Option<(u64, Transfer)>;

pub(crate) struct UringQueue {
    /// Some until it is dropped.
    ring: Option<IoUring>,
    /// Of a ring that was made ahead: what is told in its place, as its descriptor stays open.
    watch: Option<OwnedFd>,
    file: Arc<RawFile>,
    #[expect(clippy::vec_box, reason = "the kernel has addresses in them while the vector grows")]
    slots: Vec<Box<Slot>>,
    free: Vec<usize>,
    /// Slots whose next operation is to be given to the ring,
    waiting: VecDeque<usize>,
    /// and how many the ring has.
    in_flight: usize,
    finished: Vec<Completion>,
}

impl UringQueue {
    /// With a ring that was made ahead, where there is one.
    pub fn new(file: Arc<RawFile>) -> io::Result<Self> {
        let spare = file.rings.lock().pop();
        let (ring, watch) = match spare {
            Some(ring) => {
                // SAFETY: the ring keeps its descriptor open for longer than this block.
                let own = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
                let watch = either([own])?;
                (ring, Some(watch))
            }
            None => (new_ring(&file)?, None),
        };
        Ok(Self {
            ring: Some(ring),
            watch,
            file,
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: 0,
            finished: Vec::new(),
        })
    }

    fn ring(&mut self) -> &mut IoUring {
        self.ring.as_mut().expect("it goes when the queue does")
    }

    /// Gives waiting operations to the ring, as many as it takes, and starts them.
    fn start(&mut self) {
        while self.in_flight < ENTRIES as usize {
            let Some(index) = self.waiting.pop_front() else { break };
            let Some((_, transfer)) = self.slots[index].as_ref() else { continue };
            let entry = entry(&transfer.operation(&self.file)).user_data(index as u64);
            // SAFETY: what the operation points to is the slot's: guest memory, which its
            // scatter list keeps, iovecs, which lie in the slot's box, and the bytes of a first
            // sector, which are in a box of their own. The slot stays as
            // it is until the completion is taken; `drop` waits for that. The files are
            // registered, so the ring keeps them.
            if unsafe { self.ring().submission().push(&entry) }.is_err() {
                self.waiting.push_front(index);
                break;
            }
            self.in_flight += 1;
        }
        // The kernel may be short of memory for a moment. What it has not taken then
        // stays in the ring, and the next call gives it again.
        for _ in 0..100 {
            match self.ring().submit() {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Lets who waits for the ring hear of requests that were done without it. A ring without
    /// room has others, of which they hear.
    fn wake(&mut self) {
        let nothing = opcode::Read::new(types::Fixed(0), std::ptr::null_mut(), 0);
        let entry = nothing.build().user_data(WAKE);
        // SAFETY: it reads no byte.
        if unsafe { self.ring().submission().push(&entry) }.is_ok() {
            self.in_flight += 1;
        }
    }

    /// Takes what the ring has completed. Requests that go on are left in `waiting`.
    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring().completion().next() else { return };
            self.in_flight -= 1;
            if entry.user_data() == WAKE {
                continue;
            }
            let index = entry.user_data() as usize;
            let Some((tag, transfer)) = self.slots[index].as_mut() else { continue };
            let result = match entry.result() {
                bytes if bytes >= 0 => Ok(bytes as u64),
                error => Err(Errno::from_raw_os_error(-error)),
            };
            match transfer.step(&self.file, result) {
                None => self.waiting.push_back(index),
                Some(result) => {
                    self.finished.push((*tag, result));
                    *self.slots[index] = None;
                    self.free.push(index);
                }
            }
        }
    }
}

/// A ring for this file alone: whoever gets hold of it cannot have it open another, or a socket.
pub(crate) fn new_ring(file: &RawFile) -> io::Result<IoUring> {
    // No interrupt of this thread for each completion; from Linux 5.19 on.
    let ring = IoUring::builder().setup_coop_taskrun().setup_r_disabled().build(ENTRIES);
    let (ring, disabled) = match ring {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (IoUring::new(ENTRIES)?, false),
        ring => (ring?, true),
    };
    if !ring.params().is_feature_submit_stable() {
        // Linux before 5.5.
        return Err(Errno::NOSYS.into());
    }
    let mut files = vec![file.file.as_raw_fd()];
    files.extend(file.direct.as_ref().map(|(direct, _)| direct.as_raw_fd()));
    ring.submitter().register_files(&files)?;
    if disabled {
        let mut only: Vec<_> = OPERATIONS.into_iter().map(Restriction::sqe_op).collect();
        only.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
        ring.submitter().register_restrictions(&mut only)?;
        ring.submitter().register_enable_rings()?;
    }
    Ok(ring)
}

/// Those of `entry`.
const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fallocate::CODE,
    opcode::Fsync::CODE,
];

fn entry(operation: &Operation) -> Entry {
    let fixed = |by: &By| types::Fixed((*by == By::Direct) as u32);
    let file = types::Fixed(0);
    // Of one piece the kernel need not fetch the iovec. It moves less than 2 GiB at a
    // time; the rest follows.
    let one = |iovec: &libc::iovec| (iovec.iov_base.cast(), iovec.iov_len.min(1 << 30) as u32);
    match operation {
        Operation::Read(by, [iovec], offset) => {
            let (base, len) = one(iovec);
            opcode::Read::new(fixed(by), base, len).offset(*offset).build()
        }
        Operation::Read(by, iovecs, offset) => {
            let count = iovecs.len() as u32;
            opcode::Readv::new(fixed(by), iovecs.as_ptr(), count).offset(*offset).build()
        }
        Operation::Write(by, [iovec], offset) => {
            let (base, len) = one(iovec);
            opcode::Write::new(fixed(by), base, len).offset(*offset).build()
        }
        Operation::Write(by, iovecs, offset) => {
            let count = iovecs.len() as u32;
            opcode::Writev::new(fixed(by), iovecs.as_ptr(), count).offset(*offset).build()
        }
        Operation::WriteBytes(bytes, offset) => {
            opcode::Write::new(file, bytes.as_ptr(), bytes.len() as u32).offset(*offset).build()
        }
        Operation::Allocate(mode, offset, length) => {
            opcode::Fallocate::new(file, *length).offset(*offset).mode(mode.bits() as i32).build()
        }
        Operation::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

impl BlockQueue for UringQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        let transfer = match Transfer::new(&self.file, request) {
            Ok(transfer) => transfer,
            Err(result) => return self.finished.push((tag, result)),
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Box::default());
            self.slots.len() - 1
        });
        *self.slots[index] = Some((tag, transfer));
        self.waiting.push_back(index);
    }

    fn kick(&mut self) {
        if !self.finished.is_empty() {
            self.wake();
        }
        if !self.waiting.is_empty() || !self.ring().submission().is_empty() {
            self.start();
        }
    }

    /// The ring itself, which can be read when it has completions (io_uring(7)).
    fn event(&self) -> BorrowedFd<'_> {
        if let Some(watch) = &self.watch {
            return watch.as_fd();
        }
        let ring = self.ring.as_ref().expect("it goes when the queue does");
        // SAFETY: the ring keeps its descriptor open as long as the borrow of self.
        unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        self.reap();
        // What goes on may complete at once: each time it has come further.
        while !self.waiting.is_empty() && self.in_flight < ENTRIES as usize {
            self.start();
            self.reap();
        }
        done.append(&mut self.finished);
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            // An operation on a file ends, well or not: nothing else can be waited for.
            if let Err(error) = self.ring().submit_and_wait(1)
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                // The kernel may go on using the memory: it is never given back.
                return std::mem::forget(std::mem::take(&mut self.slots));
            }
            self.reap();
        }
        if let (Some(ring), Some(_)) = (self.ring.take(), &self.watch) {
            self.file.rings.lock().push(ring);
        }
    }
}
