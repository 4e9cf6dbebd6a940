//! Doorbells: where a driver says how far it is in its queues (3.1.24, 3.1.25).
//!
//! What is written is the message, unlike virtio's notification: so each write comes here, on
//! the vCPU's thread, which keeps the value and signals the I/O thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError};
use tetrarch_devices::Drive;
use tetrarch_io::Event;

/// Bytes of a doorbell: CAP.DSTRD is 0.
const STRIDE: u64 = 4;

/// A queue's number, in a set of bits.
fn bit(queue: usize) -> u64 {
    1 << (queue & 63)
}

/// One pair of doorbells, and what belongs to the completion queue's.
#[derive(Default)]
struct Pair {
    /// Of the submission queue, as the driver wrote it,
    tail: AtomicU32,
    /// of the completion queue.
    head: AtomicU32,
    /// How far completions were written.
    posted: AtomicU32,
    /// Whether the completion queue is there and interrupts.
    interrupts: AtomicBool,
}

/// The doorbells of a controller's queue pairs, and its interrupt line, which is high while
/// a completion queue holds what the driver has not taken (7.5.1.1).
pub struct Doorbells {
    pairs: Vec<Pair>,
    event: Event,
    /// Submission queues whose doorbell was written.
    rung: AtomicU64,
    /// Completion queues that are full: the device waits for their doorbell,
    waits: AtomicU64,
    /// and has heard it.
    freed: AtomicU64,
    /// A register was written that is no doorbell.
    stray: AtomicBool,
    /// INTMS and INTMC: the line is masked by bit 0.
    mask: AtomicU32,
    line: Mutex<Drive>,
}

impl Doorbells {
    /// For at most 64 pairs, the admin queues among them.
    pub fn new(pairs: usize, line: Drive) -> std::io::Result<Self> {
        Ok(Self {
            pairs: (0..pairs.min(64)).map(|_| Pair::default()).collect(),
            event: Event::new()?,
            rung: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            stray: AtomicBool::new(false),
            mask: AtomicU32::new(0),
            line: Mutex::new(line),
        })
    }

    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }

    pub fn event(&self) -> &Event {
        &self.event
    }

    pub fn tail(&self, queue: usize) -> u32 {
        self.pairs.get(queue).map_or(0, |pair| pair.tail.load(SeqCst))
    }

    pub fn head(&self, queue: usize) -> u32 {
        self.pairs.get(queue).map_or(0, |pair| pair.head.load(SeqCst))
    }

    /// Submission queues that were rung since this was asked.
    pub fn take_rung(&self) -> Bits {
        Bits(self.rung.swap(0, SeqCst))
    }

    /// Full completion queues of which entries were taken since.
    pub fn take_freed(&self) -> Bits {
        Bits(self.freed.swap(0, SeqCst))
    }

    pub fn take_stray(&self) -> bool {
        self.stray.swap(false, SeqCst)
    }

    /// Has a submission queue served once more, after others on the thread.
    pub fn ring(&self, queue: usize) {
        self.rung.fetch_or(bit(queue), SeqCst);
        self.event.signal();
    }

    /// The completion queue is full. Its doorbell may have been written just before: who
    /// calls this looks at [`Doorbells::head`] again.
    pub fn wait_for(&self, queue: usize) {
        self.waits.fetch_or(bit(queue), SeqCst);
    }

    /// A submission queue begins, at a tail.
    pub fn set_tail(&self, queue: usize, tail: u32) {
        if let Some(pair) = self.pairs.get(queue) {
            pair.tail.store(tail, SeqCst);
        }
    }

    /// A completion queue begins, or ends, at (head, tail).
    pub fn set_completions(&self, queue: usize, (head, tail): (u32, u32), interrupts: bool) {
        if let Some(pair) = self.pairs.get(queue) {
            pair.head.store(head, SeqCst);
            pair.posted.store(tail, SeqCst);
            pair.interrupts.store(interrupts, SeqCst);
        }
        self.drive();
    }

    /// Completions were written up to `tail`.
    pub fn post(&self, queue: usize, tail: u32) {
        if let Some(pair) = self.pairs.get(queue) {
            pair.posted.store(tail, SeqCst);
        }
    }

    pub fn set_mask(&self, mask: u32) {
        self.mask.store(mask, SeqCst);
        self.drive();
    }

    /// As after a reset of the controller.
    pub fn reset(&self) {
        for queue in 0..self.pairs.len() {
            self.set_tail(queue, 0);
            self.set_completions(queue, (0, 0), false);
        }
        self.rung.store(0, SeqCst);
        self.waits.store(0, SeqCst);
        self.freed.store(0, SeqCst);
        self.stray.store(false, SeqCst);
    }

    /// Lets the line be as the queues say.
    pub fn drive(&self) {
        let line = self.line.lock();
        let unread = |pair: &Pair| {
            pair.interrupts.load(SeqCst) && pair.head.load(SeqCst) != pair.posted.load(SeqCst)
        };
        line(self.mask.load(SeqCst) & 1 == 0 && self.pairs.iter().any(unread));
    }
}

