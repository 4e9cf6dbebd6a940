//! `tetrarch._native.VirtioConsole`.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_io::Output;
use tetrarch_virtio::console::{MAX_PORTS, PortKind, PortState, queues};
use tetrarch_virtio::{Console, Device};

use crate::error::Failure;
use crate::saved::saved_state;
use crate::virtio::{VirtioDevice, no_io};
use crate::vm::Vm;

/// The console device.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioConsole {
    device: Arc<Device<Console>>,
    outputs: Vec<Arc<Output>>,
}

#[pymethods]
impl VirtioConsole {
    #[classattr]
    const MAX_PORTS: usize = MAX_PORTS;

    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        ports: Vec<String>,
        multiport: bool,
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let count = ports.len();
        if !(1..=MAX_PORTS).contains(&count) {
            return Err(Failure::refused(format!("{name}: {count} ports of 1 to {MAX_PORTS}")));
        }
        let kind = |name: String| {
            if name.is_empty() { PortKind::Console } else { PortKind::Named(name) }
        };
        let path = Console::new(ports.into_iter().map(kind).collect())
            .map_err(|error| no_io(name, &error))?;
        let outputs = (0..count).filter_map(|port| path.output(port)).collect();
        let (base, device) = VirtioDevice::make(vm, name, queues(count, multiport), path)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self { device, outputs }))
    }

    fn receive(&self, py: Python<'_>, port: usize, data: &[u8]) {
        py.detach(|| self.device.apply(|path, queues| path.receive(queues, port, data)));
    }

    fn queued(&self, py: Python<'_>, port: usize) -> usize {
        py.detach(|| self.device.with_path(|path, _| path.queued(port)))
    }

    fn wait_output<'py>(
        &self,
        py: Python<'py>,
        port: usize,
    ) -> Result<Bound<'py, PyBytes>, Failure> {
        let output = self.output(port)?;
        Ok(PyBytes::new(py, &py.detach(|| output.wait())))
    }

    fn flush_output(&self, py: Python<'_>, port: usize, timeout: f64) -> Result<bool, Failure> {
        let output = self.output(port)?;
        let timeout = Duration::try_from_secs_f64(timeout)
            .map_err(|error| Failure::refused(format!("a timeout of {timeout} s: {error}")))?;
        Ok(py.detach(|| output.flush(timeout)))
    }

    fn end_output(&self, py: Python<'_>, port: usize) -> Result<(), Failure> {
        let output = self.output(port)?;
        py.detach(|| output.end());
        Ok(())
    }

    fn resize(&self, py: Python<'_>, port: usize, columns: u16, rows: u16) {
        py.detach(|| {
            self.device.apply(|path, queues| path.resize(queues, port, (columns, rows)));
        });
    }

    fn emergency(&self, py: Python<'_>, character: u8) {
        py.detach(|| self.device.with_path(|path, _| path.emergency(character)));
    }

    fn states(&self, py: Python<'_>) -> Vec<State> {
        let states = py.detach(|| self.device.with_path(|path, _| path.states()));
        states.into_iter().map(State::from).collect()
    }

    fn set_states(&self, py: Python<'_>, states: Vec<State>) {
        let states = states.into_iter().map(PortState::from).collect();
        py.detach(|| self.device.with_path(|path, _| path.set_states(states)));
    }
}

impl VirtioConsole {
    fn output(&self, port: usize) -> Result<&Output, Failure> {
        let found = self.outputs.get(port).map(|output| &**output);
        found.ok_or_else(|| Failure::refused(format!("there is no port {port}")))
    }
}

saved_state!(State of PortState {
    input: Vec<u8>,
    sent: u32,
    known: bool,
    open: bool,
    due: u8,
});
