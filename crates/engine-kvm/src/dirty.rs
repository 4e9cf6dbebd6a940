//! In what form it is noted which pages were written.
//!
//! The kernel keeps a bitmap for each slot, or, where it can and the VM asked
//! for it, a ring for each vCPU (api.rst, 8.29), whose cost follows what was
//! written and not the size of memory.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use tetrarch_engine::EngineError;
use tetrarch_memory::PAGE_SIZE;

use crate::error::refused;

/// Flags of an entry of the ring.
const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;

/// How the kernel keeps the log of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyTracking {
    #[default]
    Bitmap,
    /// A ring of so many entries, a power of two, for each vCPU.
    Ring { entries: u32 },
}

pub fn enable_ring(vm: &VmFd, entries: u32) -> Result<(), EngineError> {
    let bytes = entries.saturating_mul(size_of::<kvm_dirty_gfn>() as u32);
    for cap in [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING] {
        let largest = vm.check_extension_raw(cap.into());
        if largest <= 0 {
            continue;
        }
        if !bytes.is_power_of_two()
            || !u64::from(bytes).is_multiple_of(PAGE_SIZE)
            || bytes > largest as u32
        {
            return Err(EngineError::Refused(format!(
                "a dirty ring of {entries} entries cannot be"
            ))
            .mended_by(format!(
                "give a power of two from 256 to {}",
                largest as usize / size_of::<kvm_dirty_gfn>()
            )));
        }
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = bytes.into();
        return vm.enable_cap(&enable).map_err(|error| refused("make dirty rings", error));
    }
    Err(EngineError::Unavailable(
        "the host's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)".into(),
    )
    .mended_by("use the bitmap"))
}

/// One vCPU's ring, shared with the kernel.
pub struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    next: usize,
}

// SAFETY: memory shared with the kernel, used under the lock of `MemorySlots`.
unsafe impl Send for Ring {}

impl Ring {
    pub fn map(vcpu: RawFd, entries: u32) -> std::io::Result<Self> {
        let count = entries as usize;
        // SAFETY: a fresh mapping of the vCPU's file, at the offset where the
        // kernel keeps the ring.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * size_of::<kvm_dirty_gfn>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu,
                i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64,
            )
        };
        match NonNull::new(address.cast()) {
            Some(entries) if address != libc::MAP_FAILED => Ok(Self { entries, count, next: 0 }),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    pub fn harvest(&mut self, mut found: impl FnMut(u32, u64)) {
        for _ in 0..self.count {
            // SAFETY: `next` is below `count`, the entries of the mapping. The
            // kernel writes the flags last, and we read them first (acquire), so
            // the rest is complete; it is ours until the flag is set to collected.
            unsafe {
                let entry = self.entries.add(self.next).as_ptr();
                let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
                if flags.load(Ordering::Acquire) & DIRTY == 0 {
                    return;
                }
                // The slot's address space is in the high half; ours is 0.
                found((*entry).slot & 0xFFFF, (*entry).offset);
                flags.store(COLLECTED, Ordering::Release);
            }
            self.next = (self.next + 1) % self.count;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and used by nobody any more.
        unsafe {
            libc::munmap(self.entries.as_ptr().cast(), self.count * size_of::<kvm_dirty_gfn>());
        }
    }
}
