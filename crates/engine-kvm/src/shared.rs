//! What the vCPUs of a machine share.

use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use tetrarch_engine::{Clock, CpuModel, EngineError, Platform};
use tetrarch_memory::GuestMemory;

use crate::cpuid::Policy;
use crate::halt::HaltWatch;
use crate::msr::MsrPolicy;
use crate::slots::MemorySlots;

/// What all vCPUs of a VM use.
pub struct VmShared {
    pub fd: VmFd,
    pub memory: Arc<GuestMemory>,
    pub clock: Arc<Clock>,
    pub supported: CpuId,
    pub policy: Policy,
    pub msrs: MsrPolicy,
    pub slots: Arc<MemorySlots>,
    pub platform: Platform,
    pub cpu: CpuModel,
    pub halts: HaltWatch,
    pub kvmclock_ctrl: bool,
    pub xcrs: bool,
    pub debugregs: bool,
    pub events: bool,
    /// Interrupts can be held back while a debugger steps.
    pub debug_block_irq: bool,
    /// Ticks of a vCPU's TSC in a second; the first vCPU tells.
    pub tsc_hz: OnceLock<u64>,
}

impl VmShared {
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz.get().copied().unwrap_or(0)
    }

    pub fn harvest_dirty(&self) -> Result<(), EngineError> {
        self.slots.harvest(self.fd.as_raw_fd())
    }
}
