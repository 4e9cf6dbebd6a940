//! Guest memory that comes and goes, and what devices write there.

use std::sync::{Arc, Weak};

use tetrarch_memory::{GuestPhys, MemoryObserver, Refusal, Region};

use crate::shared::VmShared;
use crate::slots::MemorySlots;

/// Lets the slots follow guest memory. Weak, since the VM keeps the memory.
pub struct MemoryChanges {
    pub vm: Weak<VmShared>,
    pub slots: Arc<MemorySlots>,
}

impl MemoryObserver for MemoryChanges {
    fn written(&self, address: GuestPhys, length: u64) {
        self.slots.written(address, length);
    }

    fn mapped(&self, region: &Region) -> Result<(), Refusal> {
        let Some(vm) = self.vm.upgrade() else { return Ok(()) };
        Ok(self.slots.map(&vm.fd, region)?)
    }

    fn unmapped(&self, region: &Region) {
        if let Some(vm) = self.vm.upgrade() {
            // Deleting a slot that exists cannot fail. If it did, the region
            // would stay mapped, and the guest would go on to see it.
            let deleted = self.slots.unmap(&vm.fd, region);
            debug_assert!(deleted.is_ok(), "{deleted:?}");
        }
    }
}
