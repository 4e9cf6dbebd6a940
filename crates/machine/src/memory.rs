//! RAM that comes and goes while the machine runs.

use tetrarch_memory::{DeviceMemory, GuestPhys};

use crate::{Machine, MachineError};

impl Machine {
    /// Adds zeroed RAM where nothing else is.
    pub fn add_memory(&self, start: u64, len: u64) -> Result<(), MachineError> {
        let reserved = self.bus.reserve_mmio(start, len, "RAM")?;
        if let Err(refused) = self.memory.add_region(GuestPhys(start), len) {
            reserved.detach();
            return Err(refused.into());
        }
        self.ram.lock().push((start, reserved));
        Ok(())
    }

    /// Lets the guest find a device's memory where nothing else is.
    pub fn map_device(&self, start: u64, memory: &DeviceMemory) -> Result<(), MachineError> {
        let reserved = self.bus.reserve_mmio(start, memory.len(), "memory of a device")?;
        if let Err(refused) = self.memory.add_device(GuestPhys(start), memory) {
            reserved.detach();
            return Err(refused.into());
        }
        self.ram.lock().push((start, reserved));
        Ok(())
    }

    /// Takes the RAM that begins at `start` away, with what is in it. The
    /// machine is held meanwhile, since vCPUs may be in the middle of it.
    pub fn remove_memory(&self, start: u64) -> Result<(), MachineError> {
        let removed = self.held(|| self.memory.remove_region(GuestPhys(start)))??;
        let mut ram = self.ram.lock();
        if let Some(index) = ram.iter().position(|(at, _)| *at == start) {
            ram.swap_remove(index).1.detach();
        }
        drop((ram, removed));
        Ok(())
    }
}
