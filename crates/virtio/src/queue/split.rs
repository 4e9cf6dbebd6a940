//! The split virtqueue (virtio 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use tetrarch_memory::{Snapshot, Window};

use super::chain::{Assembly, Chain, DESCRIPTOR, Descriptor, INDIRECT, NEXT, Used};
use super::{MAX_SIZE, QueueConfig, QueueError, QueuePosition, check_alignment, reached};

// Available ring (2.7.6): flags, idx, ring, used_event.
const NO_INTERRUPT: u16 = 1;
// Used ring (2.7.8): flags, idx, ring of (id, len), avail_event.
const NO_NOTIFY: u16 = 1;
const INDEX: usize = 2;
const RING: usize = 4;
const USED_ELEMENT: usize = 8;

pub struct SplitRing {
    memory: Snapshot,
    size: u16,
    event_index: bool,
    indirect: bool,
    descriptors: Window,
    available: Window,
    used: Window,
    /// The next entry of the available ring.
    next_available: u16,
    /// Our idx of the used ring, and what it was when the driver was last asked whether it
    /// wants an interrupt.
    next_used: u16,
    told_used: u16,
}

impl SplitRing {
    pub fn new(
        memory: &Snapshot,
        config: &QueueConfig,
        position: Option<QueuePosition>,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        check_alignment(config.descriptors, 16)?;
        check_alignment(config.driver, 2)?;
        check_alignment(config.device, 4)?;
        let entries = usize::from(size);
        let event = if config.event_index { 2 } else { 0 };
        let position = position.unwrap_or(QueuePosition { available: 0, used: 0 });
        Ok(Self {
            memory: memory.clone(),
            size,
            event_index: config.event_index,
            indirect: config.indirect,
            descriptors: Window::new(memory, config.descriptors, DESCRIPTOR * entries)?,
            available: Window::new(memory, config.driver, RING + 2 * entries + event)?,
            used: Window::new(memory, config.device, RING + USED_ELEMENT * entries + event)?,
            next_available: position.available,
            next_used: position.used,
            told_used: position.used,
        })
    }

    pub fn position(&self) -> QueuePosition {
        QueuePosition { available: self.next_available, used: self.next_used }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        // Acquire: the entries behind the index are read after it (2.7.13.3).
        let index = self.available.load_u16(INDEX, Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(QueueError::TooManyAvailable(waiting));
        }
        let entry = RING + 2 * self.slot(self.next_available);
        let head = self.available.load_u16(entry, Ordering::Relaxed);
        let chain = self.assemble(head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    pub fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn assemble(&self, head: u16) -> Result<Chain, QueueError> {
        let mut assembly = Assembly::new(&self.memory, self.size);
        let mut index = head;
        // Of the ring's own a chain has at most as many as there are.
        for _ in 0..self.size {
            if index >= self.size {
                return Err(QueueError::NoDescriptor(u32::from(index)));
            }
            let descriptor = Descriptor::read(&self.descriptors, u32::from(index));
            let [flags, next] = descriptor.last;
            if flags & INDIRECT != 0 {
                self.add_table(&mut assembly, &descriptor)?;
                return Ok(assembly.finish(head, 1));
            }
            assembly.add(&descriptor, flags)?;
            if flags & NEXT == 0 {
                return Ok(assembly.finish(head, 1));
            }
            index = next;
        }
        Err(QueueError::TooLong)
    }

    /// Inside a table `next` counts its descriptors (2.7.5.3).
    fn add_table(&self, assembly: &mut Assembly, at: &Descriptor) -> Result<(), QueueError> {
        let (table, count) = Assembly::table(&self.memory, at, at.last[0], self.indirect)?;
        let mut index = 0;
        loop {
            if index >= count {
                return Err(QueueError::NoDescriptor(index));
            }
            let descriptor = Descriptor::read(&table, index);
            let [flags, next] = descriptor.last;
            if flags & INDIRECT != 0 {
                return Err(QueueError::Indirect);
            }
            // Counts what it adds: a loop ends here.
            assembly.add(&descriptor, flags)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(next);
        }
    }

    pub fn push_all(&mut self, answers: impl Iterator<Item = (Used, u32)>) {
        for (used, written) in answers {
            let mut element = [0; USED_ELEMENT];
            element[..4].copy_from_slice(&u32::from(used.id).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            self.used.write(RING + USED_ELEMENT * self.slot(self.next_used), element);
            self.next_used = self.next_used.wrapping_add(1);
        }
        // Release: the elements, and what the device wrote, are there before the index is.
        self.used.store_u16(INDEX, self.next_used, Ordering::Release);
    }

    pub fn wants_interrupt(&mut self) -> bool {
        // The index is out before the driver's wish is read (2.7.7.1): whoever of the two
        // comes second sees what the other wrote.
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_used, self.told_used);
        self.told_used = new;
        if !self.event_index {
            return new != old && self.available.load_u16(0, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        let event = self.available.load_u16(RING + 2 * usize::from(self.size), Ordering::Relaxed);
        reached(event, new, old)
    }

    pub fn ask_notification(&mut self) -> bool {
        if self.event_index {
            let event = RING + USED_ELEMENT * usize::from(self.size);
            self.used.store_u16(event, self.next_available, Ordering::Relaxed);
        } else {
            self.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // As above, with the sides exchanged.
        fence(Ordering::SeqCst);
        self.available.load_u16(INDEX, Ordering::Relaxed) != self.next_available
    }

    pub fn spare_notifications(&mut self) {
        // With event indices an old one does it.
        if !self.event_index {
            self.used.store_u16(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }
}
