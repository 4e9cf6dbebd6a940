//! Memory balloon device (5.5): pages that the guest does without, given back to the host.
//!
//! A page of the balloon is RAM as before: it reads as zeroes, and a guest that uses it all the
//! same, or names a page that it uses, loses nothing but what it had there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tetrarch_io::Attachment;
use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SHIFT, PAGE_SIZE};

use crate::device::DataPath;
use crate::queue::{Chain, QueueError};
use crate::queues::Queues;

/// Feature bit of the statistics queue (5.5.3).
pub const STATS: u64 = 1 << 1;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

/// Queues at most: beside those, of free page hints and of free page reports.
pub const QUEUES: usize = 5;

/// Of one chain no more page numbers are looked at, so that other devices' turn comes: what is
/// behind them stays with the guest. Linux sends 256.
const MOST_PAGES: usize = 1 << 10;
/// Statistics are ten kinds; a driver may know some more (5.5.6.4).
const MOST_STATISTICS: usize = 32;
/// Tag and value.
const STATISTIC: usize = 10;

/// Where the driver's last answer to [`Balloon::ask`] is found.
#[derive(Default)]
pub struct Statistics {
    answer: Mutex<Answer>,
    came: Condvar,
}

#[derive(Default)]
struct Answer {
    count: u64,
    values: Vec<(u16, u64)>,
}

impl Statistics {
    /// How many answers have come.
    pub fn count(&self) -> u64 {
        self.answer.lock().count
    }

    /// Waits until there are more than `count` answers; the last one, as tags and values.
    pub fn wait(&self, count: u64, timeout: Duration) -> Option<Vec<(u16, u64)>> {
        let deadline = Instant::now().checked_add(timeout)?;
        let mut answer = self.answer.lock();
        while answer.count <= count {
            if self.came.wait_until(&mut answer, deadline).timed_out() && answer.count <= count {
                return None;
            }
        }
        Some(answer.values.clone())
    }

    fn publish(&self, values: Vec<(u16, u64)>) {
        let mut answer = self.answer.lock();
        answer.count += 1;
        answer.values = values;
        self.came.notify_all();
    }
}

/// What becomes of the buffer of statistics: the driver fills it and leaves it with the device,
/// which gives it back when it wants new ones (5.5.6.3).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Asking {
    #[default]
    No,
    /// As soon as there is a buffer to give back.
    Wanted,
    /// The next buffer is the answer.
    Asked,
}

/// The data path. Nothing of it is ever in flight: the buffer of statistics stays in its ring.
pub struct Balloon {
    memory: Arc<GuestMemory>,
    statistics: Arc<Statistics>,
    /// The statistics queue was negotiated.
    with_statistics: bool,
    asking: Asking,
}

impl Balloon {
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let statistics = Arc::default();
        Self { memory, statistics, with_statistics: false, asking: Asking::No }
    }

    pub fn statistics(&self) -> Arc<Statistics> {
        Arc::clone(&self.statistics)
    }

    /// Asks the driver for its statistics.
    pub fn ask(&mut self, queues: &mut Queues) -> Result<(), QueueError> {
        if self.asking == Asking::No {
            self.asking = Asking::Wanted;
        }
        if self.with_statistics { self.serve_statistics(queues) } else { Ok(()) }
    }

    fn serve_statistics(&mut self, queues: &mut Queues) -> Result<(), QueueError> {
        while let Some(chain) = queues.take(STATISTICS)? {
            match self.asking {
                Asking::Wanted => {
                    self.asking = Asking::Asked;
                    queues.push(STATISTICS, chain.used, 0);
                    queues.interrupt(STATISTICS);
                    continue;
                }
                Asking::Asked => {
                    self.asking = Asking::No;
                    self.statistics.publish(read_statistics(&chain));
                }
                Asking::No => {}
            }
            queues.put_back(STATISTICS, chain.used);
            break;
        }
        Ok(())
    }

    /// Takes the pages that a chain names by their numbers (5.5.6.1).
    fn inflate(&self, chain: &Chain) {
        let mut bytes = [0; 4 * MOST_PAGES];
        let got = chain.readable.read_at(0, &mut bytes);
        let numbers = bytes[..got].as_chunks::<4>().0;
        let mut pages: Vec<u32> =
            numbers.iter().map(|&number| u32::from_le_bytes(number)).collect();
        // The driver allocates them one by one, mostly from one end of a free block.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|&page, &next| page + 1 == next) {
            self.discard(GuestPhys(u64::from(run[0]) << PAGE_SHIFT), run.len() as u64 * PAGE_SIZE);
        }
    }

    /// What the host does not take back costs it memory, and the guest nothing.
    fn discard(&self, address: GuestPhys, length: u64) {
        if let Err(error) = self.memory.discard(address, length) {
            log::debug!("balloon: the host keeps {length:#x} bytes at {address}: {error}");
        }
    }
}

impl DataPath for Balloon {
    fn start(&mut self, features: u64, _io: &Attachment) -> std::io::Result<()> {
        self.with_statistics = features & STATS != 0;
        Ok(())
    }

    /// A driver without the statistics queue may number the later ones without a gap, as Linux
    /// does, or with one, as 5.5.2 does: of all those that are left it sends free pages only.
    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        match index {
            INFLATE => queues.serve(index, |chain| {
                self.inflate(&chain);
                Some((chain.used, 0))
            }),
            // A page that the guest takes back comes when it is touched.
            DEFLATE => queues.serve(index, |chain| Some((chain.used, 0))),
            STATISTICS if self.with_statistics => self.serve_statistics(queues),
            // Free page reports (5.5.6.7): the buffers themselves are the pages.
            _ => queues.serve(index, |chain| {
                chain.writable.ranges().for_each(|(start, length)| self.discard(start, length));
                Some((chain.used, 0))
            }),
        }
    }

    fn reset(&mut self) {
        self.with_statistics = false;
        if self.asking == Asking::Asked {
            self.asking = Asking::Wanted;
        }
    }
}

fn read_statistics(chain: &Chain) -> Vec<(u16, u64)> {
    let mut bytes = [0; MOST_STATISTICS * STATISTIC];
    let got = chain.readable.read_at(0, &mut bytes);
    let entries = bytes[..got].as_chunks::<STATISTIC>().0;
    entries
        .iter()
        .map(|entry| {
            let mut value = [0; 8];
            value.copy_from_slice(&entry[2..]);
            (u16::from_le_bytes([entry[0], entry[1]]), u64::from_le_bytes(value))
        })
        .collect()
}
