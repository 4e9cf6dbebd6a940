//! Scatter lists: what a device's request names in guest RAM.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use crate::{GuestMemory, GuestPhys, MemoryError, Regions};

/// The regions of one moment. Who has it can go on using their memory, whatever the
/// machine does to its own.
#[derive(Clone)]
pub struct Snapshot(pub(crate) Arc<Regions>);

impl Snapshot {
    /// All of a range of RAM in pieces, one for each region that it touches: host
    /// address and length.
    pub(crate) fn pieces(
        &self,
        address: GuestPhys,
        length: u64,
        mut each: impl FnMut(GuestPhys, *mut u8, usize),
    ) -> Result<(), MemoryError> {
        let outside = || MemoryError::OutOfRange { address, length };
        let count = usize::try_from(length).map_err(|_| outside())?;
        address.0.checked_add(length).ok_or_else(outside)?;
        let mut at = address;
        for slice in GuestMemoryBackend::get_slices(&*self.0, address.into(), count) {
            let slice = slice.map_err(|_| outside())?;
            each(at, slice.ptr_guard_mut().as_ptr(), slice.len());
            at = at.offset(slice.len() as u64);
        }
        Ok(())
    }

    /// Tells the observers that bytes were written.
    pub(crate) fn written(&self, address: GuestPhys, length: usize) {
        if let Some((region, offset)) = self.0.to_region_addr(address.into()) {
            region.bitmap().mark_dirty(offset.0 as usize, length);
        }
    }
}

impl GuestMemory {
    /// The regions of this moment, for who keeps addresses in them.
    pub fn snapshot(&self) -> Snapshot {
        let space = self.space();
        Snapshot(vm_memory::GuestAddressSpace::memory(&space).into_inner())
    }
}

/// Most requests are of no more pieces.
const INLINE: usize = 4;

/// Ranges of guest RAM, in an order that counts: the bytes of one request.
///
/// Each range was checked, and its memory stays mapped as long as the list is there.
/// The guest can change the bytes at any moment: what is decided by them is to be
/// read once.
#[derive(Clone)]
pub struct ScatterList {
    memory: Snapshot,
    /// Where each of `iovecs` begins for the guest.
    starts: SmallVec<[GuestPhys; INLINE]>,
    iovecs: SmallVec<[libc::iovec; INLINE]>,
    length: u64,
}

// SAFETY: the addresses in `iovecs` are of the mappings that `memory` keeps, which
// belong to no thread.
unsafe impl Send for ScatterList {}
// SAFETY: as above; what is at the addresses is accessed as memory that others change.
unsafe impl Sync for ScatterList {}

impl ScatterList {
    /// The most pieces that a list has: what one system call takes (IOV_MAX).
    pub const MAX_PIECES: usize = 1024;

    /// An empty list.
    pub fn new(memory: Snapshot) -> Self {
        Self { memory, starts: SmallVec::new(), iovecs: SmallVec::new(), length: 0 }
    }

    /// A list of ranges, as (address, bytes).
    pub fn of(
        memory: Snapshot,
        ranges: impl IntoIterator<Item = (GuestPhys, u64)>,
    ) -> Result<Self, MemoryError> {
        let mut list = Self::new(memory);
        for (address, length) in ranges {
            list.push(address, length)?;
        }
        Ok(list)
    }

    /// Adds a range, which may be empty; on an error the list is as it was.
    pub fn push(&mut self, address: GuestPhys, length: u64) -> Result<(), MemoryError> {
        let outside = MemoryError::OutOfRange { address, length };
        let Some(total) = self.length.checked_add(length) else { return Err(outside) };
        let before = self.iovecs.len();
        let Self { memory, starts, iovecs, .. } = self;
        let added = memory.pieces(address, length, |start, host, len| {
            starts.push(start);
            iovecs.push(libc::iovec { iov_base: host.cast(), iov_len: len });
        });
        let added = added.and_then(|()| {
            if iovecs.len() > Self::MAX_PIECES { Err(MemoryError::TooManyPieces) } else { Ok(()) }
        });
        if added.is_err() {
            starts.truncate(before);
            iovecs.truncate(before);
            return added;
        }
        self.length = total;
        Ok(())
    }

