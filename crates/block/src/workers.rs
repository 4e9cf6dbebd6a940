//! A queue served by threads: for formats, whose code waits for its file, and for raw
//! disks where the host gives no io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tetrarch_confine::spawn_worker;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::{BlockError, BlockInfo, BlockQueue, Completion, Request};

/// Requests of one queue that are served at a time. More would wait for the same disk.
const THREADS: usize = 4;

/// A disk whose requests take the calling thread until they are done.
pub(crate) trait Blocking: Send + Sync {
    fn info(&self) -> BlockInfo;
    fn serve(&self, request: &Request) -> Result<(), BlockError>;
}

#[derive(Default)]
struct Work {
    requests: VecDeque<(u64, Request)>,
    ends: bool,
}

/// Locks: `work` and `done`, neither held while a request is served or the other taken.
struct Shared {
    disk: Arc<dyn Blocking>,
    work: Mutex<Work>,
    more: Condvar,
    done: Mutex<Vec<Completion>>,
    event: OwnedFd,
}

impl Shared {
    fn finish(&self, tag: u64, result: Result<(), BlockError>) {
        let mut done = self.done.lock();
        done.push((tag, result));
        if done.len() == 1 {
            // It fails only where the counter is full, and then it is readable.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn run(&self) {
        loop {
            let mut work = self.work.lock();
            let (tag, request) = loop {
                match work.requests.pop_front() {
                    Some(next) => break next,
                    None if work.ends => return,
                    None => self.more.wait(&mut work),
                }
            };
            drop(work);
            // An image is as hostile as a guest: its reader's panic is an I/O error.
            let serve = AssertUnwindSafe(|| self.disk.serve(&request));
            let result = catch_unwind(serve).unwrap_or(Err(BlockError::Host(Errno::IO)));
            drop(request);
            self.finish(tag, result);
        }
    }
}

pub(crate) struct WorkerQueue {
    shared: Arc<Shared>,
    batch: Vec<(u64, Request)>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Whose threads they are: a child of fork(2) has none to end.
    process: u32,
}

impl WorkerQueue {
    pub fn new(disk: Arc<dyn Blocking>) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let (work, done) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { disk, work, more: Condvar::new(), done, event });
        let mut queue =
            Self { shared, batch: Vec::new(), threads: Vec::new(), process: std::process::id() };
        for _ in 0..THREADS {
            let shared = Arc::clone(&queue.shared);
            queue.threads.push(spawn_worker("tetrarch-disk", move || shared.run())?);
        }
        Ok(queue)
    }
}

impl BlockQueue for WorkerQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        match request.check(&self.shared.disk.info()) {
            Ok(()) => self.batch.push((tag, request)),
            Err(error) => self.shared.finish(tag, Err(error)),
        }
    }

    fn kick(&mut self) {
        let count = self.batch.len();
        if count > 0 {
            self.shared.work.lock().requests.extend(self.batch.drain(..));
            (0..count.min(THREADS)).for_each(|_| {
                self.shared.more.notify_one();
            });
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        let mut finished = self.shared.done.lock();
        if !finished.is_empty() {
            // It was written when the first came.
            let _ = rustix::io::read(&self.shared.event, &mut [0u8; 8]);
            done.append(&mut finished);
        }
    }
}

impl Drop for WorkerQueue {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return self.threads.drain(..).for_each(std::mem::forget);
        }
        self.shared.work.lock().ends = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of a format's code was printed; there is nothing to save here.
            let _ = thread.join();
        }
    }
}
