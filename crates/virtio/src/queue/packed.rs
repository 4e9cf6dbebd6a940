//! The packed virtqueue (virtio 1.2, 2.8).

use std::sync::atomic::{Ordering, fence};

use tetrarch_memory::{Snapshot, Window};

use super::chain::{Assembly, Chain, DESCRIPTOR, Descriptor, INDIRECT, NEXT, Used, WRITE};
use super::{MAX_SIZE, QueueConfig, QueueError, QueuePosition, check_alignment, reached};

// Descriptor flags (2.8.1).
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const FLAGS: usize = 14;
const ID: usize = 12;

// Event suppression (2.8.10): a position, and what it is for.
const EVENT_POSITION: usize = 0;
const EVENT_FLAGS: usize = 2;
const EVENT_BYTES: usize = 4;
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_POSITION: u16 = 2;
const WRAP: u16 = 1 << 15;

/// A place in the ring, and the wrap counter of whoever is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self { index: 0, wrap: true };

    /// As the event suppression structures have it.
    fn encoded(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    fn decoded(word: u16) -> Self {
        Self { index: word & !WRAP, wrap: word & WRAP != 0 }
    }

    /// `slots`, at most the ring's size, further back.
    fn before(self, slots: u16, size: u16) -> Self {
        match self.index.checked_sub(slots) {
            Some(index) => Self { index, wrap: self.wrap },
            // No sum of two 16-bit numbers: the index is less than `slots`.
            None => Self { index: size - (slots - self.index), wrap: !self.wrap },
        }
    }

    /// `slots`, at most the ring's size, further on.
    fn after(self, slots: u16, size: u16) -> Self {
        // The sum has a bit more than an index.
        let index = u32::from(self.index) + u32::from(slots);
        match index.checked_sub(u32::from(size)) {
            Some(index) => Self { index: index as u16, wrap: !self.wrap },
            None => Self { index: index as u16, wrap: self.wrap },
        }
    }
}

pub struct PackedRing {
    memory: Snapshot,
    size: u16,
    event_index: bool,
    indirect: bool,
    descriptors: Window,
    driver: Window,
    device: Window,
    next_available: Place,
    next_used: Place,
    /// `next_used.index` when the driver was last asked whether it wants an interrupt;
    /// below 0, modulo 2^16, where the ring was wrapped since.
    told_used: u16,
}

impl PackedRing {
    pub fn new(
        memory: &Snapshot,
        config: &QueueConfig,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if size == 0 || size > MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        check_alignment(config.descriptors, 16)?;
        check_alignment(config.driver, 4)?;
        check_alignment(config.device, 4)?;
        let place = |word: Option<u16>| {
            let place = word.map_or(Place::START, Place::decoded);
            if place.index < size {
                Ok(place)
            } else {
                Err(QueueError::NoDescriptor(place.index.into()))
            }
        };
        let next_used = place(position.map(|position| position.used))?;
        Ok(Self {
            memory: memory.clone(),
            size,
            event_index: config.event_index,
            indirect: config.indirect,
            descriptors: Window::new(memory, config.descriptors, DESCRIPTOR * usize::from(size))?,
            driver: Window::new(memory, config.driver, EVENT_BYTES)?,
            device: Window::new(memory, config.device, EVENT_BYTES)?,
            next_available: place(position.map(|position| position.available))?,
            next_used,
            told_used: next_used.index,
        })
    }

    pub fn position(&self) -> QueuePosition {
        QueuePosition { available: self.next_available.encoded(), used: self.next_used.encoded() }
    }

