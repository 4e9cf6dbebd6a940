//! A disk whose failed writes wait for the host to be mended, instead of being failures
//! to the guest: `werror=stop`.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::wakers::either;
use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, Completion, ImageError, Request};

/// Hears of each write that waits. It is called on the disk's I/O thread, which the
/// machine's pause waits for: so it may only tell others.
pub type OnStop = dyn Fn(BlockError) + Send + Sync;

pub struct StopOnError {
    inner: Box<dyn BlockBackend>,
    on_stop: Arc<OnStop>,
    /// An event of each open queue: its waiting writes are to be tried again.
    queues: Mutex<Vec<Weak<OwnedFd>>>,
}

impl StopOnError {
    pub fn new(inner: Box<dyn BlockBackend>, on_stop: Arc<OnStop>) -> Self {
        Self { inner, on_stop, queues: Mutex::default() }
    }
}

impl BlockBackend for StopOnError {
    fn info(&self) -> BlockInfo {
        self.inner.info()
    }

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        let failed =
            |e| ImageError::host(Path::new("a disk with werror=stop"), "cannot be set up", e);
        let inner = self.inner.open_queue()?;
        let retry = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let retry = Arc::new(retry.map_err(|errno| failed(errno.into()))?);
        let event = either([inner.event(), retry.as_fd()]).map_err(failed)?;
        let mut queues = self.queues.lock();
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&retry));
        let on_stop = Arc::clone(&self.on_stop);
        let (writes, stopped) = (HashMap::new(), Vec::new());
        Ok(Box::new(StoppingQueue { inner, on_stop, writes, stopped, retry, event }))
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        self.inner.resize(size)
    }

    fn retry(&self) {
        for queue in self.queues.lock().iter().filter_map(Weak::upgrade) {
            // It fails only where the counter is full, and then it is readable.
            let _ = rustix::io::write(&*queue, &1u64.to_ne_bytes());
        }
        self.inner.retry();
    }
}

struct StoppingQueue {
    inner: Box<dyn BlockQueue>,
    on_stop: Arc<OnStop>,
    /// In flight, by their tags.
    writes: HashMap<u64, Request>,
    stopped: Vec<(u64, Request)>,
    retry: Arc<OwnedFd>,
    event: OwnedFd,
}

/// Whether what failed is the host's matter, and may succeed later.
fn can_be_mended(error: BlockError) -> bool {
    matches!(error, BlockError::NoSpace | BlockError::Host(_))
}

impl BlockQueue for StoppingQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        if request.writes() {
            self.writes.insert(tag, request.clone());
        }
        self.inner.submit(tag, request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn stopped(&self) -> usize {
        self.stopped.len() + self.inner.stopped()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        if rustix::io::read(&*self.retry, &mut [0u8; 8]).is_ok() && !self.stopped.is_empty() {
            for (tag, request) in std::mem::take(&mut self.stopped) {
                self.submit(tag, request);
            }
            self.inner.kick();
        }
        let first = done.len();
        self.inner.completions(done);
        let Self { writes, stopped, on_stop, .. } = self;
        let mut index = 0;
        done.retain(|&(tag, result)| {
            index += 1;
            if index <= first {
                return true;
            }
            match (writes.remove(&tag), result) {
                (Some(request), Err(error)) if can_be_mended(error) => {
                    stopped.push((tag, request));
                    on_stop(error);
                    false
                }
                _ => true,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use rustix::io::Errno;

    use super::*;
    use crate::testing::Driver;
    use crate::workers::{Blocking, WorkerQueue};

    /// A disk on a host that is full.
    struct Full(AtomicBool);

    impl Blocking for Full {
        fn info(&self) -> BlockInfo {
            BlockInfo {
                size: 1 << 20,
                block_size: 512,
                readonly: false,
                discards: true,
                discard_granularity: 512,
            }
        }

        fn serve(&self, request: &Request) -> Result<(), BlockError> {
            let full = self.0.load(Ordering::Relaxed);
            match request {
                Request::Write { offset: 0, .. } => Err(BlockError::ReadOnly),
                Request::Write { .. } if full => Err(BlockError::NoSpace),
                Request::Read { .. } if full => Err(BlockError::Host(Errno::IO)),
                _ => Ok(()),
            }
        }
    }

    struct Disk(Arc<Full>);

    impl BlockBackend for Disk {
        fn info(&self) -> BlockInfo {
            self.0.info()
        }

        fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
            Ok(Box::new(WorkerQueue::new(Arc::clone(&self.0) as _).unwrap()))
        }

        fn resize(&self, _: u64) -> Result<(), ImageError> {
            Ok(())
        }
    }

    #[test]
    fn writes_to_a_full_host_wait_and_are_tried_again() {
        let full = Arc::new(Full(AtomicBool::new(true)));
        let stops = Arc::new(AtomicU32::new(0));
        let on_stop = {
            let stops = Arc::clone(&stops);
            move |error| {
                assert_eq!(error, BlockError::NoSpace);
                stops.fetch_add(1, Ordering::Relaxed);
            }
        };
        let disk = StopOnError::new(Box::new(Disk(Arc::clone(&full))), Arc::new(on_stop));
        let mut driver = Driver::new(disk.open_queue().unwrap());
        let data = driver.list(&[(0, 512)]);
        for (tag, offset) in [(1, 512), (2, 1024), (3, 0)] {
            driver.queue.submit(tag, Request::Write { offset, data: data.clone() });
        }
        driver.queue.submit(4, Request::Flush);
        driver.queue.submit(5, Request::Read { offset: 0, data });
        // What no host can mend, and what writes nothing, ends at once.
        let ended =
            [(3, Err(BlockError::ReadOnly)), (4, Ok(())), (5, Err(BlockError::Host(Errno::IO)))];
        assert_eq!(driver.wait(3), ended);
        while stops.load(Ordering::Relaxed) < 2 {
            assert_eq!(driver.wait(0), []);
        }
        assert_eq!(driver.queue.stopped(), 2);
        // Still full: they wait again.
        disk.retry();
        while stops.load(Ordering::Relaxed) < 4 {
            assert_eq!(driver.wait(0), []);
        }
        full.0.store(false, Ordering::Relaxed);
        disk.retry();
        assert_eq!(driver.wait(2), [(1, Ok(())), (2, Ok(()))]);
        assert_eq!(driver.queue.stopped(), 0);
    }
}
