//! A data path on a thread of its own: what serves the queues is lent one chain at a time,
//! and may take as long as it wants.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::device::{Control, DataPath, Device};
use crate::queue::{Chain, QueueError};
use crate::queues::Queues;

/// Which queues are to be looked at.
#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    queues: Vec<bool>,
    closed: bool,
}

/// The device's side: rings, and counts what is lent.
pub struct Lent {
    bell: Arc<Bell>,
    /// Of the driver's life: what was lent before a reset is not given back.
    epoch: u64,
    lent: usize,
}

impl DataPath for Lent {
    fn serve(&mut self, _queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let mut state = self.bell.state.lock();
        if let Some(queue) = state.queues.get_mut(index) {
            *queue = true;
            self.bell.rung.notify_one();
        }
        Ok(())
    }

    fn idle(&self) -> bool {
        self.lent == 0
    }

    /// Who has a chain asks before each write.
    fn settled(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        self.epoch += 1;
        self.lent = 0;
    }
}

impl Lent {
    /// The data path of a device with so many queues.
    pub fn new(queues: usize) -> Self {
        let bell = Arc::new(Bell::default());
        bell.state.lock().queues = vec![false; queues];
        Self { bell, epoch: 0, lent: 0 }
    }
}

/// The side of who serves the queues, on any thread.
///
/// Locks: the device's, then the bell's.
pub struct Lender {
    device: Arc<Device<Lent>>,
    bell: Arc<Bell>,
}

impl Lender {
    pub fn new(device: Arc<Device<Lent>>) -> Self {
        let bell = device.with_path(|path, _| Arc::clone(&path.bell));
        Self { device, bell }
    }

    /// Waits until there may be chains in a queue, and says which; None when it is closed.
    pub fn wait(&self) -> Option<usize> {
        let mut state = self.bell.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(index) = state.queues.iter().position(|&rung| rung) {
                state.queues[index] = false;
                return Some(index);
            }
            self.bell.rung.wait(&mut state);
        }
    }

    /// Ends the wait for ever.
    pub fn close(&self) {
        self.bell.state.lock().closed = true;
        self.bell.rung.notify_all();
    }

    /// The next chain of a queue. None where there is none, and while the machine is held.
    pub fn take(&self, index: usize) -> Option<LentChain> {
        let (chain, epoch) = self.device.apply(|path, queues| {
            let Some(chain) = queues.take(index)? else { return Ok(None) };
            path.lent += 1;
            Ok(Some((chain, path.epoch)))
        })??;
        Some(LentChain {
            device: Arc::clone(&self.device),
            index,
            epoch,
            chain: Some(chain),
            read: 0,
            written: 0,
        })
    }
}

/// A chain in the hands of who serves the queue; given back when it is dropped.
///
/// Its bytes are read and written one after the other, as those of a stream.
pub struct LentChain {
    device: Arc<Device<Lent>>,
    index: usize,
    epoch: u64,
    /// None: it was given back.
    chain: Option<Chain>,
    read: u64,
    written: u64,
}

impl LentChain {
    /// Bytes that are left to read.
    pub fn readable(&self) -> u64 {
        self.chain.as_ref().map_or(0, |chain| chain.readable.len() - self.read)
    }

    /// Bytes that are left to write.
    pub fn writable(&self) -> u64 {
        self.chain.as_ref().map_or(0, |chain| chain.writable.len() - self.written)
    }

    /// The next bytes; gives how many there were.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let Some(chain) = &self.chain else { return 0 };
        let count = chain.readable.read_at(self.read, data);
        self.read += count as u64;
        count
    }

    /// Writes the next bytes; gives how many found room: none where the driver has reset the
    /// device meanwhile, or taken the bus from it: memory is its own again.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let Self { device, index, epoch, chain, written, .. } = self;
        let Some(chain) = chain else { return 0 };
        // Under the device's lock, so that a reset which has returned is not followed by a write.
        let count = device.with_path(|path, queues| {
            let ours = path.epoch == *epoch && queues.accessible() && queues.is_enabled(*index);
            if ours { chain.writable.write_at(*written, data) } else { 0 }
        });
        *written += count as u64;
        count
    }

    /// Gives it back as it is; once.
    pub fn give_back(&mut self) {
        let Some(chain) = self.chain.take() else { return };
        let written = u32::try_from(self.written).unwrap_or(u32::MAX);
        let quiet = self.device.with_path(|path, queues| {
            if path.epoch != self.epoch {
                return false;
            }
            path.lent = path.lent.saturating_sub(1);
            queues.push(self.index, chain.used, written);
            queues.interrupt(self.index);
            queues.quiet
        });
        // The I/O thread waits for this, to come to rest; also where the queue has been disabled
        // meanwhile.
        if quiet && let Some(doorbell) = self.device.doorbells().get(self.index) {
            doorbell.signal();
        }
    }
}

impl Drop for LentChain {
    fn drop(&mut self) {
        self.give_back();
    }
}
