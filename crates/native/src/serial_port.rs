//! `tetrarch._native.SerialPort`: the UART, and the two ways of its bytes.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_devices::Registers;

use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;

/// A 16550A UART. Its state has its form, and is checked, in Python
/// (`tetrarch.devices.uart16550`), since a machine saves and loads it as a whole.
// Each method lets go of the interpreter: what drives the wire may want it.
#[pyclass(frozen, subclass, extends = RustDevice, module = "tetrarch._native")]
pub struct SerialPort {
    port: Arc<tetrarch_devices::SerialPort>,
}

#[pymethods]
impl SerialPort {
    #[new]
    fn new(wire: &Bound<'_, PyAny>) -> PyResult<PyClassInitializer<Self>> {
        let port = Arc::new(tetrarch_devices::SerialPort::new(drive(wire)?));
        let base = RustDevice::new(port.clone());
        Ok(PyClassInitializer::from(base).add_subclass(Self { port }))
    }

    fn receive(&self, py: Python<'_>, data: &[u8]) {
        py.detach(|| self.port.receive(data));
    }

    #[getter]
    fn queued(&self, py: Python<'_>) -> usize {
        py.detach(|| self.port.queued())
    }

    fn take_output<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.port.output().take()))
    }

    fn wait_output<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.port.output().wait()))
    }

    fn flush_output(&self, py: Python<'_>, timeout: f64) -> Result<bool, Failure> {
        let timeout = Duration::try_from_secs_f64(timeout)
            .map_err(|error| Failure::refused(format!("a timeout of {timeout} s: {error}")))?;
        Ok(py.detach(|| self.port.output().flush(timeout)))
    }

    fn end_output(&self, py: Python<'_>) {
        py.detach(|| self.port.output().end());
    }

    fn registers(&self, py: Python<'_>) -> State {
        py.detach(|| self.port.registers()).into()
    }

    fn set_registers(&self, py: Python<'_>, values: State) {
        py.detach(|| self.port.set_registers(values.into()));
    }
}

/// `Registers`, as a dictionary.
#[derive(FromPyObject, IntoPyObject)]
#[pyo3(from_item_all)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    mcr_written: bool,
    polls: u8,
    overrun: bool,
    msr_delta: u8,
    scr: u8,
    divisor: u16,
    thre_pending: bool,
    rx: Vec<u16>,
    line: Vec<u8>,
}

impl From<Registers> for State {
    fn from(from: Registers) -> Self {
        Self {
            ier: from.ier,
            fcr: from.fcr,
            lcr: from.lcr,
            mcr: from.mcr,
            mcr_written: from.mcr_written,
            polls: from.polls,
            overrun: from.overrun,
            msr_delta: from.msr_delta,
            scr: from.scr,
            divisor: from.divisor,
            thre_pending: from.thre_pending,
            rx: from.rx.into(),
            line: from.line.into(),
        }
    }
}

impl From<State> for Registers {
    fn from(from: State) -> Self {
        Self {
            ier: from.ier,
            fcr: from.fcr,
            lcr: from.lcr,
            mcr: from.mcr,
            mcr_written: from.mcr_written,
            polls: from.polls,
            overrun: from.overrun,
            msr_delta: from.msr_delta,
            scr: from.scr,
            divisor: from.divisor,
            thre_pending: from.thre_pending,
            rx: from.rx.into(),
            line: from.line.into(),
        }
    }
}
