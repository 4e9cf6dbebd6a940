//! The RAM of one machine: regions that come and go, each in a memfd.

use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Resource, getrlimit};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::device_memory::DeviceMemory;
use crate::host_map::{HostMap, MAX_REGIONS};
use crate::lazy::Lazy;
use crate::observers::{MemoryObserver, Observers, Refusal, WriteMarks};
use crate::{GuestPhys, PAGE_SIZE};

/// Where RAM stops below 4 GiB; above it lie the PCI hole and the APICs.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where the RAM that does not fit below the hole goes on.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// All regions, as vm-memory and what is built on it (virtio-queue, vhost) take
/// guest memory.
pub type Regions = GuestMemoryMmap<WriteMarks>;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {0} bytes: the size must be a multiple of 4096 and not zero")]
    BadSize(u64),
    #[error("a memory region at {0}: it must begin on a page and end below 2^64")]
    BadStart(GuestPhys),
    #[error(
        "the host gives no {} MiB of guest memory: {source}; {LESS}",
        mib(*.size)
    )]
    Allocate { size: u64, source: std::io::Error },
    #[error(
        "{} MiB of guest memory go beyond this process's {} MiB of address space; {LESS_OR_RAISE}",
        mib(*.size),
        .limit >> 20
    )]
    AddressSpace { size: u64, limit: u64 },
    #[error(
        "{} MiB of guest memory go beyond this process's {} MiB of one file; {LESS_OR_LONGER_FILES}",
        mib(*.size),
        .limit >> 20
    )]
    FileSize { size: u64, limit: u64 },
    #[error("memory of {len:#x} bytes at {start} overlaps a region that is there")]
    Overlap { start: GuestPhys, len: u64 },
    #[error("a machine has {MAX_REGIONS} memory regions at most")]
    TooMany,
    #[error("no memory region begins at {0}")]
    NoRegion(GuestPhys),
    #[error("the engine cannot use memory of {len:#x} bytes at {start}: {cause}")]
    Refused { start: GuestPhys, len: u64, cause: Refusal },
    #[error("{length} bytes at guest physical {address} are not RAM of this machine")]
    OutOfRange { address: GuestPhys, length: u64 },
    #[error("a request names more than {} pieces of memory", crate::ScatterList::MAX_PIECES)]
    TooManyPieces,
}

impl MemoryError {
    /// What the reader can do about it.
    pub fn mend(&self) -> Option<&'static str> {
        match self {
            Self::Allocate { .. } => Some(LESS),
            Self::AddressSpace { .. } => Some(LESS_OR_RAISE),
            Self::FileSize { .. } => Some(LESS_OR_LONGER_FILES),
            _ => None,
        }
    }

    /// The message without the mend.
    pub fn cause(&self) -> String {
        let line = self.to_string();
        let mend = self.mend().and_then(|mend| line.strip_suffix(mend)?.strip_suffix("; "));
        mend.map_or_else(|| line.clone(), str::to_owned)
    }
}

const LESS: &str = "ask for less memory";
const LESS_OR_RAISE: &str = "raise that with ulimit -v, or ask for less memory";
const LESS_OR_LONGER_FILES: &str = "raise that with ulimit -f, or ask for less memory";

/// Rounded up, so that a refused size is never shown as one that fits.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// One contiguous range of RAM. A copy keeps its memory mapped in this process,
/// whether or not the machine still has it.
#[derive(Clone)]
pub struct Region {
    pub start: GuestPhys,
    pub len: u64,
    /// Of a device, and no RAM.
    device: bool,
    mapping: Arc<GuestRegionMmap<WriteMarks>>,
}

