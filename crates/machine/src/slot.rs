//! The place of a vCPU in its machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tetrarch_bus::{DeviceError, PlatformHandlers, RunEnd, RunError, VcpuControl, run_vcpu};
use tetrarch_engine::{Counters, EngineError, Vcpu};

use crate::Machine;

/// How long a vCPU that runs has to tell its counters.
const PATIENCE: Duration = Duration::from_millis(100);

/// One vCPU and whoever uses it at the time.
///
/// Lock: `vcpu` is held for a whole run, but not while the machine is held; all
/// others hold the machine first.
pub struct VcpuSlot {
    pub id: u32,
    pub control: Arc<VcpuControl>,
    vcpu: Mutex<Box<dyn Vcpu>>,
    running: AtomicBool,
}

/// Marks a vCPU as running while it lives.
struct Running<'a>(&'a VcpuSlot);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

impl VcpuSlot {
    pub(crate) fn new(id: u32, vcpu: Box<dyn Vcpu>, control: Arc<VcpuControl>) -> Self {
        control.engine_counters.tell(vcpu.counters());
        Self { id, control, vcpu: Mutex::new(vcpu), running: AtomicBool::new(false) }
    }

    fn busy(&self) -> EngineError {
        EngineError::Refused(format!("vCPU {} is running", self.id))
    }

    /// Uses a vCPU of a machine that is held.
    pub(crate) fn with<T>(&self, body: impl FnOnce(&mut dyn Vcpu) -> T) -> T {
        body(&mut **self.vcpu.lock())
    }

    /// The run loop; to be called by who holds no lock that a device may want.
    pub fn run(
        &self,
        machine: &Machine,
        platform: &dyn PlatformHandlers,
        on_kick: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<RunEnd, RunError> {
        if self.running.swap(true, Ordering::Acquire) {
            return Err(self.busy().into());
        }
        let _running = Running(self);
        if let Some(stolen) = machine.stolen_time() {
            stolen.runs_here(self.id);
        }
        let result =
            run_vcpu(&self.vcpu, &machine.bus, platform, &machine.control, &self.control, on_kick);
        self.control.engine_counters.tell(self.vcpu.lock().counters());
        result
    }

    /// Whether it is in the machine; of one that nobody runs, so that no machine has to be held.
    pub fn set_present(&self, present: bool) -> Result<(), EngineError> {
        if self.running.load(Ordering::Acquire) {
            return Err(self.busy());
        }
        self.with(|vcpu| vcpu.set_present(present));
        Ok(())
    }

    /// The engine's counters: now, or the last that were told where the vCPU does not come out
    /// of a device in time.
    pub fn counters(&self) -> Counters {
        match self.vcpu.try_lock() {
            Some(vcpu) => vcpu.counters(),
            None => self.control.ask_engine_counters(PATIENCE),
        }
    }
}
