//! Engine `kvm`: the contract of `tetrarch-engine` by ioctl on /dev/kvm.
//!
//! The kernel holds CPU, MMU, local APICs, I/O APIC, PICs and PIT
//! (Documentation/virt/kvm/api.rst); this crate makes them, wires them like a
//! PC and turns what KVM_RUN reports into the contract's exits. It knows
//! neither devices nor Python.
//!
//! The way of an exit: [`vcpu`] (run loop) → [`exit`] (what the kernel wrote
//! into `kvm_run`, as a value) → one [`tetrarch_engine::Exit`] at a time.

mod capabilities;
mod chipset;
mod cpuid;
mod debug;
mod dirty;
mod error;
mod eventfd;
mod exit;
mod halt;
mod host;
mod irqchip;
mod kick;
mod memory_changes;
mod msr;
mod platform;
mod probe;
mod saved;
mod shared;
mod slots;
mod state;
mod time;
mod vcpu;
mod vm;

pub use capabilities::{Capability, capabilities};
pub use dirty::DirtyTracking;
pub use host::{DEVICE, available};
pub use probe::{Probe, probe};
pub use vcpu::KvmVcpu;
pub use vm::{Config, KvmVm, create_vm};
