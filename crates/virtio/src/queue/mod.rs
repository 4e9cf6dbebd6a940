//! Virtqueues (virtio 1.2, 2.6 to 2.8), as a device sees them.
//!
//! The two forms of a ring do the same: [`Queue::pop`] takes the next chain of buffers
//! that the driver made available, [`Queue::push`] gives it back as used. Whatever a
//! driver writes into its rings, an operation ends after at most as many steps as the
//! queue has descriptors; what breaks the rules is a [`QueueError`], after which the
//! queue is of no use until the device is reset.

mod chain;
mod packed;
mod split;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError};

pub use chain::{Chain, Used};
use packed::PackedRing;
use split::SplitRing;

/// The most descriptors that a queue has (2.6).
pub const MAX_SIZE: u16 = 1 << 15;

/// What a driver did against the rules.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("a queue of {0} descriptors, which must be a power of 2 up to 32768")]
    Size(u16),
    #[error("a ring at {address} that is not aligned to {alignment} bytes")]
    Alignment { address: GuestPhys, alignment: u64 },
    #[error("descriptor {0}, which the queue does not have")]
    NoDescriptor(u32),
    #[error("{0} buffers made available at once, more than the queue has descriptors")]
    TooManyAvailable(u16),
    #[error("buffers made available again that the device has not given back")]
    InFlight,
    #[error("a chain of more descriptors than the queue has")]
    TooLong,
    #[error("a chain of 4 GiB or more")]
    TooLarge,
    #[error("a buffer for the device to read behind one for it to write")]
    Order,
    #[error("an indirect table inside another, in a chain that goes on, or not negotiated")]
    Indirect,
    #[error("an indirect table of {0} bytes, which is no number of descriptors")]
    IndirectSize(u32),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How a driver has set a queue up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    pub size: u16,
    /// Descriptor table or ring.
    pub descriptors: GuestPhys,
    /// Driver area: available ring, or driver event suppression.
    pub driver: GuestPhys,
    /// Device area: used ring, or device event suppression.
    pub device: GuestPhys,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX was.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC was.
    pub indirect: bool,
}

/// Where a device is in a queue: what survives a save. Beside a split ring's free-running
/// indices, those of a packed ring have their wrap counters in bit 15, as in 2.8.10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    pub available: u16,
    pub used: u16,
}

enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// One virtqueue. All of it belongs to the thread that serves it.
pub struct Queue {
    memory: Arc<GuestMemory>,
    /// Of the regions that the ring was found in.
    generation: u64,
    config: QueueConfig,
    ring: Ring,
    /// Descriptors of the ring whose chains were popped and not given back: a driver that makes
    /// the same ones available again would have the device remember any number of chains.
    in_flight: u32,
}

impl Queue {
    /// A queue as it is after a reset, or at a position that was saved.
    pub fn new(
        memory: Arc<GuestMemory>,
        config: QueueConfig,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let generation = memory.generation();
        let snapshot = memory.snapshot();
        let ring = if config.packed {
            Ring::Packed(PackedRing::new(&snapshot, &config, position)?)
        } else {
            Ring::Split(SplitRing::new(&snapshot, &config, position)?)
        };
        Ok(Self { memory, generation, config, ring, in_flight: 0 })
    }

    pub fn size(&self) -> u16 {
        self.config.size
    }

    pub fn position(&self) -> QueuePosition {
        match &self.ring {
            Ring::Split(ring) => ring.position(),
            Ring::Packed(ring) => ring.position(),
        }
    }

    /// The next chain that the driver has made available.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if self.memory.generation() != self.generation {
            self.find_again()?;
        }
        let chain = match &mut self.ring {
            Ring::Split(ring) => ring.pop(),
            Ring::Packed(ring) => ring.pop(),
        }?;
        if let Some(Chain { used, .. }) = &chain {
            self.in_flight += u32::from(used.slots);
            if self.in_flight > u32::from(self.config.size) {
                return Err(QueueError::InFlight);
            }
        }
        Ok(chain)
    }

    /// Puts back the chain that was popped last: the next pop gives it again, as it is then.
    /// Of several, the last comes first.
    pub fn put_back(&mut self, used: Used) {
        self.in_flight = self.in_flight.saturating_sub(used.slots.into());
        match &mut self.ring {
            Ring::Split(ring) => ring.put_back(),
            Ring::Packed(ring) => ring.put_back(used),
        }
    }

    /// RAM came or went: the ring may be in another place now, or in none.
    fn find_again(&mut self) -> Result<(), QueueError> {
        let found = Self::new(Arc::clone(&self.memory), self.config, Some(self.position()))?;
        *self = Self { in_flight: self.in_flight, ..found };
        Ok(())
    }

    /// Gives a chain back, of which the device has written the first `written` bytes.
    #[inline]
    pub fn push(&mut self, used: Used, written: u32) {
        self.push_all(std::iter::once((used, written)));
    }

    /// Gives chains back of which the driver sees all or none.
    #[inline]
    pub fn push_all(&mut self, answers: impl Iterator<Item = (Used, u32)>) {
        let in_flight = &mut self.in_flight;
        let answers = answers.inspect(|(used, _)| {
            *in_flight = in_flight.saturating_sub(used.slots.into());
        });
        match &mut self.ring {
            Ring::Split(ring) => ring.push_all(answers),
            Ring::Packed(ring) => ring.push_all(answers),
        }
    }

    /// Whether the driver wants an interrupt for what was pushed since this was asked last.
    #[inline]
    pub fn wants_interrupt(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.wants_interrupt(),
            Ring::Packed(ring) => ring.wants_interrupt(),
        }
    }

    /// Asks the driver for a notification of the next chain. True where there is one
    /// already, which it may not notify of.
    #[inline]
    pub fn ask_notification(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.ask_notification(),
            Ring::Packed(ring) => ring.ask_notification(),
        }
    }

    /// Tells the driver that no notifications are needed: the device is looking.
    #[inline]
    pub fn spare_notifications(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.spare_notifications(),
            Ring::Packed(ring) => ring.spare_notifications(),
        }
    }
}

fn check_alignment(address: GuestPhys, alignment: u64) -> Result<(), QueueError> {
    if address.0.is_multiple_of(alignment) {
        Ok(())
    } else {
        Err(QueueError::Alignment { address, alignment })
    }
}

/// Whether an event at `event` lies in what happened from `old` to `new` (2.7.10).
fn reached(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
