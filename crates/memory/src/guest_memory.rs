//! RAM regions over one memfd, and the one path by which devices write to it.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::{Arc, OnceLock};

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use crate::{GuestPhys, PAGE_SIZE};

/// Where RAM stops below 4 GiB; above it lie the PCI hole and the APICs.
const LOW_RAM_END: u64 = 0xC000_0000;
/// Where the RAM that does not fit below the hole goes on.
const HIGH_RAM_START: u64 = 0x1_0000_0000;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {0} bytes: the size must be a multiple of 4096 and not zero")]
    BadSize(u64),
    #[error("the host gives no {size} bytes of guest memory: {source}; ask for less with --memory")]
    Allocate { size: u64, source: std::io::Error },
    #[error("{length} bytes at guest physical {address} are not RAM of this machine")]
    OutOfRange { address: GuestPhys, length: u64 },
}

/// Told of every write to guest memory that does not come from a vCPU, so that
/// an engine can drop translations of the bytes.
pub trait WriteObserver: Send + Sync {
    fn written(&self, address: GuestPhys, length: u64);
}

/// One contiguous range of RAM.
pub struct Region {
    pub start: GuestPhys,
    pub len: u64,
    mapping: MmapRegion,
}

impl Region {
    /// The host address of the first byte; valid while the `GuestMemory` lives.
    pub fn host(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// The place of the region in the memfd.
    pub fn file_offset(&self) -> u64 {
        self.mapping.file_offset().map_or(0, FileOffset::start)
    }
}

/// The RAM of one machine.
pub struct GuestMemory {
    regions: Vec<Region>,
    memfd: Arc<File>,
    observer: OnceLock<Box<dyn WriteObserver>>,
}

impl GuestMemory {
    /// Maps `size` bytes of zeroed RAM: from 0 to 3 GiB, the rest from 4 GiB up.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::BadSize(size));
        }
        let failed = |source| MemoryError::Allocate { size, source };
        check_host_has(size).map_err(failed)?;
        // SAFETY: the name is a NUL-terminated string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"tetrarch-ram".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let memfd = Arc::new(unsafe { File::from_raw_fd(fd) });
        memfd.set_len(size).map_err(failed)?;

        let low = size.min(LOW_RAM_END);
        let mut regions = vec![Self::map(&memfd, GuestPhys(0), 0, low).map_err(failed)?];
        if size > low {
            let high = Self::map(&memfd, GuestPhys(HIGH_RAM_START), low, size - low);
            regions.push(high.map_err(failed)?);
        }
        Ok(Self { regions, memfd, observer: OnceLock::new() })
    }

    fn map(memfd: &Arc<File>, start: GuestPhys, offset: u64, len: u64) -> std::io::Result<Region> {
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_file_offset(FileOffset::from_arc(Arc::clone(memfd), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(std::io::Error::other)?;
        // SAFETY: the range is the mapping just made. Failure is harmless: the
        // advice only asks for 2 MiB pages where the host's policy gives them.
        unsafe {
            libc::madvise(mapping.as_ptr().cast(), len as usize, libc::MADV_HUGEPAGE);
        }
        Ok(Region { start, len, mapping })
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub fn memfd(&self) -> &File {
        &self.memfd
    }

    /// Sets who is told of writes; a machine has one engine, so this is done once.
    pub fn set_observer(&self, observer: Box<dyn WriteObserver>) {
        // A second engine over the same memory would be a bug of the assembly.
        if self.observer.set(observer).is_err() {
            debug_assert!(false, "guest memory already has an observer");
        }
    }

    /// The host address of `len` bytes of RAM at `address`, or `None` where any
    /// of them is not RAM.
    #[inline]
    pub fn host(&self, address: GuestPhys, len: u64) -> Option<*mut u8> {
        for region in &self.regions {
            let offset = address.0.wrapping_sub(region.start.0);
            if offset < region.len && len <= region.len - offset {
                return Some(region.host().wrapping_add(offset as usize));
            }
        }
        None
    }

    fn checked(&self, address: GuestPhys, len: usize) -> Result<*mut u8, MemoryError> {
        let length = len as u64;
        self.host(address, length).ok_or(MemoryError::OutOfRange { address, length })
    }

    pub fn read(&self, address: GuestPhys, data: &mut [u8]) -> Result<(), MemoryError> {
        let host = self.checked(address, data.len())?;
        // SAFETY: `checked` gave `data.len()` mapped bytes. The guest may write
        // them at the same time; the bytes read are then any mix, as for a DMA.
        unsafe { std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    /// Writes for a device or loader, and tells the engine.
    pub fn write(&self, address: GuestPhys, data: &[u8]) -> Result<(), MemoryError> {
        let host = self.checked(address, data.len())?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
        if let Some(observer) = self.observer.get() {
            observer.written(address, data.len() as u64);
        }
        Ok(())
    }
}

/// Refuses a size that the host could never back: the memfd itself is sparse,
/// and the guest would otherwise be killed in the middle of its work.
fn check_host_has(size: u64) -> std::io::Result<()> {
    // SAFETY: sysconf has no memory effects.
    let (pages, page) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let total = (pages.max(0) as u64).saturating_mul(page.max(0) as u64);
    if size > total {
        return Err(std::io::Error::other(format!("the host has {} MiB of memory", total >> 20)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn bytes_written_are_read_back() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(GuestPhys(0xFFE), &[1, 2, 3, 4]).unwrap();
        let mut data = [0; 4];
        memory.read(GuestPhys(0xFFE), &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4]);
    }

    #[test]
    fn range_over_the_end_is_refused() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for (address, len) in [((1 << 20) - 2, 4), (1 << 20, 1), (u64::MAX, 2), (u64::MAX - 1, 2)] {
            assert!(memory.write(GuestPhys(address), &vec![0; len]).is_err());
        }
    }

    #[test]
    fn ram_over_3_gib_goes_on_at_4_gib() {
        let memory = GuestMemory::new(LOW_RAM_END + PAGE_SIZE).unwrap();
        assert!(memory.host(GuestPhys(LOW_RAM_END - 1), 1).is_some());
        assert!(memory.host(GuestPhys(LOW_RAM_END), 1).is_none());
        assert!(memory.host(GuestPhys(HIGH_RAM_START), PAGE_SIZE).is_some());
        assert!(memory.host(GuestPhys(HIGH_RAM_START), PAGE_SIZE + 1).is_none());
    }

    #[test]
    fn bad_sizes_are_refused() {
        for size in [0, 1, 4095, 1 << 60] {
            assert!(GuestMemory::new(size).is_err(), "{size}");
        }
    }

    #[test]
    fn observer_hears_of_each_write() {
        struct Log(Arc<Mutex<Vec<(u64, u64)>>>);
        impl WriteObserver for Log {
            fn written(&self, address: GuestPhys, length: u64) {
                self.0.lock().unwrap().push((address.0, length));
            }
        }
        let memory = GuestMemory::new(1 << 20).unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        memory.set_observer(Box::new(Log(Arc::clone(&log))));
        memory.write(GuestPhys(0x1000), &[0; 3]).unwrap();
        assert_eq!(*log.lock().unwrap(), [(0x1000, 3)]);
    }
}
