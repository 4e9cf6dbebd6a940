//! Events by which the kernel tells others of a write, and others tell it of an
//! interrupt, without a way through this process.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use tetrarch_engine::{Doorbell, DoorbellAddress, EngineError};

use crate::vm::refused;

// kvm-ioctls has the size only together with a value, and takes descriptors of one
// library alone.
vmm_sys_util::ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// Lets writes signal an event (api.rst, 4.59).
pub fn add_doorbell(
    vm: &VmFd,
    doorbell: &Doorbell,
    event: BorrowedFd<'_>,
) -> Result<(), EngineError> {
    ioeventfd(vm, doorbell, event, 0).map_err(|error| refused("tie a write to an event", error))
}

pub fn remove_doorbell(
    vm: &VmFd,
    doorbell: &Doorbell,
    event: BorrowedFd<'_>,
) -> Result<(), EngineError> {
    ioeventfd(vm, doorbell, event, 1 << kvm_ioeventfd_flag_nr_deassign)
        .map_err(|error| refused("untie a write from an event", error))
}

fn ioeventfd(
    vm: &VmFd,
    doorbell: &Doorbell,
    event: BorrowedFd<'_>,
    mut flags: u32,
) -> Result<(), kvm_ioctls::Error> {
    let addr = match doorbell.address {
        DoorbellAddress::Port(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            port.into()
        }
        DoorbellAddress::Memory(address) => address,
    };
    if doorbell.value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    let request = kvm_ioeventfd {
        datamatch: doorbell.value.unwrap_or(0),
        addr,
        len: doorbell.size.unwrap_or(0).into(),
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: the descriptor is a VM's, and the kernel reads the structure, which
    // outlives the call, and writes nothing.
    let result = unsafe { vmm_sys_util::ioctl::ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) };
    if result == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()) }
}
