//! What this host's KVM is worth, as dictionaries.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tetrarch_engine_kvm::{capabilities, probe};

/// Runs a small guest on the device; some milliseconds.
pub fn kvm_probe<'py>(py: Python<'py>, device: &str) -> PyResult<Bound<'py, PyDict>> {
    let seen = py.detach(|| probe(device));
    let result = PyDict::new(py);
    let reason = seen.reason.as_ref().map(|reason| (&reason.cause, &reason.mend));
    result.set_item("reason", reason)?;
    result.set_item("runs", seen.runs)?;
    result.set_item("hardware", seen.hardware_backed())?;
    result.set_item("guest_rate", seen.guest_rate)?;
    result.set_item("host_rate", seen.host_rate)?;
    result.set_item("max_vcpus", seen.max_vcpus)?;
    result.set_item("nested", seen.nested)?;
    result.set_item("seconds", seen.took.as_secs_f64())?;
    Ok(result)
}

/// (name, there or not, what is lost without it).
pub fn kvm_capabilities(device: &str) -> Vec<(&'static str, bool, &'static str)> {
    let found = capabilities(device).unwrap_or_default();
    found.iter().map(|cap| (cap.name, cap.present(), cap.lost)).collect()
}
