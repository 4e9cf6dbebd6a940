//! `tetrarch._native.IrqSource`: one device's wire to an interrupt line.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// One source of an interrupt line, which is high while any of its sources is.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct IrqSource(pub Arc<tetrarch_bus::IrqSource>);

// Attached, unlike a write to memory: the locks of the line and of the
// controllers are held for a few instructions, and never by who waits for the
// interpreter.
#[pymethods]
impl IrqSource {
    #[getter]
    fn gsi(&self) -> u32 {
        self.0.gsi()
    }

    fn set(&self, level: bool) {
        self.0.set(level);
    }

    fn pulse(&self) {
        self.0.pulse();
    }

    fn __repr__(&self) -> String {
        format!("<tetrarch._native.IrqSource of line {}>", self.0.gsi())
    }
}

/// A PCI function's interrupt line, between its device and the wire of its slot.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Intx(Arc<tetrarch_devices::Intx>);

#[pymethods]
impl Intx {
    #[new]
    fn new() -> Self {
        Self(Arc::default())
    }

    fn set(&self, py: Python<'_>, level: bool) {
        py.detach(|| self.0.set(level));
    }

    fn set_disabled(&self, py: Python<'_>, disabled: bool) {
        py.detach(|| self.0.set_disabled(disabled));
    }

    fn connect(&self, py: Python<'_>, wire: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let wire = wire.map(drive).transpose()?;
        py.detach(|| self.0.connect(wire));
        Ok(())
    }

    #[getter]
    fn level(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.level())
    }
}

/// A wire of the machine's is driven as it is; a stand-in for one in Python is called.
pub fn drive(wire: &Bound<'_, PyAny>) -> PyResult<Box<dyn Fn(bool) + Send + Sync>> {
    if let Ok(source) = wire.cast::<IrqSource>() {
        let source = Arc::clone(&source.get().0);
        return Ok(Box::new(move |level| source.set(level)));
    }
    if let Ok(line) = wire.cast::<Intx>() {
        let line = Arc::clone(&line.get().0);
        return Ok(Box::new(move |level| line.set(level)));
    }
    let set = match wire.getattr_opt("set")? {
        Some(set) if set.is_callable() => set.unbind(),
        _ => {
            let kind = wire.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("{kind} is no wire: it has no method 'set'")));
        }
    };
    Ok(Box::new(move |level| {
        // An ending process has no interpreter any more, and no use for the level.
        Python::try_attach(|py| {
            if let Err(error) = set.call1(py, (level,)) {
                error.write_unraisable(py, Some(set.bind(py)));
            }
        });
    }))
}
