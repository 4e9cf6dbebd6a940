//! What the run loop of one vCPU counts.

use std::sync::atomic::{AtomicU64, Ordering};

use tetrarch_engine::Exit;

use crate::Handler;

/// A counter with one writer, the thread of its vCPU, and any readers: a load
/// and a store instead of a locked read-modify-write.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn add(&self, value: u64) {
        self.set(self.get().wrapping_add(value));
    }
}

/// Counters of one vCPU's run loop, readable from any thread at any time.
#[derive(Default)]
pub struct LoopCounters {
    port_in: Counter,
    port_out: Counter,
    mmio_read: Counter,
    mmio_write: Counter,
    halt: Counter,
    shutdown: Counter,
    kicked: Counter,
    hypercall: Counter,
    msr_read: Counter,
    msr_write: Counter,
    port_with_registers: Counter,
    trap: Counter,
    debug: Counter,
    nobody: Counter,
    native: Counter,
    python: Counter,
    port_in_ticks: Counter,
    port_out_ticks: Counter,
    mmio_read_ticks: Counter,
    mmio_write_ticks: Counter,
    native_ticks: Counter,
    python_ticks: Counter,
    pub(crate) run_ticks: Counter,
}

/// A copy of [`LoopCounters`]; times in ticks of the host's TSC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopStats {
    pub port_in: u64,
    pub port_out: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub halt: u64,
    pub shutdown: u64,
    pub kicked: u64,
    pub hypercall: u64,
    pub msr_read: u64,
    pub msr_write: u64,
    pub port_with_registers: u64,
    pub trap: u64,
    pub debug: u64,
    /// Accesses that no device claimed.
    pub nobody: u64,
    /// Accesses answered by devices in Rust, and by devices in Python.
    pub native: u64,
    pub python: u64,
    /// From an exit to its answer, by kind.
    pub port_in_ticks: u64,
    pub port_out_ticks: u64,
    pub mmio_read_ticks: u64,
    pub mmio_write_ticks: u64,
    pub native_ticks: u64,
    pub python_ticks: u64,
    /// All time in the run loop, guest and devices.
    pub run_ticks: u64,
}

impl LoopCounters {
    pub(crate) fn count(&self, exit: &Exit) {
        let counter = match exit {
            Exit::PortIn { .. } => &self.port_in,
            Exit::PortOut { .. } => &self.port_out,
            Exit::MmioRead { .. } => &self.mmio_read,
            Exit::MmioWrite { .. } => &self.mmio_write,
            Exit::Halt => &self.halt,
            Exit::Shutdown => &self.shutdown,
            Exit::Kicked => &self.kicked,
            Exit::Hypercall { .. } => &self.hypercall,
            Exit::MsrRead { .. } => &self.msr_read,
            Exit::MsrWrite { .. } => &self.msr_write,
            Exit::PortWithRegisters { .. } => &self.port_with_registers,
            Exit::Trap(_) => &self.trap,
            Exit::Debug(_) => &self.debug,
        };
        counter.add(1);
    }

    pub(crate) fn count_access(&self, exit: &Exit, by: Handler, ticks: u64) {
        let spent = match exit {
            Exit::PortIn { .. } => Some(&self.port_in_ticks),
            Exit::PortOut { .. } => Some(&self.port_out_ticks),
            Exit::MmioRead { .. } => Some(&self.mmio_read_ticks),
            Exit::MmioWrite { .. } => Some(&self.mmio_write_ticks),
            Exit::Halt
            | Exit::Shutdown
            | Exit::Kicked
            | Exit::Hypercall { .. }
            | Exit::MsrRead { .. }
            | Exit::MsrWrite { .. }
            | Exit::PortWithRegisters { .. }
            | Exit::Trap(_)
            | Exit::Debug(_) => None,
        };
        if let Some(spent) = spent {
            spent.add(ticks);
        }
        match by {
            Handler::Nobody => self.nobody.add(1),
            Handler::Native => {
                self.native.add(1);
                self.native_ticks.add(ticks);
            }
            Handler::Python => {
                self.python.add(1);
                self.python_ticks.add(ticks);
            }
        }
    }

    pub fn stats(&self) -> LoopStats {
        LoopStats {
            port_in: self.port_in.get(),
            port_out: self.port_out.get(),
            mmio_read: self.mmio_read.get(),
            mmio_write: self.mmio_write.get(),
            halt: self.halt.get(),
            shutdown: self.shutdown.get(),
            kicked: self.kicked.get(),
            hypercall: self.hypercall.get(),
            msr_read: self.msr_read.get(),
            msr_write: self.msr_write.get(),
            port_with_registers: self.port_with_registers.get(),
            trap: self.trap.get(),
            debug: self.debug.get(),
            nobody: self.nobody.get(),
            native: self.native.get(),
            python: self.python.get(),
            port_in_ticks: self.port_in_ticks.get(),
            port_out_ticks: self.port_out_ticks.get(),
            mmio_read_ticks: self.mmio_read_ticks.get(),
            mmio_write_ticks: self.mmio_write_ticks.get(),
            native_ticks: self.native_ticks.get(),
            python_ticks: self.python_ticks.get(),
            run_ticks: self.run_ticks.get(),
        }
    }
}
