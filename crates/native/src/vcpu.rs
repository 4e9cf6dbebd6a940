//! `tetrarch._native.Vcpu`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_bus::{DeviceError, PlatformHandlers, RunEnd, RunError};
use tetrarch_engine::{EngineError, Saved, VcpuState};
use tetrarch_machine::{Machine, State, VcpuSlot, dump};

use crate::debug::guest_debug;
use crate::error::Failure;
use crate::vm::Vm;

/// How long Ctrl-C may go unnoticed when a vCPU runs on Python's main thread.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

/// One virtual CPU.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Vcpu {
    vm: Py<Vm>,
    slot: Arc<VcpuSlot>,
}

impl Vcpu {
    pub fn new(vm: Py<Vm>, slot: Arc<VcpuSlot>) -> Self {
        Self { vm, slot }
    }

    fn with<T: Send>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&mut dyn tetrarch_engine::Vcpu) -> T + Send,
    ) -> Result<T, Failure> {
        let (slot, machine) = (&self.slot, &self.vm.get().machine);
        Ok(py.detach(|| machine.with_vcpu(slot, body))?)
    }
}

#[pymethods]
impl Vcpu {
    fn run(&self, py: Python<'_>) -> Result<&'static str, Failure> {
        let on_main_thread = on_main_thread(py)?;
        let (slot, machine) = (&self.slot, &self.vm.get().machine);
        let platform = Vm::handlers(&self.vm, py, slot.id);
        let reason = py.detach(|| {
            if on_main_thread {
                run_with_signals(slot, machine, &platform)
            } else {
                slot.run(machine, &platform, &mut || Ok(()))
            }
        })?;
        Ok(match reason {
            RunEnd::Halted => "halted",
            RunEnd::Shutdown => "shutdown",
            RunEnd::Stopped => "stopped",
        })
    }

    fn regs(&self, py: Python<'_>) -> Result<BTreeMap<String, u64>, Failure> {
        Ok(self.with(py, |vcpu| State::of(vcpu))??.values())
    }

    fn set_regs(&self, py: Python<'_>, values: BTreeMap<String, u64>) -> Result<(), Failure> {
        self.with(py, |vcpu| {
            let old = State::of(vcpu)?;
            let mut new = old;
            new.set(values).map_err(Failure::refused)?;
            Ok(new.store(&old, vcpu)?)
        })?
    }

    fn dump(&self, py: Python<'_>) -> Result<String, Failure> {
        Ok(self.with(py, dump)??)
    }

    fn translate(&self, py: Python<'_>, linear: u64) -> Result<Option<u64>, Failure> {
        Ok(self.with(py, |vcpu| vcpu.translate(linear))?.map(|physical| physical.0))
    }

    fn xsave<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Failure> {
        let image = self.with(py, |vcpu| vcpu.xsave())??;
        Ok(PyBytes::new(py, &image))
    }

    fn set_xsave(&self, py: Python<'_>, image: &[u8]) -> Result<(), Failure> {
        Ok(self.with(py, |vcpu| vcpu.set_xsave(image))??)
    }

    fn msr(&self, py: Python<'_>, index: u32) -> Result<Option<u64>, Failure> {
        Ok(self.with(py, |vcpu| vcpu.msr(index))??)
    }

    fn set_msr(&self, py: Python<'_>, index: u32, value: u64) -> Result<bool, Failure> {
        Ok(self.with(py, |vcpu| vcpu.set_msr(index, value))??)
    }

    #[pyo3(signature = (*, step = false, block_interrupts = true, software = false, hardware = None))]
    fn set_debug(
        &self,
        py: Python<'_>,
        step: bool,
        block_interrupts: bool,
        software: bool,
        hardware: Option<Vec<(String, u64, u8)>>,
    ) -> Result<(), Failure> {
        let debug = guest_debug(step, block_interrupts, software, &hardware.unwrap_or_default())?;
        Ok(self.with(py, |vcpu| vcpu.set_guest_debug(&debug))??)
    }

    fn set_frozen(&self, py: Python<'_>, frozen: bool) -> Result<(), Failure> {
        let (control, slot) = (&self.vm.get().machine.control, &self.slot);
        self.with(py, |_| control.set_frozen(&slot.control, frozen))
    }

    fn set_present(&self, py: Python<'_>, present: bool) -> Result<(), Failure> {
        Ok(py.detach(|| self.slot.set_present(present))?)
    }

    fn save_state<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Failure> {
        let state = self.with(py, |vcpu| vcpu.save())??;
        Ok(PyBytes::new(py, &state.to_bytes().map_err(EngineError::from)?))
    }

    fn load_state(&self, py: Python<'_>, data: &[u8]) -> Result<(), Failure> {
        let state = VcpuState::from_bytes(data).map_err(EngineError::from)?;
        Ok(self.with(py, |vcpu| vcpu.load(&state))??)
    }

    fn __repr__(&self) -> String {
        format!("<tetrarch._native.Vcpu {}>", self.slot.id)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}

/// Python handles signals on its main thread alone.
fn on_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    threading.call_method0("get_ident")?.eq(main)
}

/// Runs a vCPU on the main thread. A signal's handler must run here, so the
/// guest is left now and then to let it.
fn run_with_signals(
    slot: &VcpuSlot,
    machine: &Machine,
    platform: &dyn PlatformHandlers,
) -> Result<RunEnd, RunError> {
    let mut check = || match Python::try_attach(|py| py.check_signals()) {
        Some(Err(raised)) => Err(DeviceError::new(raised)),
        _ => Ok(()),
    };
    std::thread::scope(|scope| {
        // Dropped on every way out of this closure, which ends the ticker.
        let (_end, ended) = channel::<()>();
        let ticker = move || {
            while ended.recv_timeout(SIGNAL_CHECK) == Err(RecvTimeoutError::Timeout) {
                slot.control.kick();
            }
        };
        std::thread::Builder::new()
            .name("tetrarch-signals".into())
            .spawn_scoped(scope, ticker)
            .map_err(|error| EngineError::Unavailable(format!("no thread to be had: {error}")))?;
        slot.run(machine, platform, &mut check)
    })
}
