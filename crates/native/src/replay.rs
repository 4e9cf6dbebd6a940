//! A machine that replays, as a debugger in Python goes through it.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use tetrarch_engine::{EngineError, Met, Passed, Seek};

use crate::error::Failure;
use crate::vm::Vm;

#[pyclass(frozen, module = "tetrarch._native")]
pub struct Replay {
    vm: Py<Vm>,
}

impl Replay {
    pub fn new(vm: Py<Vm>) -> Self {
        Self { vm }
    }

    fn engine(&self) -> Result<&dyn tetrarch_engine::Replay, Failure> {
        let none = || EngineError::Internal("the machine does not replay".into());
        Ok(self.vm.get().machine.engine.replay().ok_or_else(none)?)
    }
}

#[pymethods]
impl Replay {
    #[getter]
    fn count(&self) -> Result<u64, Failure> {
        Ok(self.engine()?.count())
    }

    fn seek(&self, count: u64, start: u64, noted_before: u64) -> Result<(), Failure> {
        self.engine()?.seek(Seek { count, from: start, noted_before });
        Ok(())
    }

    fn give_up(&self) -> Result<(), Failure> {
        self.engine()?.give_up();
        Ok(())
    }

    #[getter]
    fn passed(&self) -> Result<(u64, Option<(u64, u8)>), Failure> {
        let Passed { began, last_met } = self.engine()?.passed();
        Ok((began, last_met.map(|Met { count, hits }| (count, hits))))
    }

    fn set_breakpoints(&self, addresses: Vec<u64>) -> Result<(), Failure> {
        self.engine()?.set_breakpoints(&addresses);
        Ok(())
    }

    fn set_stay(&self, stay: bool) -> Result<(), Failure> {
        self.engine()?.stay(stay);
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}
