//! `tetrarch._native.IdeChannels`: an IDE controller behind its ports.

use std::sync::Arc;

use pyo3::prelude::*;
use tetrarch_storage::ide::{CHANNELS, ControlPort, DRIVES, Ide, MasterPorts, Saved, TaskPorts};

use crate::ata::AtaDrive;
use crate::error::Failure;
use crate::irq::drive;
use crate::rust_device::RustDevice;
use crate::saved::saved_state;
use crate::virtio::no_io;
use crate::vm::Vm;

/// Two channels, and the drives at them.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct IdeChannels(Arc<Ide>);

saved_state!(State of Saved {
    channels: Vec<Vec<u64>>,
    buffers: Vec<Vec<u64>>,
    drives: Vec<Vec<u64>>,
});

#[pymethods]
impl IdeChannels {
    #[classattr]
    const CHANNELS: usize = CHANNELS;
    #[classattr]
    const DRIVES: usize = DRIVES;

    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        drives: Vec<Option<AtaDrive>>,
        lines: (Bound<'_, PyAny>, Bound<'_, PyAny>),
    ) -> Result<Self, Failure> {
        if drives.len() > CHANNELS * DRIVES {
            let (count, most) = (drives.len(), CHANNELS * DRIVES);
            return Err(Failure::refused(format!("{name}: {count} drives of at most {most}")));
        }
        let machine = &vm.get().machine;
        let drives = drives
            .into_iter()
            .map(|drive| {
                drive.map(|drive| Ok((drive.name.clone(), drive.open(false)?))).transpose()
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        let lines = [drive(&lines.0)?, drive(&lines.1)?];
        let ide = Ide::new(&machine.io, &machine.memory, name, drives, lines);
        Ok(Self(Arc::new(ide.map_err(|error| no_io(name, &error))?)))
    }

    /// The eight ports of a channel's devices.
    fn task_ports(&self, channel: usize) -> RustDevice {
        RustDevice::new(Arc::new(TaskPorts(Arc::clone(&self.0), channel)))
    }

    /// The port of a channel's alternate status and control.
    fn control_port(&self, channel: usize) -> RustDevice {
        RustDevice::new(Arc::new(ControlPort(Arc::clone(&self.0), channel)))
    }

    /// The ports of the bus masters.
    fn master_ports(&self) -> RustDevice {
        RustDevice::new(Arc::new(MasterPorts(Arc::clone(&self.0))))
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// Whether bus masters may access memory.
    fn set_master(&self, py: Python<'_>, master: bool) {
        py.detach(|| self.0.set_master(master));
    }

    fn save(&self, py: Python<'_>) -> State {
        py.detach(|| self.0.save()).into()
    }

    fn load(&self, py: Python<'_>, state: State) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.load(&state.into()))?)
    }

    /// Requests that wait for the host to be mended.
    #[getter]
    fn stopped(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.stopped())
    }

    /// Lets go of the disks.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}
