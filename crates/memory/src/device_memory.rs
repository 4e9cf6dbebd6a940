//! Memory of a device that the guest uses as RAM: a screen's.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use crate::guest_memory::{check_size, memfd};
use crate::{GuestPhys, MemoryError};

/// It is one, wherever the guest finds it and whether or not it does: the device reaches it by
/// offsets.
pub struct DeviceMemory {
    file: Arc<File>,
    view: MmapRegion,
}

impl DeviceMemory {
    /// Zeros, a multiple of 4096.
    pub fn new(len: u64) -> Result<Self, MemoryError> {
        check_size(len)?;
        let file = memfd(len)?;
        let view = MmapRegionBuilder::new(len as usize)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| MemoryError::Allocate {
                size: len,
                source: std::io::Error::other(error),
            })?;
        Ok(Self { file, view })
    }

    pub fn len(&self) -> u64 {
        self.view.size() as u64
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn contains(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.len())
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let length = data.len() as u64;
        let read = self
            .contains(offset, length)
            .then(|| self.view.as_volatile_slice().read_slice(data, offset as usize));
        read.and_then(Result::ok).ok_or(outside(offset, length))
    }

    /// Engines do not hear of it: where the guest finds the memory, `GuestMemory::write` is for
    /// code that is there.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let length = data.len() as u64;
        let wrote = self
            .contains(offset, length)
            .then(|| self.view.as_volatile_slice().write_slice(data, offset as usize));
        wrote.and_then(Result::ok).ok_or(outside(offset, length))
    }
}

fn outside(offset: u64, length: u64) -> MemoryError {
    MemoryError::OutOfRange { address: GuestPhys(offset), length }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;

    #[test]
    fn is_found_wherever_the_guest_has_it() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let device = DeviceMemory::new(0x2000).unwrap();
        device.write(0x10, b"before").unwrap();
        for place in [GuestPhys(0xD000_0000), GuestPhys(0xD100_0000)] {
            memory.add_device(place, &device).unwrap();
            let mut data = [0; 6];
            memory.read(GuestPhys(place.0 + 0x10), &mut data).unwrap();
            assert_eq!(&data, b"before");
        }
        memory.write(GuestPhys(0xD100_0010), b"beside").unwrap();
        memory.remove_region(GuestPhys(0xD000_0000)).unwrap();
        memory.remove_region(GuestPhys(0xD100_0000)).unwrap();
        let mut data = [0; 6];
        device.read(0x10, &mut data).unwrap();
        assert_eq!(&data, b"beside");
        assert!(memory.add_device(GuestPhys(0), &device).is_err());
    }

    #[test]
    fn is_no_ram_and_ends_where_it_ends() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let device = DeviceMemory::new(0x1000).unwrap();
        memory.add_device(GuestPhys(0xD000_0000), &device).unwrap();
        assert_eq!((memory.ram().len(), memory.regions().len()), (1, 2));
        assert!(device.read(0xFFF, &mut [0; 2]).is_err());
        assert!(device.write(u64::MAX, &[0; 2]).is_err());
        assert!(DeviceMemory::new(0x1001).is_err());
        assert!(!device.is_empty());
    }
}
