//! Memory for translated code: one memfd, mapped once to write and once to run.
//!
//! Nothing is ever writable and executable at the same address.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

pub struct CodeMemory {
    write: *mut u8,
    run: *mut u8,
    len: usize,
}

// SAFETY: plain memory; who writes it holds the lock of the cache that owns it.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; shared references only read addresses.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    pub fn new(len: usize) -> std::io::Result<Self> {
        // SAFETY: the name is a NUL-terminated string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"tetrarch-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain call on our descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let map = |prot| {
            // SAFETY: a shared mapping at an address of the kernel's choice.
            let at = unsafe {
                libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0)
            };
            if at == libc::MAP_FAILED {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(at.cast::<u8>())
            }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let run = map(libc::PROT_READ | libc::PROT_EXEC).inspect_err(|_| {
            // SAFETY: the mapping was just made and is used by nobody.
            unsafe { libc::munmap(write.cast(), len) };
        })?;
        Ok(Self { write, run, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address at which the byte at `offset` runs.
    pub fn run_address(&self, offset: usize) -> u64 {
        self.run as u64 + offset as u64
    }

    /// The offset of an address in the executable mapping.
    pub fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = address.wrapping_sub(self.run as u64) as usize;
        (offset < self.len).then_some(offset)
    }

    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        // SAFETY: the range was checked, and `bytes` is not in this mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(offset), bytes.len());
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
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.run.cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_changes_its_four_bytes_alone() {
        let mut memory = CodeMemory::new(4096).unwrap();
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
