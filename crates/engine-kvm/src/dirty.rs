//! Which pages were written: by vCPUs (the kernel's log) and by devices.
//!
//! The kernel keeps a bitmap for each slot, or, where it can and the VM asked
//! for it, a ring for each vCPU (api.rst, 8.29), whose cost follows what was
//! written and not the size of memory.

use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use tetrarch_engine::EngineError;
use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SHIFT, PAGE_SIZE, WriteObserver};

use crate::vm::refused;

// KVM_RESET_DIRTY_RINGS (linux/kvm.h).
vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

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

/// Written pages of one range of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    pub start: GuestPhys,
    /// One bit a page, from the lowest.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    fn new(start: GuestPhys, len: u64) -> Self {
        let pages = (len >> PAGE_SHIFT) as usize;
        Self { start, bitmap: vec![0; pages.div_ceil(64)] }
    }

    fn mark(&mut self, page: u64) {
        if let Some(word) = self.bitmap.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    pub fn contains(&self, address: GuestPhys) -> bool {
        let page = address.0.wrapping_sub(self.start.0) >> PAGE_SHIFT;
        self.bitmap.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    pub fn count(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// The written pages of one VM.
///
/// Lock: `pages`, then nothing.
pub struct DirtyLog {
    tracking: DirtyTracking,
    on: AtomicBool,
    pages: Mutex<Pages>,
}

struct Pages {
    /// By slot: what is known already.
    seen: Vec<DirtyPages>,
    lens: Vec<u64>,
    rings: Vec<Ring>,
}

impl DirtyLog {
    /// To be made before the first vCPU, which a ring comes with.
    pub fn new(
        vm: &VmFd,
        memory: &GuestMemory,
        tracking: DirtyTracking,
    ) -> Result<Arc<Self>, EngineError> {
        if let DirtyTracking::Ring { entries } = tracking {
            enable_ring(vm, entries)?;
        }
        let lens: Vec<u64> = memory.regions().iter().map(|region| region.len).collect();
        let seen = memory.regions().iter().map(|r| DirtyPages::new(r.start, r.len)).collect();
        let pages = Mutex::new(Pages { seen, lens, rings: Vec::new() });
        Ok(Arc::new(Self { tracking, on: AtomicBool::new(false), pages }))
    }

    /// Maps the ring of a new vCPU.
    pub fn add_vcpu(&self, vcpu: &impl AsRawFd) -> Result<(), EngineError> {
        if let DirtyTracking::Ring { entries } = self.tracking {
            let ring = Ring::map(vcpu.as_raw_fd(), entries)
                .map_err(|error| EngineError::Unavailable(format!("no dirty ring: {error}")))?;
            self.pages.lock().rings.push(ring);
        }
        Ok(())
    }

    pub fn set_on(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }

    /// Empties the vCPUs' rings into the bitmaps.
    pub fn harvest(&self, vm: RawFd) -> Result<(), EngineError> {
        let mut pages = self.pages.lock();
        let Pages { seen, rings, .. } = &mut *pages;
        for ring in rings {
            ring.harvest(|slot, page| {
                if let Some(pages) = seen.get_mut(slot as usize) {
                    pages.mark(page);
                }
            });
        }
        // SAFETY: the ioctl takes no argument and touches no memory of ours but
        // the rings, whose entries have been given back.
        let reset = unsafe { libc::ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
        if reset < 0 {
            return Err(EngineError::Internal(format!(
                "the dirty rings cannot be reset: {}",
                std::io::Error::last_os_error()
            )));
        }
        Ok(())
    }

    /// What was written since the last call, or since the log was started.
    pub fn take(&self, vm: &VmFd) -> Result<Vec<DirtyPages>, EngineError> {
        let bitmap = self.tracking == DirtyTracking::Bitmap;
        if !bitmap {
            self.harvest(vm.as_raw_fd())?;
        }
        let mut pages = self.pages.lock();
        let Pages { seen, lens, .. } = &mut *pages;
        if bitmap && self.on.load(Ordering::SeqCst) {
            for (slot, (seen, &len)) in seen.iter_mut().zip(lens.iter()).enumerate() {
                let log = vm
                    .get_dirty_log(slot as u32, len as usize)
                    .map_err(|error| refused("read which pages were written", error))?;
                for (word, logged) in seen.bitmap.iter_mut().zip(log) {
                    *word |= logged;
                }
            }
        }
        let fresh = seen
            .iter()
            .zip(lens.iter())
            .map(|(pages, &len)| DirtyPages::new(pages.start, len))
            .collect();
        Ok(std::mem::replace(seen, fresh))
    }
}

/// Writes of devices, which the kernel does not see.
pub struct DeviceWrites(pub Arc<DirtyLog>);

impl WriteObserver for DeviceWrites {
    fn written(&self, address: GuestPhys, length: u64) {
        if length == 0 || !self.0.on.load(Ordering::Relaxed) {
            return;
        }
        let mut pages = self.0.pages.lock();
        let Pages { seen, lens, .. } = &mut *pages;
        for (seen, &len) in seen.iter_mut().zip(lens.iter()) {
            let offset = address.0.wrapping_sub(seen.start.0);
            if offset < len {
                for page in offset >> PAGE_SHIFT..=(offset + length - 1) >> PAGE_SHIFT {
                    seen.mark(page);
                }
            }
        }
    }
}

fn enable_ring(vm: &VmFd, entries: u32) -> Result<(), EngineError> {
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
                "a dirty ring of {entries} entries cannot be; give a power of two from 256 to {}",
                largest as usize / size_of::<kvm_dirty_gfn>()
            )));
        }
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = bytes.into();
        return vm.enable_cap(&enable).map_err(|error| refused("make dirty rings", error));
    }
    Err(EngineError::Unavailable(
        "the host's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING); use the bitmap".into(),
    ))
}

/// One vCPU's ring, shared with the kernel.
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    next: usize,
}

// SAFETY: memory shared with the kernel, used under the lock of `DirtyLog`.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: RawFd, entries: u32) -> std::io::Result<Self> {
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

    fn harvest(&mut self, mut found: impl FnMut(u32, u64)) {
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