/// The numbers of the bits that are set.
pub struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let lowest = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (lowest < 64).then_some(lowest)
    }
}

/// The page of registers from 0x1000 on.
pub struct DoorbellRegisters(pub Arc<Doorbells>);

impl Device for DoorbellRegisters {
    /// A driver should not read them (3.1.24).
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        let Doorbells { pairs, event, .. } = &*self.0;
        if size != STRIDE as u8 || !offset.is_multiple_of(STRIDE) {
            return Ok(());
        }
        // The high half is reserved.
        let (index, value) = (offset / STRIDE, value as u32 & 0xFFFF);
        let queue = (index / 2) as usize;
        let Some(pair) = pairs.get(queue) else {
            self.0.stray.store(true, SeqCst);
            event.signal();
            return Ok(());
        };
        if index.is_multiple_of(2) {
            pair.tail.store(value, SeqCst);
            self.0.ring(queue);
        } else {
            pair.head.store(value, SeqCst);
            self.0.drive();
            if self.0.waits.fetch_and(!bit(queue), SeqCst) & bit(queue) != 0 {
                self.0.freed.fetch_or(bit(queue), SeqCst);
                event.signal();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (Arc<Doorbells>, DoorbellRegisters, Arc<AtomicBool>) {
        let level = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&level);
        let line: Drive = Box::new(move |level| seen.store(level, SeqCst));
        let doorbells = Arc::new(Doorbells::new(3, line).unwrap());
        (Arc::clone(&doorbells), DoorbellRegisters(doorbells), level)
    }

    #[test]
    fn line_is_high_while_there_is_something_to_take() {
        let (doorbells, registers, level) = made();
        doorbells.set_completions(1, (0, 0), true);
        doorbells.post(1, 2);
        doorbells.drive();
        assert!(level.load(SeqCst));
        registers.write(12, 4, 1).unwrap();
        assert!(level.load(SeqCst), "one of two");
        doorbells.set_mask(1);
        assert!(!level.load(SeqCst));
        doorbells.set_mask(0);
        assert!(level.load(SeqCst));
        registers.write(12, 4, 2).unwrap();
        assert!(!level.load(SeqCst));
    }

    #[test]
    fn doorbells_say_who_rang_and_others_are_strays() {
        let (doorbells, registers, _) = made();
        for (offset, value) in [(16, 5), (0, 0xABCD_0007)] {
            registers.write(offset, 4, value).unwrap();
        }
        assert!(doorbells.event().take());
        assert_eq!(doorbells.take_rung().collect::<Vec<_>>(), [0, 2]);
        assert_eq!((doorbells.tail(0), doorbells.tail(2)), (7, 5));
        // Of a completion queue only where it is waited for.
        registers.write(4, 4, 1).unwrap();
        assert!(!doorbells.event().take());
        doorbells.wait_for(0);
        registers.write(4, 4, 2).unwrap();
        assert!(doorbells.event().take());
        assert_eq!(doorbells.take_freed().collect::<Vec<_>>(), [0]);
        for (offset, size) in [(24, 4), (0xFFC, 4), (2, 4), (0, 2), (0, 8)] {
            registers.write(offset, size, 1).unwrap();
            assert_eq!(doorbells.take_stray(), size == 4 && offset % 4 == 0, "{offset} {size}");
        }
        assert_eq!(doorbells.take_rung().count(), 0);
    }
}
