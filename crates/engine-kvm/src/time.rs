//! The clocks that the kernel keeps, while the machine's clock stands.
//!
//! kvmclock is taken when the machine stops and set again when it goes on; each
//! vCPU's TSC is put back by the ticks of the pause when the vCPU next runs, and
//! its TSC deadline is written once more, which makes the kernel count anew to
//! it. What the kernel cannot be asked to stop goes on: a PIT channel or a local
//! APIC timer in one-shot or periodic mode that comes due in the pause fires
//! once when the guest runs again.

use std::os::fd::AsRawFd;
use std::sync::Weak;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::VcpuFd;
use parking_lot::Mutex;
use tetrarch_engine::{ClockFollower, EngineError};

use crate::error::refused;
use crate::msr;
use crate::shared::VmShared;

// KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR (linux/kvm.h) of a vCPU's descriptor.
vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// kvmclock, which follows the machine's clock.
pub struct KvmClock {
    vm: Weak<VmShared>,
    stands: Mutex<Option<u64>>,
}

impl KvmClock {
    pub fn new(vm: Weak<VmShared>) -> Self {
        Self { vm, stands: Mutex::new(None) }
    }

    /// What kvmclock says: now, or where it stands.
    pub fn read(&self, vm: &VmShared) -> Result<u64, EngineError> {
        match *self.stands.lock() {
            Some(clock) => Ok(clock),
            None => Ok(vm.fd.get_clock().map_err(|e| refused("read the guest's clock", e))?.clock),
        }
    }

    pub fn set(&self, vm: &VmShared, clock: u64) -> Result<(), EngineError> {
        let mut stands = self.stands.lock();
        if stands.is_some() {
            *stands = Some(clock);
        }
        vm.fd
            .set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(|error| refused("set the guest's clock", error))
    }
}

impl ClockFollower for KvmClock {
    fn stopped(&self) -> Result<(), EngineError> {
        let Some(vm) = self.vm.upgrade() else { return Ok(()) };
        let clock = vm.fd.get_clock().map_err(|error| refused("read the guest's clock", error))?;
        *self.stands.lock() = Some(clock.clock);
        Ok(())
    }

    fn started(&self) -> Result<(), EngineError> {
        let Some(vm) = self.vm.upgrade() else { return Ok(()) };
        let Some(clock) = self.stands.lock().take() else { return Ok(()) };
        vm.fd
            .set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(|error| refused("set the guest's clock", error))
    }
}

/// How far the guest's TSC is from the host's; `None` before Linux 5.16.
fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the kernel writes the 8 bytes of the local that `addr` points to.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> bool {
    let attribute = attribute(&raw mut offset);
    // SAFETY: the kernel reads the 8 bytes of the local that `addr` points to.
    (unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attribute) }) == 0
}

fn attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
    }
}

/// Lets the guest's TSC be `value` now.
pub fn set_tsc(vcpu: &VcpuFd, value: u64) {
    let moved = tsc_offset(vcpu).is_some_and(|offset| {
        let now = msr::get(vcpu, msr::index::TSC);
        now.is_some_and(|now| set_tsc_offset(vcpu, offset.wrapping_add(value.wrapping_sub(now))))
    });
    if !moved {
        msr::set(vcpu, msr::index::TSC, value);
    }
}

/// Puts the guest's TSC back by `ticks`.
pub fn delay_tsc(vcpu: &VcpuFd, ticks: u64) {
    let moved =
        tsc_offset(vcpu).is_some_and(|offset| set_tsc_offset(vcpu, offset.wrapping_sub(ticks)));
    if !moved && let Some(now) = msr::get(vcpu, msr::index::TSC) {
        // Older kernels take a value near the other vCPUs' as meant to be theirs.
        msr::set(vcpu, msr::index::TSC, now.wrapping_sub(ticks));
    }
    if let Some(deadline) = msr::get(vcpu, msr::index::TSC_DEADLINE)
        && deadline != 0
    {
        msr::set(vcpu, msr::index::TSC_DEADLINE, deadline);
    }
}
