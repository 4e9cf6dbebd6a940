//! Memory for code: one memfd, mapped once to write and once to run.
//!
//! Nothing is ever writable and executable at the same address.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

const HOST_PAGE: usize = 4096;

pub struct CodeMemory {
    write: *mut u8,
    run: *mut u8,
    len: usize,
}

// SAFETY: plain memory; who writes it has it alone, or its part of it.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; shared references read addresses, but for `write_own`.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// `name` is shown in /proc/PID/maps.
    pub fn new(name: &str, len: usize) -> std::io::Result<Self> {
        // Linux 6.3 asks a memfd that will be executed to say so; before, the flag
        // is an error.
        let memfd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::EXEC)
            .or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC))?;
        ftruncate(&memfd, len as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, &memfd, 0) }
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let run = map(ProtFlags::READ | ProtFlags::EXEC).inspect_err(|_| {
            // SAFETY: the mapping was just made and is used by nobody.
            let _ = unsafe { munmap(write, len) };
        })?;
        Ok(Self { write: write.cast(), run: run.cast(), len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address at which the byte at `offset` runs.
    pub fn run_address(&self, offset: usize) -> u64 {
        self.run as u64 + offset as u64
    }

    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        // SAFETY: nobody else writes while this has `&mut self`.
        unsafe { self.write_own(offset, bytes) };
    }

    /// Writes where several threads have a part of the memory each.
    ///
    /// # Safety
    /// No other thread writes to these bytes.
    pub unsafe fn write_own(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        // SAFETY: the range was checked, `bytes` is not in this mapping, and the
        // caller vouches for other threads.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(offset), bytes.len());
        }
    }

    /// Gives the pages that lie in a range wholly back to the host; they are zeros then.
    pub fn give_back(&mut self, start: usize, end: usize) {
        let (start, end) =
            (start.next_multiple_of(HOST_PAGE), end.min(self.len) / HOST_PAGE * HOST_PAGE);
        if start < end {
            // SAFETY: in the mapping, and `&mut self`: nobody runs or writes what is there.
            let removed =
                unsafe { madvise(self.write.add(start).cast(), end - start, Advice::LinuxRemove) };
            // Then they stay, and are written over.
            let _ = removed.inspect_err(|error| log::debug!("code memory stays: {error}"));
        }
    }

    /// Replaces four bytes of code that another vCPU may be running: it sees the
    /// old or the new value, never a mix. They lie in one aligned quadword (Intel
    /// SDM 3A, 8.1.1; AMD APM 2, 7.3.2).
    pub fn patch(&mut self, offset: usize, value: u32) {
        let (word, shift) = (offset & !7, offset % 8 * 8);
        assert!(shift <= 32 && word + 8 <= self.len, "a patch across quadwords at {offset:#x}");
        // SAFETY: in range, aligned since mappings start on pages, and written by
        // this mapping's owner alone, to whom `&mut self` leads.
        let cell = unsafe { AtomicU64::from_ptr(self.write.add(word).cast()) };
        let kept = cell.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        cell.store(kept | u64::from(value) << shift, Ordering::Release);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours; no vCPU runs when the cache goes.
        unsafe {
            let _ = munmap(self.write.cast(), self.len);
            let _ = munmap(self.run.cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_zeros_and_the_rest_stays() {
        let mut memory = CodeMemory::new("test", 5 * HOST_PAGE).unwrap();
        memory.write(0, &[7; 5 * HOST_PAGE]);
        memory.give_back(100, 3 * HOST_PAGE + 100);
        // SAFETY: the executable mapping, which is readable.
        let seen = unsafe { std::slice::from_raw_parts(memory.run, 5 * HOST_PAGE) };
        let (kept, gone) = (HOST_PAGE..3 * HOST_PAGE, [0; 2 * HOST_PAGE]);
        assert_eq!(seen[kept.clone()], gone);
        assert!(seen[..kept.start].iter().chain(&seen[kept.end..]).all(|&byte| byte == 7));
    }

    #[test]
    fn patch_changes_its_four_bytes_alone() {
        let mut memory = CodeMemory::new("test", 4096).unwrap();
        let before: Vec<u8> = (0..16).collect();
        for offset in 0..=4 {
            memory.write(0, &before);
            memory.patch(offset, 0xAABB_CCDD);
            let mut expected = before.clone();
            expected[offset..offset + 4].copy_from_slice(&0xAABB_CCDDu32.to_le_bytes());
            // SAFETY: the first bytes of the executable mapping, which is readable.
            let seen = unsafe { std::slice::from_raw_parts(memory.run, 16) };
            assert_eq!(seen, expected);
        }
    }
}