    /// All bytes of the list.
    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// For system calls that read or write guest memory; after one that wrote,
    /// [`ScatterList::written`] is due. The addresses hold as long as the list, or a part
    /// of it, is there.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The ranges as (address, bytes).
    pub fn ranges(&self) -> impl Iterator<Item = (GuestPhys, u64)> {
        self.starts.iter().zip(&self.iovecs).map(|(&start, iovec)| (start, iovec.iov_len as u64))
    }

    /// Tells the observers that the first `length` bytes were written.
    pub fn written(&self, length: u64) {
        self.written_at(0, length);
    }

    /// The same for bytes from `offset` on; what lies beyond the list is left out.
    pub fn written_at(&self, offset: u64, length: u64) {
        self.each(offset, length, |index, skipped, len| {
            self.memory.written(self.starts[index].offset(skipped as u64), len);
        });
    }

    /// Copies bytes from `offset` on out of guest memory; gives how many there were.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        self.each(offset, data.len() as u64, |index, skipped, len| {
            self.slice(index, skipped, len).copy_to(&mut data[done..done + len]);
            done += len;
        });
        done
    }

    /// Copies bytes into guest memory from `offset` on; gives how many found room.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        self.each(offset, data.len() as u64, |index, skipped, len| {
            self.slice(index, skipped, len).copy_from(&data[done..done + len]);
            self.memory.written(self.starts[index].offset(skipped as u64), len);
            done += len;
        });
        done
    }

    /// Zeroes `length` bytes from `offset` on, as far as there are so many.
    pub fn zero(&self, offset: u64, length: u64) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let end = offset.saturating_add(length).min(self.length);
        let mut at = offset;
        while at < end {
            at += self.write_at(at, &ZEROES[..(end - at).min(4096) as usize]) as u64;
        }
    }

    /// The first `at` bytes, and the rest.
    #[must_use]
    pub fn split_at(&self, at: u64) -> (Self, Self) {
        let at = at.min(self.length);
        (self.part(0, at), self.part(at, self.length - at))
    }

    /// `length` bytes from `offset` on, as far as there are so many.
    #[must_use]
    pub fn part(&self, offset: u64, length: u64) -> Self {
        let mut part = Self::new(self.memory.clone());
        self.each(offset, length, |index, skipped, len| {
            let base = self.iovecs[index].iov_base.cast::<u8>().wrapping_add(skipped);
            part.starts.push(self.starts[index].offset(skipped as u64));
            part.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            part.length += len as u64;
        });
        part
    }

    /// Calls `each` with (index, bytes of it that are skipped, bytes) for the pieces that
    /// a range of the list touches.
    fn each(&self, offset: u64, length: u64, mut each: impl FnMut(usize, usize, usize)) {
        let (mut skip, mut left) = (offset, length);
        for (index, iovec) in self.iovecs.iter().enumerate() {
            if left == 0 {
                return;
            }
            let len = iovec.iov_len as u64;
            if skip >= len {
                skip -= len;
                continue;
            }
            let here = (len - skip).min(left);
            each(index, skip as usize, here as usize);
            left -= here;
            skip = 0;
        }
    }

    /// Bytes of one piece; what `each` gives is inside it.
    fn slice(&self, index: usize, skipped: usize, len: usize) -> VolatileSlice<'_> {
        let iovec = &self.iovecs[index];
        let len = len.min(iovec.iov_len.saturating_sub(skipped));
        let base = iovec.iov_base.cast::<u8>().wrapping_add(skipped.min(iovec.iov_len));
        // SAFETY: `pieces` gave the iovec as a part of a mapping of `memory`, which lives as
        // long as the borrow of self; the bytes are inside of it by the two lines above.
        unsafe { VolatileSlice::new(base, len) }
    }
}

