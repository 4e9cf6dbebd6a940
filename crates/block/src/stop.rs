//! A disk whose failed writes wait for the host to be mended, instead of being failures
//! to the guest: `werror=stop`.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::wakers::either;
use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, Completion, ImageError, Request};

/// Hears of the first write that waits since the disk was told to try again. It is called
/// on the disk's I/O thread, which the machine's pause waits for: so it may only tell others.
pub type OnStop = dyn Fn(BlockError, Waits) + Send + Sync;

/// Whether the write still waits, and was not to be tried again since.
pub struct Waits(Weak<Stop>);

impl Waits {
    pub fn still(&self) -> bool {
        self.0.upgrade().is_some_and(|stop| stop.told.load(Ordering::SeqCst))
    }
}

pub struct StopOnError {
    inner: Box<dyn BlockBackend>,
    on_stop: Arc<OnStop>,
    /// Of each open queue.
    queues: Mutex<Vec<Weak<Stop>>>,
}

/// What a queue and its disk tell each other.
struct Stop {
    /// The queue has told of a write that waits, and nobody has asked to try again since.
    told: AtomicBool,
    /// The queue's waiting writes are to be tried again.
    retry: OwnedFd,
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
        let retry = retry.map_err(|errno| failed(errno.into()))?;
        let event = either([inner.event(), retry.as_fd()]).map_err(failed)?;
        let stop = Arc::new(Stop { told: AtomicBool::new(false), retry });
        let mut queues = self.queues.lock();
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&stop));
        let on_stop = Arc::clone(&self.on_stop);
        let (flying, stopped) = (HashMap::new(), Vec::new());
        Ok(Box::new(StoppingQueue { inner, on_stop, flying, next: 0, stopped, stop, event }))
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        self.inner.resize(size)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.inner.flush()
    }

    fn retry(&self) {
        for queue in self.queues.lock().iter().filter_map(Weak::upgrade) {
            // In this order: a write that fails again tells again.
            queue.told.store(false, Ordering::SeqCst);
            // It fails only where the counter is full, and then it is readable.
            let _ = rustix::io::write(&queue.retry, &1u64.to_ne_bytes());
        }
        self.inner.retry();
    }
}

struct StoppingQueue {
    inner: Box<dyn BlockQueue>,
    on_stop: Arc<OnStop>,
    /// What is in flight, by tags of ours, since several may have one of the caller's: that
    /// tag, and the request if it writes.
    flying: HashMap<u64, (u64, Option<Request>)>,
    next: u64,
    stopped: Vec<(u64, Request)>,
    stop: Arc<Stop>,
    event: OwnedFd,
}

/// Whether what failed is the host's matter, and may succeed later.
fn can_be_mended(error: BlockError) -> bool {
    matches!(error, BlockError::NoSpace | BlockError::Host(_))
}

impl BlockQueue for StoppingQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        let own = self.next;
        self.next += 1;
        self.flying.insert(own, (tag, request.writes().then(|| request.clone())));
        self.inner.submit(own, request);
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
        if rustix::io::read(&self.stop.retry, &mut [0u8; 8]).is_ok() && !self.stopped.is_empty() {
            for (tag, request) in std::mem::take(&mut self.stopped) {
                self.submit(tag, request);
            }
            self.inner.kick();
        }
        let first = done.len();
        self.inner.completions(done);
        for (own, result) in done.split_off(first) {
            let Some((tag, request)) = self.flying.remove(&own) else { continue };
            match (request, result) {
                (Some(request), Err(error)) if can_be_mended(error) => {
                    self.stopped.push((tag, request));
                    if !self.stop.told.swap(true, Ordering::SeqCst) {
                        (self.on_stop)(error, Waits(Arc::downgrade(&self.stop)));
                    }
                }
                _ => done.push((tag, result)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
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

    type Stops = Arc<Mutex<Vec<Waits>>>;

    fn full_disk() -> (Arc<Full>, Stops, StopOnError) {
        let full = Arc::new(Full(AtomicBool::new(true)));
        let stops = Stops::default();
        let told = Arc::clone(&stops);
        let on_stop = move |error, waits| {
            assert_eq!(error, BlockError::NoSpace);
            told.lock().push(waits);
        };
        let disk = StopOnError::new(Box::new(Disk(Arc::clone(&full))), Arc::new(on_stop));
        (full, stops, disk)
    }

    fn are_waiting(stops: &Stops) -> Vec<bool> {
        stops.lock().iter().map(Waits::still).collect()
    }

    /// Until so many writes wait; nothing else ends meanwhile.
    fn wait_stopped(driver: &mut Driver, count: usize) {
        while driver.queue.stopped() < count {
            assert_eq!(driver.wait(0), []);
        }
    }

    #[test]
    fn writes_to_a_full_host_wait_and_are_tried_again() {
        let (full, stops, disk) = full_disk();
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
        wait_stopped(&mut driver, 2);
        // One word for both.
        assert_eq!(are_waiting(&stops), [true]);
        // Still full: they wait again, which is another stop.
        disk.retry();
        assert_eq!(are_waiting(&stops), [false]);
        while stops.lock().len() < 2 {
            assert_eq!(driver.wait(0), []);
        }
        wait_stopped(&mut driver, 2);
        assert_eq!(stops.lock().len(), 2);
        full.0.store(false, Ordering::Relaxed);
        disk.retry();
        assert_eq!(driver.wait(2), [(1, Ok(())), (2, Ok(()))]);
        assert_eq!(driver.queue.stopped(), 0);
        assert!(!stops.lock()[1].still());
    }

    #[test]
    fn each_part_of_a_request_waits_for_itself() {
        let (full, stops, disk) = full_disk();
        let mut driver = Driver::new(disk.open_queue().unwrap());
        let data = driver.list(&[(0, 512)]);
        // As a discard of several ranges has one tag.
        for offset in [512, 1024, 0, 1536] {
            driver.queue.submit(7, Request::Write { offset, data: data.clone() });
        }
        assert_eq!(driver.wait(1), [(7, Err(BlockError::ReadOnly))]);
        wait_stopped(&mut driver, 3);
        full.0.store(false, Ordering::Relaxed);
        disk.retry();
        assert_eq!(driver.wait(3), [(7, Ok(())); 3]);
        assert_eq!(stops.lock().len(), 1);
    }

    #[test]
    fn queue_that_is_opened_anew_tells_of_its_own_stops() {
        let (_full, stops, disk) = full_disk();
        for round in 1..=2 {
            let mut driver = Driver::new(disk.open_queue().unwrap());
            let data = driver.list(&[(0, 512)]);
            driver.queue.submit(1, Request::Write { offset: 512, data });
            driver.queue.kick();
            wait_stopped(&mut driver, 1);
            assert_eq!(stops.lock().len(), round);
            drop(driver);
            assert!(!stops.lock()[round - 1].still());
        }
    }
}
