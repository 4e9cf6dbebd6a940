//! Engine `bt`: x86-64 on x86-64 in user space, by binary translation.
//!
//! It implements the contract of `tetrarch-engine` with no help from the host's
//! kernel: CPU, MMU, local APIC, IOAPIC, PIC and PIT. It knows neither devices
//! nor Python.
//!
//! The way of an instruction: [`vcpu`] (run loop) → [`translate`] (translated
//! code) or [`interp`] → [`mmu`] and [`tlb`] (memory) → an exit.

mod block;
mod codemap;
mod cpu;
mod cpuid;
mod exception;
mod fault;
mod fpu;
mod interp;
pub mod irqchip;
mod mmu;
mod msr;
mod replay;
mod signals;
mod state;
mod timer;
mod tlb;
mod translate;
mod vcpu;
mod vm;
mod wake;

pub use vm::{Config, MAX_VCPUS, available, create_vm};
