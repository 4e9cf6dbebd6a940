//! Memory slots: which guest memory the kernel has, and what was written to it,
//! by vCPUs (the kernel's log) and by devices.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use tetrarch_engine::{DirtyPages, EngineError};
use tetrarch_memory::{GuestPhys, PAGE_SHIFT, Region};

use crate::dirty::{DirtyTracking, Ring, enable_ring};
use crate::error::refused;

// KVM_RESET_DIRTY_RINGS (linux/kvm.h).
vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The memory slots of one VM.
///
/// Lock: `slots`, then nothing.
pub struct MemorySlots {
    tracking: DirtyTracking,
    logging: AtomicBool,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// By number; one that is free is taken again.
    slots: Vec<Option<Slot>>,
    rings: Vec<Ring>,
}

struct Slot {
    /// Keeps mapped what the kernel uses.
    region: Region,
    /// What is known already.
    dirty: DirtyPages,
}

impl Slot {
    fn take(&mut self) -> DirtyPages {
        let fresh = DirtyPages::new(self.region.start, self.region.len);
        std::mem::replace(&mut self.dirty, fresh)
    }
}

impl MemorySlots {
    /// To be made before the first vCPU, which a ring comes with.
    pub fn new(vm: &VmFd, tracking: DirtyTracking) -> Result<Arc<Self>, EngineError> {
        if let DirtyTracking::Ring { entries } = tracking {
            enable_ring(vm, entries)?;
        }
        let (logging, slots) = (AtomicBool::new(false), Mutex::default());
        Ok(Arc::new(Self { tracking, logging, slots }))
    }

    /// Gives a region to the kernel.
    pub fn map(&self, vm: &VmFd, region: &Region) -> Result<(), EngineError> {
        let mut slots = self.slots.lock();
        let list = &mut slots.slots;
        let number = list.iter().position(Option::is_none).unwrap_or(list.len());
        set_slot(vm, number, region, region.len, self.logging.load(Ordering::SeqCst))?;
        if number == list.len() {
            list.push(None);
        }
        let dirty = DirtyPages::new(region.start, region.len);
        list[number] = Some(Slot { region: region.clone(), dirty });
        Ok(())
    }

    /// Takes a region from the kernel, which returns when no vCPU uses it.
    pub fn unmap(&self, vm: &VmFd, region: &Region) -> Result<(), EngineError> {
        let mut slots = self.slots.lock();
        let is_it = |slot: &Option<Slot>| {
            slot.as_ref().is_some_and(|slot| slot.region.start == region.start)
        };
        let Some(number) = slots.slots.iter().position(is_it) else { return Ok(()) };
        set_slot(vm, number, region, 0, false)?;
        let gone = slots.slots[number].take();
        drop(slots);
        drop(gone);
        Ok(())
    }

    /// Maps the ring of a new vCPU.
    pub fn add_vcpu(&self, vcpu: &impl AsRawFd) -> Result<(), EngineError> {
        if let DirtyTracking::Ring { entries } = self.tracking {
            let ring = Ring::map(vcpu.as_raw_fd(), entries)
                .map_err(|error| EngineError::Unavailable(format!("no dirty ring: {error}")))?;
            self.slots.lock().rings.push(ring);
        }
        Ok(())
    }

    /// Starts or stops to note which pages are written.
    pub fn set_logging(&self, vm: &VmFd, on: bool) -> Result<(), EngineError> {
        let slots = self.slots.lock();
        self.logging.store(on, Ordering::SeqCst);
        for (number, slot) in slots.slots.iter().enumerate() {
            if let Some(Slot { region, .. }) = slot {
                set_slot(vm, number, region, region.len, on)?;
            }
        }
        Ok(())
    }

    /// Empties the vCPUs' rings into the bitmaps.
    pub fn harvest(&self, vm: RawFd) -> Result<(), EngineError> {
        let mut slots = self.slots.lock();
        let Slots { slots, rings } = &mut *slots;
        for ring in rings {
            ring.harvest(|number, page| {
                if let Some(Some(slot)) = slots.get_mut(number as usize) {
                    slot.dirty.mark(page);
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

    /// What was written since the last call, or since the log was started, by
    /// region.
    pub fn take_dirty(&self, vm: &VmFd) -> Result<Vec<DirtyPages>, EngineError> {
        let bitmap = self.tracking == DirtyTracking::Bitmap;
        if !bitmap {
            self.harvest(vm.as_raw_fd())?;
        }
        let mut slots = self.slots.lock();
        if bitmap && self.logging.load(Ordering::SeqCst) {
            for (number, slot) in slots.slots.iter_mut().enumerate() {
                let Some(slot) = slot else { continue };
                let log = vm
                    .get_dirty_log(number as u32, slot.region.len as usize)
                    .map_err(|error| refused("read which pages were written", error))?;
                for (word, logged) in slot.dirty.bitmap.iter_mut().zip(log) {
                    *word |= logged;
                }
            }
        }
        Ok(slots.slots.iter_mut().flatten().map(Slot::take).collect())
    }

    /// A device wrote, which the kernel does not see.
    pub fn written(&self, address: GuestPhys, length: u64) {
        if length == 0 || !self.logging.load(Ordering::Relaxed) {
            return;
        }
        for slot in self.slots.lock().slots.iter_mut().flatten() {
            let offset = address.0.wrapping_sub(slot.region.start.0);
            if offset < slot.region.len {
                for page in offset >> PAGE_SHIFT..=(offset + length - 1) >> PAGE_SHIFT {
                    slot.dirty.mark(page);
                }
            }
        }
    }
}

/// `len` is the region's, or 0 to delete the slot (api.rst, 4.35).
fn set_slot(
    vm: &VmFd,
    number: usize,
    region: &Region,
    len: u64,
    log: bool,
) -> Result<(), EngineError> {
    let slot = kvm_userspace_memory_region {
        slot: number as u32,
        flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.start.0,
        memory_size: len,
        userspace_addr: region.host() as u64,
    };
    // SAFETY: the range is the region's mapping, which the list of slots keeps
    // until the slot is deleted or the VM closed.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| slot_refused(region.len, error))
}

fn slot_refused(len: u64, error: kvm_ioctls::Error) -> EngineError {
    refused(&format!("map {} MiB of guest memory", len >> 20), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_without_memory_names_the_option() {
        let error = slot_refused(512 << 20, kvm_ioctls::Error::new(libc::ENOMEM)).to_string();
        assert!(error.contains("512 MiB") && error.contains("less memory"), "{error}");
    }
}
