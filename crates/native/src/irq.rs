//! `tetrarch._native.IrqSource`: one device's wire to an interrupt line.

use std::sync::Arc;

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
