//! A split virtqueue (virtio 1.2, 2.7) as its driver sees it: that of a back end, whose driver is
//! the front end.

use std::sync::atomic::{Ordering, fence};

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, ScatterList, Window};

use crate::queue::Chain;

/// Descriptors: as many as any chain of ours has, and as back ends take (libvhost-user's
/// VIRTQUEUE_MAX_SIZE).
pub const SIZE: u16 = 1024;
const _: () = assert!(SIZE as usize >= ScatterList::MAX_PIECES);

/// Where the parts are, each on pages of its own, and how much it is in all.
pub const AVAILABLE: u64 = 0x4000;
pub const USED: u64 = 0x5000;
pub const BYTES: u64 = 0x8000;

/// Offsets in the rings, and the flag by which a back end needs no kick (2.7.8).
const INDEX: usize = 2;
const RING: usize = 4;
const NO_NOTIFY: u16 = 1;

/// Descriptor flags (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What a back end did against the rules; goes on behind "the back end".
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RingError {
    #[error("gave back {given} chains, of {had} that it had")]
    TooMany { given: u16, had: u16 },
    #[error("gave back chain {0}, which it did not have")]
    NotGiven(u32),
}

/// What is decided by is kept here: of what is in memory, the back end can write all.
pub struct DriverRing {
    window: Window,
    free: Vec<u16>,
    /// The descriptors of each chain that the back end has, by its head.
    taken: Vec<Vec<u16>>,
    given: u16,
    /// Free-running indices of the available and the used ring.
    available: u16,
    used: u16,
}

impl DriverRing {
    /// In `BYTES` of memory at an address of the back end's own.
    pub fn new(memory: &GuestMemory, at: u64) -> Result<Self, MemoryError> {
        let window = Window::new(&memory.snapshot(), GuestPhys(at), BYTES as usize)?;
        let taken = vec![Vec::new(); SIZE.into()];
        let free = Vec::with_capacity(SIZE.into());
        let mut ring = Self { window, free, taken, given: 0, available: 0, used: 0 };
        ring.reset();
        Ok(ring)
    }

    /// As if no chain had ever been in it.
    pub fn reset(&mut self) {
        self.free.clear();
        self.free.extend((0..SIZE).rev());
        self.taken.iter_mut().for_each(Vec::clear);
        (self.given, self.available, self.used) = (0, 0, 0);
        for part in [AVAILABLE, USED] {
            self.window.write(part as usize, 0_u32); // flags and index
        }
    }

    /// Puts a chain into the table and the ring, to be published; its head. None: no room.
    pub fn add(&mut self, chain: &Chain) -> Option<u16> {
        let readable = chain.readable.ranges().map(|range| (range, 0));
        let writable = chain.writable.ranges().map(|range| (range, WRITE));
        let count = chain.readable.iovecs().len() + chain.writable.iovecs().len();
        let first = self.free.len().checked_sub(count).filter(|_| count > 0)?;
        let places = self.free.split_off(first);
        for (index, ((address, length), flags)) in readable.chain(writable).enumerate() {
            let next = places.get(index + 1);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&address.0.to_le_bytes());
            // No chain is as long as 4 GiB.
            raw[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&next.copied().unwrap_or(0).to_le_bytes());
            self.window.write(16 * usize::from(places[index]), raw);
        }
        let head = places[0];
        self.taken[usize::from(head)] = places;
        let slot = AVAILABLE as usize + RING + 2 * usize::from(self.available % SIZE);
        self.window.store_u16(slot, head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        self.given += 1;
        Some(head)
    }

    /// Shows the back end what was added; whether it wants a kick for that.
    pub fn publish(&mut self) -> bool {
        self.window.store_u16(AVAILABLE as usize + INDEX, self.available, Ordering::Release);
        // The index is there before the flag is looked at (2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.window.load_u16(USED as usize, Ordering::Relaxed) & NO_NOTIFY == 0
    }

    /// The next chain that comes back: its head, and how much the back end says that it wrote.
    pub fn take(&mut self) -> Result<Option<(u16, u32)>, RingError> {
        let index = self.window.load_u16(USED as usize + INDEX, Ordering::Acquire);
        let given = index.wrapping_sub(self.used);
        if given == 0 {
            return Ok(None);
        }
        if given > self.given {
            return Err(RingError::TooMany { given, had: self.given });
        }
        let slot = USED as usize + RING + 8 * usize::from(self.used % SIZE);
        let raw: u64 = self.window.read(slot);
        let raw = u64::from_le(raw);
        let (id, written) = (raw as u32, (raw >> 32) as u32);
        let places = self.taken.get_mut(id as usize).map(std::mem::take).unwrap_or_default();
        if places.is_empty() {
            return Err(RingError::NotGiven(id));
        }
        self.free.extend(places);
        self.used = self.used.wrapping_add(1);
        self.given -= 1;
        Ok(Some((id as u16, written)))
    }
}
