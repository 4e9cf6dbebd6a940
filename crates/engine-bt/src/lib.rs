//! Engine `bt`: x86-64 on x86-64 in user space, by binary translation.
//!
//! It implements the contract of `tetrarch-engine` with no help from the host's
//! kernel: CPU, MMU, local APIC, IOAPIC, PIC and PIT. It knows neither devices
//! nor Python.
//!
//! The way of an instruction: [`exec`] (run loop) → [`translate`] (translated
//! code) or [`interp`] → [`memory`] (page walk, TLB) → an exit. [`cpu`] holds the
//! architectural state, [`irqchip`] the interrupt controllers, [`kvm`] what KVM
//! adds to them for its guests, [`host`] what the host's kernel is asked for.

mod chipset;
mod cpu;
mod doorbells;
mod exec;
mod host;
mod interp;
pub mod irqchip;
mod irqfd;
mod kvm;
mod lines;
mod memory;
mod translate;
mod vm;

pub use vm::{Config, MAX_VCPUS, available, create_vm};
