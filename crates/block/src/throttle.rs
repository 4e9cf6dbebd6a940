//! A disk with a speed limit.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::wakers::either;
use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, Completion, ImageError, Request};

/// Reads and writes a second, and their bytes, of all queues together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub iops: Option<u64>,
    pub bps: Option<u64>,
}

/// As QEMU's default (util/throttle.c): a disk that was idle may run ahead so far.
const BURST: Duration = Duration::from_millis(100);

/// What may pass: a level that rises by `rate` a second up to a burst. What passes takes
/// it down, below zero too, and nothing passes until it is above again: so a request of
/// any size gets through.
#[derive(Debug)]
struct Bucket {
    rate: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: u64, now: Instant) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, level: 0.0, at: now }
    }

    /// How long nothing may pass.
    fn wait(&mut self, now: Instant) -> Duration {
        let risen = now.saturating_duration_since(self.at).as_secs_f64() * self.rate;
        let burst = (self.rate * BURST.as_secs_f64()).max(1.0);
        self.level = (self.level + risen).min(burst);
        self.at = now;
        Duration::from_secs_f64((-self.level / self.rate).max(0.0))
    }
}

#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Buckets {
    fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, now));
        Self { requests: bucket(limits.iops), bytes: bucket(limits.bps) }
    }

    /// Lets a request of so many bytes pass, or says how long it waits.
    fn pass(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let all = [self.requests.as_mut(), self.bytes.as_mut()];
        let wait = all.into_iter().flatten().map(|bucket| bucket.wait(now)).max();
        match wait {
            Some(wait) if wait > Duration::ZERO => Err(wait),
            _ => {
                for (bucket, cost) in [(&mut self.requests, 1), (&mut self.bytes, bytes)] {
                    bucket.iter_mut().for_each(|bucket| bucket.level -= cost as f64);
                }
                Ok(())
            }
        }
    }
}

pub struct Throttled {
    inner: Box<dyn BlockBackend>,
    buckets: Arc<Mutex<Buckets>>,
}

impl Throttled {
    pub fn new(inner: Box<dyn BlockBackend>, limits: Limits) -> Self {
        Self { inner, buckets: Arc::new(Mutex::new(Buckets::new(limits, Instant::now()))) }
    }
}

impl BlockBackend for Throttled {
    fn info(&self) -> BlockInfo {
        self.inner.info()
    }

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        let failed = |e| ImageError::host(Path::new("a disk's limits"), "cannot be kept", e);
        let inner = self.inner.open_queue()?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        );
        let timer = timer.map_err(|errno| failed(errno.into()))?;
        let event = either([inner.event(), timer.as_fd()]).map_err(failed)?;
        let buckets = Arc::clone(&self.buckets);
        Ok(Box::new(ThrottledQueue { inner, buckets, timer, event, waiting: VecDeque::new() }))
    }

    fn resize(&self, size: u64) -> Result<(), ImageError> {
        self.inner.resize(size)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.inner.flush()
    }

    fn retry(&self) {
        self.inner.retry();
    }
}

struct ThrottledQueue {
    inner: Box<dyn BlockQueue>,
    buckets: Arc<Mutex<Buckets>>,
    waiting: VecDeque<(u64, Request)>,
    timer: OwnedFd,
    event: OwnedFd,
}

impl ThrottledQueue {
    /// Passes on what may go, and sets the timer for what may not.
    fn release(&mut self) {
        let now = Instant::now();
        let mut wait = None;
        while let Some((tag, request)) = self.waiting.pop_front() {
            let passed = self.buckets.lock().pass(request.range().1, now);
            if let Err(time) = passed {
                self.waiting.push_front((tag, request));
                wait = Some(time);
                break;
            }
            self.inner.submit(tag, request);
        }
        if let Some(wait) = wait {
            // Zero would stop the timer.
            let wait = wait.max(Duration::from_micros(1)).min(Duration::from_secs(1 << 20));
            let mut time = Itimerspec {
                it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
                it_value: Timespec { tv_sec: 0, tv_nsec: 0 },
            };
            time.it_value.tv_sec = wait.as_secs() as _;
            time.it_value.tv_nsec = wait.subsec_nanos() as _;
            // A valid time is never refused.
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time);
        }
    }
}