    /// Whether the driver has made the descriptor at `next_available` available (2.8.1).
    fn is_available(&self, order: Ordering) -> bool {
        let Place { index, wrap } = self.next_available;
        let flags = self.descriptors.load_u16(DESCRIPTOR * usize::from(index) + FLAGS, order);
        (flags & AVAILABLE != 0) == wrap && (flags & USED != 0) != wrap
    }

    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        // Acquire: the rest of the chain was written before these flags (2.8.19).
        if !self.is_available(Ordering::Acquire) {
            return Ok(None);
        }
        let mut assembly = Assembly::new(&self.memory, self.size);
        for slots in 1..=self.size {
            let at = self.next_available.after(slots - 1, self.size);
            let descriptor = Descriptor::read(&self.descriptors, u32::from(at.index));
            let [id, flags] = descriptor.last;
            if flags & INDIRECT != 0 {
                // A whole chain by itself (2.8.7).
                if slots != 1 {
                    return Err(QueueError::Indirect);
                }
                self.add_table(&mut assembly, &descriptor, flags)?;
            } else {
                assembly.add(&descriptor, flags)?;
            }
            if flags & NEXT == 0 {
                self.next_available = self.next_available.after(slots, self.size);
                return Ok(Some(assembly.finish(id, slots)));
            }
        }
        Err(QueueError::TooLong)
    }

    pub fn put_back(&mut self, used: Used) {
        self.next_available = self.next_available.before(used.slots, self.size);
    }

    /// A table is a row: of its flags only WRITE means something (2.8.7).
    fn add_table(
        &self,
        assembly: &mut Assembly,
        at: &Descriptor,
        flags: u16,
    ) -> Result<(), QueueError> {
        let (table, count) = Assembly::table(&self.memory, at, flags, self.indirect)?;
        for index in 0..count {
            let descriptor = Descriptor::read(&table, index);
            assembly.add(&descriptor, descriptor.last[1] & WRITE)?;
        }
        Ok(())
    }

    pub fn push_all(&mut self, answers: impl Iterator<Item = (Used, u32)>) {
        let mut first = None;
        for (used, written) in answers {
            let Place { index, wrap } = self.next_used;
            let at = DESCRIPTOR * usize::from(index);
            self.descriptors.write(at + 8, written.to_le_bytes());
            self.descriptors.store_u16(at + ID, used.id, Ordering::Relaxed);
            let mut flags = if wrap { AVAILABLE | USED } else { 0 };
            if written > 0 {
                flags |= WRITE;
            }
            if first.is_some() {
                self.descriptors.store_u16(at + FLAGS, flags, Ordering::Relaxed);
            } else {
                first = Some((at, flags));
            }
            self.next_used = self.next_used.after(used.slots, self.size);
            if self.next_used.wrap != wrap {
                self.told_used = self.told_used.wrapping_sub(self.size);
            }
        }
        // The driver sees the others when it sees the first. Release: the rest of them, and what
        // the device wrote, are there before these flags are.
        if let Some((at, flags)) = first {
            self.descriptors.store_u16(at + FLAGS, flags, Ordering::Release);
        }
    }

    pub fn wants_interrupt(&mut self) -> bool {
        // The flags are out before the driver's wish is read: whoever of the two comes second
        // sees what the other wrote.
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_used.index, self.told_used);
        self.told_used = new;
        if new == old {
            return false;
        }
        match self.driver.load_u16(EVENT_FLAGS, Ordering::Acquire) {
            DISABLE => false,
            AT_POSITION if self.event_index => {
                let place = Place::decoded(self.driver.load_u16(EVENT_POSITION, Ordering::Relaxed));
                let ahead = place.wrap != self.next_used.wrap;
                let event = if ahead { place.index.wrapping_sub(self.size) } else { place.index };
                reached(event, new, old)
            }
            _ => true,
        }
    }

    pub fn ask_notification(&mut self) -> bool {
        let flags = if self.event_index {
            let place = self.next_available.encoded();
            self.device.store_u16(EVENT_POSITION, place, Ordering::Relaxed);
            AT_POSITION
        } else {
            ENABLE
        };
        // The position is there before what makes it count (2.8.13.2).
        self.device.store_u16(EVENT_FLAGS, flags, Ordering::Release);
        fence(Ordering::SeqCst);
        self.is_available(Ordering::Relaxed)
    }

    pub fn spare_notifications(&mut self) {
        self.device.store_u16(EVENT_FLAGS, DISABLE, Ordering::Relaxed);
    }
}
