//! Events by which the kernel tells others of a write, and others tell it of an
//! interrupt, without a way through this process.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, KVMIO, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
    kvm_irqfd,
};
use kvm_ioctls::VmFd;
use tetrarch_engine::{Doorbell, DoorbellAddress, EngineError, Irqfd};

use crate::error::refused;

// kvm-ioctls has the size only together with a value, and takes descriptors of one
// library alone.
vmm_sys_util::ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
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

/// Lets signals of an event raise a line (api.rst, 4.75).
pub fn add_irqfd(vm: &VmFd, irqfd: &Irqfd) -> Result<(), EngineError> {
    let resample = irqfd.resample();
    let request = kvm_irqfd {
        flags: if resample.is_some() { KVM_IRQFD_FLAG_RESAMPLE } else { 0 },
        resamplefd: resample.map_or(0, |resample| resample.as_raw_fd() as u32),
        ..for_line(irqfd)
    };
    change_irqfd(vm, &request).map_err(|error| refused("tie an event to an interrupt", error))
}

/// Returns when the kernel has raised what was signalled before.
pub fn remove_irqfd(vm: &VmFd, irqfd: &Irqfd) -> Result<(), EngineError> {
    let request = kvm_irqfd { flags: KVM_IRQFD_FLAG_DEASSIGN, ..for_line(irqfd) };
    change_irqfd(vm, &request).map_err(|error| refused("untie an event from an interrupt", error))
}

fn for_line(irqfd: &Irqfd) -> kvm_irqfd {
    kvm_irqfd { fd: irqfd.event().as_raw_fd() as u32, gsi: irqfd.gsi, ..Default::default() }
}

fn change_irqfd(vm: &VmFd, request: &kvm_irqfd) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the descriptor is a VM's, and the kernel reads the structure, which
    // outlives the call, and writes nothing.
    let result = unsafe { vmm_sys_util::ioctl::ioctl_with_ref(vm, KVM_IRQFD(), request) };
    if result == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()) }
}
