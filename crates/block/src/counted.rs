//! A disk whose requests are counted, and who hears of what the host failed.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::{BlockBackend, BlockError, BlockInfo, BlockQueue, Completion, ImageError, Request};

/// What requests are counted as. Zeroes that are written are writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Unmap,
}

impl Operation {
    const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Unmap];

    fn of(request: &Request) -> Self {
        match request {
            Request::Read { .. } => Self::Read,
            Request::Write { .. } | Request::WriteZeroes { .. } => Self::Write,
            Request::Flush => Self::Flush,
            Request::Discard { .. } => Self::Unmap,
        }
    }

    /// As the counters of QEMU's BlockDeviceStats begin (qapi/block-core.json).
    fn short_name(self) -> &'static str {
        match self {
            Self::Read => "rd",
            Self::Write => "wr",
            Self::Flush => "flush",
            Self::Unmap => "unmap",
        }
    }
}

/// Hears of a request that the host failed. It is called on the disk's I/O thread, as often as
/// the guest tries: so it may only tell others, and not all of it.
pub type OnError = dyn Fn(Operation, BlockError) + Send + Sync;

#[derive(Debug, Default)]
struct Tally {
    done: AtomicU64,
    bytes: AtomicU64,
    time_ns: AtomicU64,
    /// By the host.
    failed: AtomicU64,
    /// What no disk of this kind can do.
    invalid: AtomicU64,
}

#[derive(Debug, Default)]
struct Counters {
    tallies: [Tally; 4],
    /// Behind the last byte that was ever written.
    highest: AtomicU64,
}

impl Counters {
    fn count(&self, flight: &Flight, result: Result<(), BlockError>) {
        let tally = &self.tallies[flight.operation as usize];
        match result {
            Ok(()) => {
                tally.done.fetch_add(1, Relaxed);
                tally.bytes.fetch_add(flight.end - flight.start, Relaxed);
                tally.time_ns.fetch_add(saturated(flight.since.elapsed()), Relaxed);
                if flight.operation == Operation::Write {
                    self.highest.fetch_max(flight.end, Relaxed);
                }
            }
            Err(error) if error.is_of_the_host() => _ = tally.failed.fetch_add(1, Relaxed),
            Err(_) => _ = tally.invalid.fetch_add(1, Relaxed),
        }
    }
}

fn saturated(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub struct Counted {
    inner: Box<dyn BlockBackend>,
    counters: Arc<Counters>,
    on_error: Option<Arc<OnError>>,
}

impl Counted {
    pub fn new(inner: Box<dyn BlockBackend>, on_error: Option<Arc<OnError>>) -> Self {
        Self { inner, counters: Arc::default(), on_error }
    }
}

impl BlockBackend for Counted {
    fn info(&self) -> BlockInfo {
        self.inner.info()
    }

    fn open_queue(&self) -> Result<Box<dyn BlockQueue>, ImageError> {
        let inner = self.inner.open_queue()?;
        let (counters, on_error) = (Arc::clone(&self.counters), self.on_error.clone());
        Ok(Box::new(CountedQueue { inner, counters, on_error, flights: vec![], free: vec![] }))
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

    fn counters(&self) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        for operation in Operation::ALL {
            let tally = &self.counters.tallies[operation as usize];
            let name = operation.short_name();
            let mut add = |key: String, value: &AtomicU64| found.insert(key, value.load(Relaxed));
            add(format!("{name}_operations"), &tally.done);
            add(format!("{name}_total_time_ns"), &tally.time_ns);
            add(format!("failed_{name}_operations"), &tally.failed);
            add(format!("invalid_{name}_operations"), &tally.invalid);
            if operation != Operation::Flush {
                add(format!("{name}_bytes"), &tally.bytes);
            }
        }
        found.insert("wr_highest_offset".to_owned(), self.counters.highest.load(Relaxed));
        found
    }
}

/// A request that the disk has.
struct Flight {
    /// The caller's, of which several may have the same.
    tag: u64,
    operation: Operation,
    start: u64,
    end: u64,
    since: Instant,
}

struct CountedQueue {
    inner: Box<dyn BlockQueue>,
    counters: Arc<Counters>,
    on_error: Option<Arc<OnError>>,
    /// By the tags that the disk has for them.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl BlockQueue for CountedQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        let (start, length) = request.range();
        let operation = Operation::of(&request);
        let end = start.saturating_add(length);
        let flight = Flight { tag, operation, start, end, since: Instant::now() };
        let own = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        self.flights[own] = Some(flight);
        self.inner.submit(own as u64, request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.inner.completions(done);
        for (tag, result) in &mut done[first..] {
            let own = *tag as usize;
            let Some(flight) = self.flights.get_mut(own).and_then(Option::take) else { continue };
            self.free.push(own);
            self.counters.count(&flight, *result);
            *tag = flight.tag;
            if let (Err(error), Some(on_error)) = (*result, &self.on_error)
                && error.is_of_the_host()
            {
                on_error(flight.operation, error);
            }
        }
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn stopped(&self) -> usize {
        self.inner.stopped()
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::image::{ImageOptions, open};
    use crate::testing::Driver;

    #[test]
    fn requests_are_counted_by_kind_and_what_became_of_them() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hear = Arc::clone(&heard);
        let disk = open(image.path(), ImageOptions::default()).unwrap();
        let disk =
            Counted::new(disk, Some(Arc::new(move |what, error| hear.lock().push((what, error)))));
        let mut driver = Driver::new(disk.open_queue().unwrap());
        driver.write(4096, &[(0, 1024)], &[7; 1024]);
        for tag in [3, 3, 9] {
            let data = driver.list(&[(0, 512)]);
            driver.queue.submit(tag, Request::Read { offset: 0, data });
        }
        let tags: Vec<u64> = driver.wait(3).iter().map(|(tag, _)| *tag).collect();
        assert_eq!(tags, [3, 3, 9], "several requests may have one tag");
        assert_eq!(driver.run(Request::Flush), Ok(()));
        assert_eq!(driver.run(Request::Discard { offset: 8192, length: 4096 }), Ok(()));
        assert!(driver.read(1 << 20, &[(0, 512)]).is_err());
        image.as_file().set_len(0).unwrap();
        assert_eq!(driver.read(0, &[(0, 512)]), Err(BlockError::Truncated));

        let counted = disk.counters();
        let expected = [
            ("rd_operations", 3),
            ("rd_bytes", 3 * 512),
            ("invalid_rd_operations", 1),
            ("failed_rd_operations", 1),
            ("wr_operations", 1),
            ("wr_bytes", 1024),
            ("wr_highest_offset", 5120),
            ("flush_operations", 1),
            ("unmap_operations", 1),
            ("unmap_bytes", 4096),
            ("failed_wr_operations", 0),
        ];
        for (name, value) in expected {
            assert_eq!(counted.get(name), Some(&value), "{name}");
        }
        assert!(counted["rd_total_time_ns"] > 0);
        assert_eq!(*heard.lock(), [(Operation::Read, BlockError::Truncated)]);
    }
}
