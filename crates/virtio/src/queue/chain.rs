//! A chain of buffers, put together from descriptors.

use tetrarch_memory::{GuestPhys, ScatterList, Snapshot, Window};

use super::QueueError;

/// Descriptor flags (2.7.5, 2.8.8).
pub const NEXT: u16 = 1 << 0;
pub const WRITE: u16 = 1 << 1;
pub const INDIRECT: u16 = 1 << 2;

pub const DESCRIPTOR: usize = 16;

/// One request of a driver.
#[derive(Debug)]
pub struct Chain {
    /// What the driver gives.
    pub readable: ScatterList,
    /// Where the answer goes.
    pub writable: ScatterList,
    pub used: Used,
}

#[cfg(test)]
impl Chain {
    /// A chain of no queue.
    pub fn of(readable: ScatterList, writable: ScatterList) -> Self {
        Self { readable, writable, used: Used { id: 0, slots: 1 } }
    }
}

/// What gives a chain back to its queue: once.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain, or a packed ring's buffer ID.
    pub(super) id: u16,
    /// The slots of a packed ring that it took; of a split one's it counts as one.
    pub(super) slots: u16,
}

/// A descriptor in a ring's or an indirect table; the last two fields are (flags, next)
/// in a split ring, (id, flags) in a packed one.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: GuestPhys,
    pub length: u32,
    pub last: [u16; 2],
}

impl Descriptor {
    pub fn read(table: &Window, index: u32) -> Self {
        let raw: [u8; DESCRIPTOR] = table.read(index as usize * DESCRIPTOR);
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let (mut address, mut length) = ([0; 8], [0; 4]);
        address.copy_from_slice(&raw[..8]);
        length.copy_from_slice(&raw[8..12]);
        Self {
            address: GuestPhys(u64::from_le_bytes(address)),
            length: u32::from_le_bytes(length),
            last: [word(12), word(14)],
        }
    }
}

/// A chain that is being put together.
pub struct Assembly {
    readable: ScatterList,
    writable: ScatterList,
    /// Descriptors that it may still have.
    left: u32,
}

impl Assembly {
    /// No chain has more descriptors than its queue (2.7.5.3.1), except that an indirect
    /// table may have as many as one request of ours takes.
    pub fn new(memory: &Snapshot, size: u16) -> Self {
        Self {
            readable: ScatterList::new(memory.clone()),
            writable: ScatterList::new(memory.clone()),
            left: u32::from(size).max(ScatterList::MAX_PIECES as u32),
        }
    }

    pub fn add(&mut self, descriptor: &Descriptor, flags: u16) -> Result<(), QueueError> {
        self.left = self.left.checked_sub(1).ok_or(QueueError::TooLong)?;
        let list = if flags & WRITE != 0 {
            &mut self.writable
        } else if self.writable.iovecs().is_empty() {
            &mut self.readable
        } else {
            return Err(QueueError::Order);
        };
        list.push(descriptor.address, u64::from(descriptor.length))?;
        if self.readable.len() + self.writable.len() > u64::from(u32::MAX) {
            return Err(QueueError::TooLarge);
        }
        Ok(())
    }

    /// The table of an indirect descriptor, and how many descriptors are in it.
    pub fn table(
        memory: &Snapshot,
        descriptor: &Descriptor,
        flags: u16,
        allowed: bool,
    ) -> Result<(Window, u32), QueueError> {
        if !allowed || flags & NEXT != 0 {
            return Err(QueueError::Indirect);
        }
        let bytes = descriptor.length;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR as u32) {
            return Err(QueueError::IndirectSize(bytes));
        }
        let window = Window::new(memory, descriptor.address, bytes as usize)?;
        Ok((window, bytes / DESCRIPTOR as u32))
    }

    pub fn finish(self, id: u16, slots: u16) -> Chain {
        Chain { readable: self.readable, writable: self.writable, used: Used { id, slots } }
    }
}