impl Region {
    /// The host address of the first byte.
    pub fn host(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// The file that the memory is in, and where: for who shares it.
    pub fn file(&self) -> Option<&FileOffset> {
        GuestMemoryRegion::file_offset(&*self.mapping)
    }
}

/// The RAM of one machine.
///
/// Lock: `regions`, held to change them, and while observers hear of the change:
/// an engine's own come after it. Reading takes none.
pub struct GuestMemory {
    regions: Mutex<Vec<Region>>,
    /// The same for devices,
    space: GuestMemoryAtomic<Regions>,
    /// and for engines.
    host: HostMap,
    observers: Arc<Observers>,
    /// What is mapped from a file of saved RAM; taken before `regions`.
    pub(crate) lazy: Mutex<Lazy>,
}

impl GuestMemory {
    /// Maps `size` bytes of zeroed RAM: from 0 to 3 GiB, the rest from 4 GiB up.
    /// Both parts are in one memfd.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        check_size(size)?;
        let file = memfd(size)?;
        let memory = Self {
            regions: Mutex::default(),
            space: GuestMemoryAtomic::new(Regions::new()),
            host: HostMap::new(),
            observers: Arc::default(),
            lazy: Mutex::default(),
        };
        let low = size.min(LOW_RAM_END);
        memory.insert(GuestPhys(0), low, &file, 0, false)?;
        if size > low {
            memory.insert(GuestPhys(HIGH_RAM_START), size - low, &file, low, false)?;
        }
        Ok(memory)
    }

    /// Adds zeroed RAM, in a memfd of its own, while the machine runs or before.
    pub fn add_region(&self, start: GuestPhys, len: u64) -> Result<Region, MemoryError> {
        check_size(len)?;
        self.insert(start, len, &memfd(len)?, 0, false)
    }

    fn insert(
        &self,
        start: GuestPhys,
        len: u64,
        file: &Arc<File>,
        offset: u64,
        device: bool,
    ) -> Result<Region, MemoryError> {
        if start.page_offset() != 0 || start.0.checked_add(len).is_none() {
            return Err(MemoryError::BadStart(start));
        }
        let mapping = self.map(start, len, file, offset)?;
        let region = Region { start, len, device, mapping };
        let mut regions = self.regions.lock();
        if regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let space = self.space.memory().insert_region(Arc::clone(&region.mapping));
        let space = space.map_err(|_| MemoryError::Overlap { start, len })?;
        // Who has to be ready for the region is so before anybody finds it.
        self.observers.mapped(&region).map_err(|cause| MemoryError::Refused {
            start,
            len,
            cause,
        })?;
        regions.push(region.clone());
        self.publish(&regions, space);
        Ok(region)
    }

    /// Takes a region away: no access finds it any more, observers have let go
    /// of it, and it is unmapped when the last copy of the result is dropped.
    pub fn remove_region(&self, start: GuestPhys) -> Result<Region, MemoryError> {
        let mut lazy = self.lazy.lock();
        let mut regions = self.regions.lock();
        let index = regions.iter().position(|region| region.start == start);
        let region = regions.remove(index.ok_or(MemoryError::NoRegion(start))?);
        let (space, _) = self
            .space
            .memory()
            .remove_region(GuestAddress(start.0), region.len)
            .map_err(|_| MemoryError::NoRegion(start))?;
        self.publish(&regions, space);
        lazy.take(&(region.start.0..region.start.0 + region.len));
        self.observers.unmapped(&region);
        Ok(region)
    }

    fn publish(&self, regions: &[Region], space: Regions) {
        self.host.set(regions.iter().map(|region| (region.start, region.len, region.host())));
        let exclusive = self.space.lock();
        // Its lock guards a swap of a pointer: a panic elsewhere leaves no harm.
        exclusive.unwrap_or_else(std::sync::PoisonError::into_inner).replace(space);
    }