impl BlockQueue for ThrottledQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        match request {
            Request::Read { .. } | Request::Write { .. } => self.waiting.push_back((tag, request)),
            // They move no data; a flush speaks of what has completed.
            _ => self.inner.submit(tag, request),
        }
    }

    fn kick(&mut self) {
        self.release();
        self.inner.kick();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn hurry(&mut self) {
        for (tag, request) in self.waiting.drain(..) {
            self.inner.submit(tag, request);
        }
        self.inner.kick();
        self.inner.hurry();
    }

    fn stopped(&self) -> usize {
        self.inner.stopped()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        if rustix::io::read(&self.timer, &mut [0u8; 8]).is_ok() {
            self.kick();
        }
        self.inner.completions(done);
    }
}

impl Drop for ThrottledQueue {
    fn drop(&mut self) {
        // What the guest submitted reaches the disk, as with any other.
        self.hurry();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ImageOptions, open};
    use crate::testing::Driver;

    #[test]
    fn requests_pass_at_the_rate_of_the_limits() {
        let start = Instant::now();
        let limits = Limits { iops: Some(100), bps: Some(1_000_000) };
        let mut buckets = Buckets::new(limits, start);
        let mut passed = |bytes: u64, from: u64, to: u64| {
            let mut count = 0;
            for ms in from..to {
                let now = start + Duration::from_millis(ms);
                while buckets.pass(bytes, now).is_ok() {
                    count += 1;
                }
            }
            count
        };
        // One more than a second's: the level may fall to below zero by one request.
        assert!((100..=101).contains(&passed(512, 0, 1000)));
        assert!((15..=17).contains(&passed(65536, 1000, 2000)));
        // Idle for long: a burst of a tenth of a second, not of all the time.
        assert!((10..=11).contains(&passed(512, 60_000, 60_001)));
        // One that is larger than a second's bytes gets through, and is made up for.
        assert_eq!(passed(3_000_000, 70_000, 70_001), 1);
        assert_eq!(passed(1, 70_001, 72_800), 0);
        assert!(passed(1, 72_800, 73_000) > 0);
    }

    #[test]
    fn limited_disk_serves_all_and_takes_its_time() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = open(image.path(), ImageOptions::default()).unwrap();
        let disk = Throttled::new(disk, Limits { iops: Some(100), bps: None });
        let mut driver = Driver::new(disk.open_queue().unwrap());
        let start = Instant::now();
        for i in 0..20 {
            let data = driver.list(&[(0, 512)]);
            driver.queue.submit(i, Request::Read { offset: i * 512, data });
        }
        assert!(driver.wait(20).iter().all(|(_, result)| result.is_ok()));
        // No more than a burst of 10 goes at once; slower a busy host may be.
        assert!(start.elapsed() >= Duration::from_millis(90), "{:?}", start.elapsed());
        assert_eq!(driver.run(Request::Flush), Ok(()));
    }

    #[test]
    fn machine_that_comes_to_rest_waits_for_no_limit() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = open(image.path(), ImageOptions::default()).unwrap();
        let disk = Throttled::new(disk, Limits { iops: Some(1), bps: None });
        let mut driver = Driver::new(disk.open_queue().unwrap());
        for i in 0..100 {
            let data = driver.list(&[(0, 512)]);
            driver.queue.submit(i, Request::Read { offset: i * 512, data });
        }
        driver.queue.kick();
        driver.queue.hurry();
        // At their rate it would be a minute and a half.
        assert_eq!(driver.wait(100).len(), 100);
    }
}
