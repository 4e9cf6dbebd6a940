//! `tetrarch._native.PixelFormat` and `vnc_answer`: what viewers of a screen are sent.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_display::{Channel, Part};

/// Points as a viewer wants them.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct PixelFormat(tetrarch_display::PixelFormat);

#[pymethods]
impl PixelFormat {
    #[new]
    fn new(bits: u8, big_endian: bool, maxima: [u16; 3], shifts: [u8; 3]) -> PyResult<Self> {
        let channel = |index: usize| Channel { max: maxima[index], shift: shifts[index] };
        let rgb = [channel(0), channel(1), channel(2)];
        let format = tetrarch_display::PixelFormat::new(bits, big_endian, rgb);
        format.map(Self).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn raw<'py>(
        &self,
        py: Python<'py>,
        frame: &[u8],
        width: usize,
        place: [usize; 4],
    ) -> PyResult<Bound<'py, PyBytes>> {
        let part = part(frame, width, place)?;
        Ok(PyBytes::new(py, &py.detach(|| self.0.raw(&part))))
    }

    fn tiles<'py>(
        &self,
        py: Python<'py>,
        frame: &[u8],
        width: usize,
        place: [usize; 4],
    ) -> PyResult<Bound<'py, PyBytes>> {
        let part = part(frame, width, place)?;
        Ok(PyBytes::new(py, &py.detach(|| self.0.tiles(&part))))
    }
}

fn part(frame: &[u8], width: usize, place: [usize; 4]) -> PyResult<Part<'_>> {
    let outside = || PyValueError::new_err(format!("{place:?} is no part of the frame"));
    Part::new(frame, width, place).ok_or_else(outside)
}