impl fmt::Debug for ScatterList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;
    use crate::MemoryObserver;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);

    impl MemoryObserver for Log {
        fn written(&self, address: GuestPhys, length: u64) {
            self.0.lock().push((address.0, length));
        }
    }

    fn list(memory: &GuestMemory, ranges: &[(u64, u64)]) -> Result<ScatterList, MemoryError> {
        let ranges = ranges.iter().map(|&(address, length)| (GuestPhys(address), length));
        ScatterList::of(memory.snapshot(), ranges)
    }

    #[test]
    fn bytes_go_through_pieces_in_their_order_and_observers_hear() {
        let memory = GuestMemory::new(1 << 16).unwrap();
        let log = Arc::new(Log::default());
        memory.add_observer(Arc::clone(&log) as _);
        let list = list(&memory, &[(0x2000, 3), (0x1000, 0), (0x1000, 5)]).unwrap();
        assert_eq!(list.len(), 8);
        assert_eq!(list.write_at(1, b"abcdefghij"), 7);
        assert_eq!(*log.0.lock(), [(0x2001, 2), (0x1000, 5)]);
        let mut data = [0; 5];
        memory.read(GuestPhys(0x1000), &mut data).unwrap();
        assert_eq!(&data, b"cdefg");
        let mut data = [b'-'; 10];
        assert_eq!(list.read_at(2, &mut data), 6);
        assert_eq!(&data, b"bcdefg----");
        log.0.lock().clear();
        list.written(4);
        assert_eq!(*log.0.lock(), [(0x2000, 3), (0x1000, 1)]);
        list.zero(2, 2);
        assert_eq!(list.read_at(0, &mut data), 8);
        assert_eq!(&data[..8], b"\0a\0\0defg");
    }

    #[test]
    fn parts_are_of_the_same_bytes() {
        let memory = GuestMemory::new(1 << 16).unwrap();
        let list = list(&memory, &[(0x1000, 4), (0x3000, 4)]).unwrap();
        list.write_at(0, b"01234567");
        let (head, tail) = list.split_at(3);
        let text = |list: &ScatterList| {
            let mut data = vec![0; list.len() as usize];
            list.read_at(0, &mut data);
            String::from_utf8(data).unwrap()
        };
        assert_eq!((text(&head), text(&tail)), ("012".into(), "34567".into()));
        assert_eq!(text(&list.part(2, 4)), "2345");
        assert_eq!(text(&list.part(7, u64::MAX)), "7");
        assert!(list.part(9, 1).is_empty());
        let (all, none) = list.split_at(u64::MAX);
        assert_eq!((all.len(), none.len()), (8, 0));
    }

    #[test]
    fn what_is_not_ram_is_refused_and_changes_nothing() {
        let memory = GuestMemory::new(1 << 16).unwrap();
        memory.add_region(GuestPhys(1 << 16), 1 << 12).unwrap();
        let mut list = list(&memory, &[(0x1000, 16)]).unwrap();
        for (address, length) in
            [(0x1_1000, 1), (0, 0x1_1001), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, u64::MAX)]
        {
            assert!(list.push(GuestPhys(address), length).is_err(), "{address:#x} {length:#x}");
        }
        assert_eq!((list.len(), list.iovecs().len()), (16, 1));
        // Two regions that touch are one range for the guest.
        list.push(GuestPhys(0xFFF0), 0x20).unwrap();
        assert_eq!((list.len(), list.iovecs().len()), (48, 3));
        for _ in 3..ScatterList::MAX_PIECES {
            list.push(GuestPhys(0), 1).unwrap();
        }
        assert!(matches!(list.push(GuestPhys(0), 1), Err(MemoryError::TooManyPieces)));
        assert_eq!(list.iovecs().len(), ScatterList::MAX_PIECES);
    }

    #[test]
    fn memory_that_was_removed_stays_for_a_list_in_use() {
        let memory = GuestMemory::new(1 << 16).unwrap();
        let region = memory.add_region(GuestPhys(1 << 20), 1 << 12).unwrap();
        let list = list(&memory, &[(1 << 20, 4)]).unwrap();
        drop(memory.remove_region(region.start).unwrap());
        drop(region);
        assert_eq!(list.write_at(0, b"late"), 4);
        assert!(ScatterList::of(memory.snapshot(), [(GuestPhys(1 << 20), 4)]).is_err());
    }
}
