//! A window on guest RAM: what a device reads and writes again and again.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{ByteValued, Bytes, VolatileMemory, VolatileSlice};

use crate::scatter::Snapshot;
use crate::{GuestPhys, MemoryError};

/// A range of one region of RAM that was checked once: a ring of a queue, say.
///
/// Offsets count from its start. Every access is checked against its length, and those
/// beyond it do nothing and read as 0: whoever makes a window gives it the length that
/// it needs.
pub struct Window {
    memory: Snapshot,
    start: GuestPhys,
    host: *mut u8,
    length: usize,
}

// SAFETY: `host` is in a mapping that `memory` keeps, which belongs to no thread.
unsafe impl Send for Window {}
// SAFETY: as above; all accesses are volatile or atomic.
unsafe impl Sync for Window {}

impl Window {
    pub fn new(memory: &Snapshot, start: GuestPhys, length: usize) -> Result<Self, MemoryError> {
        let outside = || MemoryError::OutOfRange { address: start, length: length as u64 };
        let mut found = None;
        memory.pieces(start, length as u64, |_, host, len| {
            found.get_or_insert((host, len));
        })?;
        // Of two regions that touch it would be two ranges of the host.
        let (host, _) = found.filter(|&(_, len)| len == length).ok_or_else(outside)?;
        Ok(Self { memory: memory.clone(), start, host, length })
    }

    pub fn start(&self) -> GuestPhys {
        self.start
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `pieces` gave these bytes as a part of a mapping of `memory`, which lives
        // as long as the borrow of self.
        unsafe { VolatileSlice::new(self.host, self.length) }
    }

    fn u16_at(&self, offset: usize) -> Option<&AtomicU16> {
        let end = offset.checked_add(2)?;
        let address = self.host.wrapping_add(offset).cast::<u16>();
        if end > self.length || !address.is_aligned() {
            return None;
        }
        // SAFETY: both bytes are in the mapping, which lives as long as the borrow of self;
        // the address is aligned; vCPUs access it as atomically.
        Some(unsafe { AtomicU16::from_ptr(address) })
    }

    fn u32_at(&self, offset: usize) -> Option<&AtomicU32> {
        let end = offset.checked_add(4)?;
        let address = self.host.wrapping_add(offset).cast::<u32>();
        if end > self.length || !address.is_aligned() {
            return None;
        }
        // SAFETY: as in `u16_at`, of four bytes.
        Some(unsafe { AtomicU32::from_ptr(address) })
    }

    fn u64_at(&self, offset: usize) -> Option<&AtomicU64> {
        let end = offset.checked_add(8)?;
        let address = self.host.wrapping_add(offset).cast::<u64>();
        if end > self.length || !address.is_aligned() {
            return None;
        }
        // SAFETY: as in `u16_at`, of eight bytes.
        Some(unsafe { AtomicU64::from_ptr(address) })
    }

    /// A little-endian number, at a multiple of 8.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        self.u64_at(offset).map_or(0, |cell| u64::from_le(cell.load(Ordering::SeqCst)))
    }

    /// Sets the bits of a number that the guest changes by LOCK instructions, and gives what
    /// it was.
    #[inline]
    pub fn set_bits_u64(&self, offset: usize, bits: u64) -> u64 {
        let Some(cell) = self.u64_at(offset) else { return 0 };
        let old = u64::from_le(cell.fetch_or(bits.to_le(), Ordering::SeqCst));
        self.memory.written(self.start.offset(offset as u64), 8);
        old
    }

    /// The same, clears them.
    #[inline]
    pub fn clear_bits_u64(&self, offset: usize, bits: u64) -> u64 {
        let Some(cell) = self.u64_at(offset) else { return 0 };
        let old = u64::from_le(cell.fetch_and((!bits).to_le(), Ordering::SeqCst));
        self.memory.written(self.start.offset(offset as u64), 8);
        old
    }

    /// As `set_bits_u64`, of a number at an even address.
    #[inline]
    pub fn set_bits_u16(&self, offset: usize, bits: u16) -> u16 {
        let Some(cell) = self.u16_at(offset) else { return 0 };
        let old = u16::from_le(cell.fetch_or(bits.to_le(), Ordering::SeqCst));
        self.memory.written(self.start.offset(offset as u64), 2);
        old
    }

    /// A little-endian number, at a multiple of 4.
    #[inline]
    pub fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.u32_at(offset).map_or(0, |cell| u32::from_le(cell.load(order)))
    }

    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        if let Some(cell) = self.u32_at(offset) {
            cell.store(value.to_le(), order);
            self.memory.written(self.start.offset(offset as u64), 4);
        }
    }

    /// A little-endian number, which is at an even address.
    #[inline]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        self.u16_at(offset).map_or(0, |cell| u16::from_le(cell.load(order)))
    }

    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        if let Some(cell) = self.u16_at(offset) {
            cell.store(value.to_le(), order);
            self.memory.written(self.start.offset(offset as u64), 2);
        }
    }

    /// A structure, not at once: the guest may change a part meanwhile.
    #[inline]
    pub fn read<T: ByteValued + Default>(&self, offset: usize) -> T {
        self.slice().read_obj(offset).unwrap_or_default()
    }

    #[inline]
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) {
        let slice = self.slice();
        if slice.get_slice(offset, size_of::<T>()).is_ok() && slice.write_obj(value, offset).is_ok()
        {
            self.memory.written(self.start.offset(offset as u64), size_of::<T>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;

    #[test]
    fn accesses_stay_inside() {
        let memory = GuestMemory::new(1 << 16).unwrap();
        memory.add_region(GuestPhys(1 << 16), 1 << 12).unwrap();
        let window = Window::new(&memory.snapshot(), GuestPhys(0x1000), 7).unwrap();
        window.store_u16(4, 0x1234, Ordering::Release);
        window.store_u16(6, 0xFFFF, Ordering::Release);
        window.store_u16(3, 0xFFFF, Ordering::Release);
        window.store_u16(usize::MAX, 0xFFFF, Ordering::Release);
        assert_eq!(window.load_u16(4, Ordering::Acquire), 0x1234);
        assert_eq!(window.load_u16(6, Ordering::Acquire), 0);
        assert_eq!(window.load_u32(0, Ordering::Acquire), 0);
        window.store_u32(0, 0x0102_0304, Ordering::Release);
        for offset in [2, 4, usize::MAX] {
            window.store_u32(offset, 0xFFFF_FFFF, Ordering::Release);
            assert_eq!(window.load_u32(offset, Ordering::Acquire), 0);
        }
        assert_eq!(window.load_u32(0, Ordering::Acquire), 0x0102_0304);
        window.store_u32(0, 0, Ordering::Release);
        window.write(4, 0xAAAA_AAAA_u32);
        assert_eq!(window.read::<u32>(4), 0);
        assert_eq!(window.read::<u32>(3), 0x0012_3400);
        let mut after = [0; 2];
        memory.read(GuestPhys(0x1006), &mut after).unwrap();
        assert_eq!(after, [0, 0]);
        for (start, length) in [(0xFFFF, 2), (0x1_1000, 1), (u64::MAX, 2), (0, usize::MAX)] {
            assert!(Window::new(&memory.snapshot(), GuestPhys(start), length).is_err());
        }
    }
}
