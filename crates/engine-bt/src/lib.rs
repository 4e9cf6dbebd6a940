//! Engine `bt`: x86-64 on x86-64 in user space, by binary translation.
//!
//! It implements the contract of `tetrarch-engine` with no help from the host's
//! kernel: CPU, MMU, local APIC, IOAPIC, PIC and PIT. It knows neither devices
//! nor Python.
//!
//! The way of an instruction: [`exec`] (run loop) → [`translate`] (translated
//! code) or [`interp`] → [`cpu`] (page walk, what is not RAM) → an exit. Below
//! them are [`kvm`], what KVM adds to a CPU for its guests; [`memory`], the TLB and
//! what is kept of guest memory; [`host`], what the host's kernel is asked for;
//! [`irqchip`], the interrupt controllers; [`state`], what a vCPU is, as data. A
//! module knows those below it only. [`journal`] is what a machine that is recorded, or
//! replayed, has between itself and all that is outside.

mod cpu;
mod doorbells;
mod exec;
mod host;
mod interp;
pub mod irqchip;
mod irqfd;
mod journal;
mod kvm;
mod lines;
mod memory;
mod state;
mod translate;
mod vm;

pub use vm::{Config, MAX_VCPUS, Recording, available, create_recorded_vm, create_vm};
