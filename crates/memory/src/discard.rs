//! Pages that the guest has given up: back to the host at once.

use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::image::within;
use crate::lazy::Range;
use crate::{GuestMemory, GuestPhys, PAGE_SIZE, Region};

/// Pieces that a guest may leave of what is mapped from a file: each is a mapping of the
/// process, of which it has 65530 in all.
const PIECES_MAX: usize = 16384;

impl GuestMemory {
    /// Gives the whole pages of a range back to the host: they read as zeroes from now on, and
    /// cost the host nothing until something is written. Observers hear of that as of a write.
    /// What of the range is not RAM is left out; gives how many bytes were RAM.
    ///
    /// Host addresses stay as they are, in this process and in others: an access that comes
    /// meanwhile finds the old page or a new one.
    pub fn discard(&self, address: GuestPhys, length: u64) -> io::Result<u64> {
        let end = address.0.saturating_add(length) & !(PAGE_SIZE - 1);
        let Some(start) = address.0.checked_next_multiple_of(PAGE_SIZE) else { return Ok(0) };
        let mut discarded = 0;
        for region in self.space().memory().iter() {
            let base = region.start_addr().0;
            let (from, to) = (start.max(base), end.min(base.saturating_add(region.len())));
            let Some(file) = region.file_offset().filter(|_| from < to) else { continue };
            let (offset, bytes) = (from - base, to - from);
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file.file(), hole, file.start() + offset, bytes)?;
            self.let_go(&(from..to))?;
            region.bitmap().mark_dirty(offset as usize, bytes as usize);
            discarded += bytes;
        }
        Ok(discarded)
    }

    /// What of a range is mapped from a file of saved RAM is the memfd's again, and zero.
    fn let_go(&self, range: &Range) -> io::Result<()> {
        let mut lazy = self.lazy.lock();
        if lazy.within(range).is_empty() {
            return Ok(());
        }
        if lazy.len() >= PIECES_MAX {
            // A guest that cuts its memory up gets zeros, but the host nothing back.
            for part in lazy.within(range) {
                for page in part.step_by(PAGE_SIZE as usize) {
                    let written = self.write(GuestPhys(page), &[0; PAGE_SIZE as usize]);
                    written.map_err(io::Error::other)?;
                }
            }
            return Ok(());
        }
        for region in self.ram() {
            let (start, end) = within(&region, range);
            let Some(memfd) = region.file().filter(|_| start < end) else { continue };
            for part in lazy.take(&(start..end)) {
                map_memfd(&region, memfd, &part)?;
            }
        }
        Ok(())
    }
}

/// Maps a part of a region from its memfd, whatever was there.
pub(crate) fn map_memfd(region: &Region, memfd: &FileOffset, part: &Range) -> io::Result<()> {
    let offset = part.start - region.start.0;
    let host = region.host().wrapping_add(offset as usize);
    // SAFETY: the range is part of the region's mapping, which lives as long as the region and is
    // unmapped as a whole; what is mapped there is guest memory again.
    unsafe {
        rustix::mm::mmap(
            host.cast(),
            (part.end - part.start) as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
            memfd.file(),
            memfd.start() + offset,
        )
    }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;
    use crate::{HIGH_RAM_START, MemoryObserver};

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);

    impl MemoryObserver for Log {
        fn written(&self, address: GuestPhys, length: u64) {
            self.0.lock().push((address.0, length));
        }
    }

    /// KiB of the host's that the memory takes.
    fn kib(memory: &GuestMemory) -> u64 {
        let regions = memory.regions();
        regions[0].file().unwrap().file().metadata().unwrap().blocks() / 2
    }

    #[test]
    fn whole_pages_go_to_the_host_and_observers_hear() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(GuestPhys(0), &[7; 1 << 20]).unwrap();
        let before = kib(&memory);
        let log = Arc::new(Log::default());
        memory.add_observer(Arc::clone(&log) as _);
        assert_eq!(memory.discard(GuestPhys(0x1001), 0xFFFF).unwrap(), 0xF000);
        assert_eq!(*log.0.lock(), [(0x2000, 0xF000)]);
        assert!(kib(&memory) < before);
        let mut data = vec![1; 0x1_1000];
        memory.read(GuestPhys(0x1000), &mut data).unwrap();
        assert!(data[..0x1000].iter().all(|&byte| byte == 7));
        assert!(data[0x1000..0x1_0000].iter().all(|&byte| byte == 0));
        assert!(data[0x1_0000..].iter().all(|&byte| byte == 7));
        // What lies there is RAM as before.
        memory.write(GuestPhys(0x5000), &[9]).unwrap();
        memory.read(GuestPhys(0x5000), &mut data[..1]).unwrap();
        assert_eq!(data[0], 9);
    }

    #[test]
    fn what_is_not_ram_is_left_out() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(GuestPhys((1 << 20) - 1), &[7]).unwrap();
        memory.add_region(GuestPhys(HIGH_RAM_START), 1 << 12).unwrap();
        let none = [(1 << 20, 1 << 12), (u64::MAX, u64::MAX), (0x1001, 0x1FFE), (0, 0), (0, 0xFFF)];
        for (address, length) in none {
            assert_eq!(memory.discard(GuestPhys(address), length).unwrap(), 0, "{address:#x}");
        }
        // Over all of both regions and what is between them.
        assert_eq!(memory.discard(GuestPhys(0xF_F000), u64::MAX).unwrap(), 1 << 13);
        let mut last = [1];
        memory.read(GuestPhys((1 << 20) - 1), &mut last).unwrap();
        assert_eq!(last, [0]);
    }
}
