//! From a guest physical to a host address: what an engine asks at each step of
//! a page walk, while regions may come and go.

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

use crate::GuestPhys;

/// Regions of one machine: RAM in two parts, firmware, video memory, and as
/// many memory modules as QEMU's PC takes slots for.
pub const MAX_REGIONS: usize = 256;

#[derive(Default)]
struct Slot {
    start: AtomicU64,
    len: AtomicU64,
    host: AtomicPtr<u8>,
}

/// A sequence lock: a reader writes nothing, and looks again where a change
/// came between. One thread changes the map at a time; `GuestMemory` sees to it.
pub(crate) struct HostMap {
    /// Odd while a change is on its way.
    sequence: AtomicU64,
    count: AtomicUsize,
    slots: Box<[Slot]>,
}

impl HostMap {
    pub fn new() -> Self {
        let slots = (0..MAX_REGIONS).map(|_| Slot::default()).collect();
        Self { sequence: AtomicU64::new(0), count: AtomicUsize::new(0), slots }
    }

    #[inline]
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    #[inline]
    pub fn find(&self, address: GuestPhys, len: u64) -> Option<*mut u8> {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let found = self.search(address, len);
            // The loads of the search come before the second look.
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return found;
            }
            std::hint::spin_loop();
        }
    }

    #[inline]
    fn search(&self, address: GuestPhys, len: u64) -> Option<*mut u8> {
        for slot in self.slots.iter().take(self.count.load(Ordering::Relaxed)) {
            let offset = address.0.wrapping_sub(slot.start.load(Ordering::Relaxed));
            let size = slot.len.load(Ordering::Relaxed);
            if offset < size && len <= size - offset {
                let host = slot.host.load(Ordering::Relaxed);
                return Some(host.wrapping_add(offset as usize));
            }
        }
        None
    }

    /// Replaces the whole map; at most [`MAX_REGIONS`] of (start, length, host).
    pub fn set(&self, regions: impl Iterator<Item = (GuestPhys, u64, *mut u8)>) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        // The odd number is seen before anything that follows.
        fence(Ordering::Release);
        let mut count = 0;
        for (slot, (start, len, host)) in self.slots.iter().zip(regions) {
            slot.start.store(start.0, Ordering::Relaxed);
            slot.len.store(len, Ordering::Relaxed);
            slot.host.store(host, Ordering::Relaxed);
            count += 1;
        }
        self.count.store(count, Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }
}