    fn map(
        &self,
        start: GuestPhys,
        len: u64,
        file: &Arc<File>,
        offset: u64,
    ) -> Result<Arc<GuestRegionMmap<WriteMarks>>, MemoryError> {
        let marks = WriteMarks::new(start, Arc::clone(&self.observers));
        let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, marks)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| not_mapped(len, error))?;
        // SAFETY: the range is the mapping just made. Failure is harmless: the
        // advice only asks for 2 MiB pages where the host's policy gives them.
        let _ = unsafe {
            let advice = rustix::mm::Advice::LinuxHugepage;
            rustix::mm::madvise(mapping.as_ptr().cast(), len as usize, advice)
        };
        let region = GuestRegionMmap::new(mapping, GuestAddress(start.0));
        region.map(Arc::new).ok_or(MemoryError::BadStart(start))
    }

    /// Lets the guest find a device's memory at `start`, at any time; `remove_region` takes it away
    /// from there. It may be in several places at once.
    pub fn add_device(
        &self,
        start: GuestPhys,
        memory: &DeviceMemory,
    ) -> Result<Region, MemoryError> {
        self.insert(start, memory.len(), memory.file(), 0, true)
    }

    /// The regions of this moment that are RAM.
    pub fn ram(&self) -> Vec<Region> {
        let mut regions = self.regions();
        regions.retain(|region| !region.device);
        regions
    }

    /// The regions of this moment, those of devices among them.
    pub fn regions(&self) -> Vec<Region> {
        self.regions.lock().clone()
    }

    /// Guest memory for devices in Rust, as virtio-queue and vhost take it: each
    /// request asks it anew for `memory()`, and writes are seen by observers.
    pub fn space(&self) -> GuestMemoryAtomic<Regions> {
        self.space.clone()
    }

    /// Adds who hears of writes and of regions from now on.
    pub fn add_observer(&self, observer: Arc<dyn MemoryObserver>) {
        self.observers.add(&observer);
    }

    /// The host address of `len` bytes of one region at `address`, or `None`
    /// where any of them is not RAM. It is valid until the region's observers
    /// have been told that it is unmapped. Writes to it are nobody's to see.
    #[inline]
    pub fn host(&self, address: GuestPhys, len: u64) -> Option<*mut u8> {
        self.host.find(address, len)
    }

    /// A number that is another one after each change of the regions.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.host.sequence()
    }

    /// Whether there is RAM at `address`, and all of `length` bytes from there on.
    pub fn contains(&self, address: GuestPhys, length: u64) -> bool {
        covers(&self.space.memory(), address, length)
    }

    pub fn read(&self, address: GuestPhys, data: &mut [u8]) -> Result<(), MemoryError> {
        let length = data.len() as u64;
        let space = self.space.memory();
        let read = covers(&space, address, length).then(|| space.read_slice(data, address.into()));
        read.and_then(Result::ok).ok_or(MemoryError::OutOfRange { address, length })
    }

    /// Writes for a device or loader. Nothing is written where any of it is not
    /// RAM.
    pub fn write(&self, address: GuestPhys, data: &[u8]) -> Result<(), MemoryError> {
        let length = data.len() as u64;
        let space = self.space.memory();
        let wrote =
            covers(&space, address, length).then(|| space.write_slice(data, address.into()));
        wrote.and_then(Result::ok).ok_or(MemoryError::OutOfRange { address, length })
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.observers.clear();
    }
}

fn covers(space: &Regions, address: GuestPhys, length: u64) -> bool {
    let whole = |len| GuestMemoryBackend::check_range(space, address.into(), len);
    space.address_in_range(address.into()) && usize::try_from(length).is_ok_and(whole)
}

impl From<GuestPhys> for GuestAddress {
    fn from(address: GuestPhys) -> Self {
        Self(address.0)
    }
}

pub(crate) fn check_size(size: u64) -> Result<(), MemoryError> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::BadSize(size));
    }
    // What the host could never back is refused: the memfd itself is sparse,
    // and the guest would otherwise be killed in the middle of its work.
    let host = rustix::system::sysinfo();
    let total = host.totalram.saturating_mul(u64::from(host.mem_unit));
    if size > total {
        let has = std::io::Error::other(format!("the host has {} MiB of memory", total >> 20));
        return Err(MemoryError::Allocate { size, source: has });
    }
    Ok(())
}

pub(crate) fn memfd(size: u64) -> Result<Arc<File>, MemoryError> {
    let failed = |source| MemoryError::Allocate { size, source };
    let file = memfd_create("tetrarch-ram", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let file = File::from(file);
    file.set_len(size).map_err(|source| match getrlimit(Resource::Fsize).current {
        // Most programs leave SIGXFSZ alone, and end then; Python's ignore it (signal(7)).
        Some(limit) if source.raw_os_error() == Some(libc::EFBIG) => {
            MemoryError::FileSize { size, limit }
        }
        _ => failed(source),
    })?;
    Ok(Arc::new(file))
}

/// Says which limit it was, where it can be known.
fn not_mapped(size: u64, error: MmapRegionError) -> MemoryError {
    let source = match error {
        MmapRegionError::Mmap(source) => source,
        other => std::io::Error::other(other),
    };
    match getrlimit(Resource::As).current {
        Some(limit) if source.raw_os_error() == Some(libc::ENOMEM) => {
            MemoryError::AddressSpace { size, limit }
        }
        _ => MemoryError::Allocate { size, source },
    }
}

#[cfg(test)]
#[path = "guest_memory_tests.rs"]
mod tests;
