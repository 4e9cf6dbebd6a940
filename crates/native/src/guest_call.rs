//! What a platform's handlers see: the vCPU at the exit, and what it did.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use pyo3::exceptions::PyKeyError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tetrarch_engine::{Registers, Vcpu};
use tetrarch_machine::State;

use crate::error::{Failure, GuestFault};
use crate::vm::Vm;

/// Longest piece of guest memory that a handler reads at once.
const LONGEST_READ: usize = 1 << 20;

/// Who called.
#[derive(Clone, Copy)]
pub struct Caller {
    /// Where the exit says it.
    pub cpl: Option<u8>,
    /// A trap's handler may set system registers.
    pub trapped: bool,
}

impl Caller {
    /// RDMSR and WRMSR are privileged.
    pub const KERNEL: Self = Self { cpl: Some(0), trapped: false };
}

/// The vCPU while a handler has it.
struct Borrowed {
    vcpu: *mut dyn Vcpu,
    registers: Registers,
}

// SAFETY: the pointer stands for an exclusive borrow of a `dyn Vcpu`, which is
// Send, and is used under the lock of its `GuestCall` alone.
unsafe impl Send for Borrowed {}

impl Borrowed {
    fn vcpu(&mut self) -> &mut dyn Vcpu {
        // SAFETY: `Lent` holds the borrow for as long as this exists, and `&mut
        // self` comes from the lock: nobody else has the vCPU.
        unsafe { &mut *self.vcpu }
    }

    fn state(&mut self) -> Result<State, Failure> {
        Ok(State { general: self.registers, system: self.vcpu().system_registers()? })
    }
}

/// A vCPU that waits for a handler's answer. Of use only until the handler
/// returns.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct GuestCall {
    #[pyo3(get)]
    vm: Py<Vm>,
    #[pyo3(get)]
    vcpu: u32,
    caller: Caller,
    borrowed: Mutex<Option<Borrowed>>,
}

impl GuestCall {
    fn with<T>(&self, body: impl FnOnce(&mut Borrowed) -> PyResult<T>) -> PyResult<T> {
        match &mut *self.borrowed.lock() {
            Some(borrowed) => body(borrowed),
            None => Err(Failure::refused(
                "the call is over: its vCPU went on when the handler returned",
            )
            .into()),
        }
    }
}

#[pymethods]
impl GuestCall {
    #[getter]
    fn cpl(&self) -> PyResult<u8> {
        const DPL_SHIFT: u32 = 5;
        match self.caller.cpl {
            Some(cpl) => Ok(cpl),
            None => self.with(|it| Ok((it.state()?.system.ss.attributes >> DPL_SHIFT & 3) as u8)),
        }
    }

    fn __getitem__(&self, name: &str) -> PyResult<u64> {
        self.with(|borrowed| {
            let values = borrowed.state()?.values();
            values.get(name).copied().ok_or_else(|| PyKeyError::new_err(name.to_owned()))
        })
    }

    fn __setitem__(&self, name: String, value: u64) -> PyResult<()> {
        self.with(|borrowed| {
            let old = borrowed.state()?;
            let mut new = old;
            new.set(BTreeMap::from([(name.clone(), value)])).map_err(Failure::refused)?;
            if new.system != old.system {
                if !self.caller.trapped {
                    return Err(Failure::refused(format!(
                        "{name} is a system register, which a trap hook alone can set"
                    ))
                    .into());
                }
                borrowed.vcpu().set_system_registers(&new.system).map_err(Failure::from)?;
            }
            borrowed.registers = new.general;
            Ok(())
        })
    }

    /// Guest memory at a linear address, as far as it is mapped.
    fn read<'py>(
        &self,
        py: Python<'py>,
        linear: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        if length > LONGEST_READ {
            return Err(Failure::refused(format!(
                "{length} bytes are more than the {LONGEST_READ} that can be read at once"
            ))
            .into());
        }
        let mut data = vec![0; length];
        let read = self.with(|borrowed| Ok(borrowed.vcpu().peek(linear, &mut data)))?;
        Ok(PyBytes::new(py, &data[..read]))
    }

    /// Where an access of the guest's own would go, or the fault that it would raise.
    fn access(&self, linear: u64, write: bool) -> PyResult<u64> {
        self.with(|borrowed| {
            borrowed
                .vcpu()
                .access(linear, write)
                .map(|at| at.0)
                .map_err(|fault| GuestFault::new_err((fault.vector, fault.error, fault.address)))
        })
    }

    fn __repr__(&self) -> String {
        format!("<tetrarch._native.GuestCall of vCPU {}>", self.vcpu)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}

/// A borrow of a vCPU that ends before this does, whatever the handler keeps.
pub struct Lent<'py, 'vcpu> {
    call: Bound<'py, GuestCall>,
    _vcpu: std::marker::PhantomData<&'vcpu mut dyn Vcpu>,
}

impl<'py, 'vcpu> Lent<'py, 'vcpu> {
    pub fn new(
        py: Python<'py>,
        vm: Py<Vm>,
        id: u32,
        caller: Caller,
        vcpu: &'vcpu mut dyn Vcpu,
    ) -> PyResult<Self> {
        let registers = vcpu.registers().map_err(Failure::from)?;
        let vcpu: *mut (dyn Vcpu + 'vcpu) = vcpu;
        // SAFETY: only the lifetime changes; `drop` takes the pointer back before
        // the borrow ends.
        let vcpu: *mut dyn Vcpu = unsafe { std::mem::transmute(vcpu) };
        let borrowed = Mutex::new(Some(Borrowed { vcpu, registers }));
        let call = Bound::new(py, GuestCall { vm, vcpu: id, caller, borrowed })?;
        Ok(Self { call, _vcpu: std::marker::PhantomData })
    }

    pub fn call(&self) -> &Bound<'py, GuestCall> {
        &self.call
    }

    /// Ends the call; the registers as the handler left them.
    pub fn take_back(self) -> Option<Registers> {
        self.call.get().borrowed.lock().take().map(|borrowed| borrowed.registers)
    }
}

impl Drop for Lent<'_, '_> {
    fn drop(&mut self) {
        self.call.get().borrowed.lock().take();
    }
}

/// An access to one of the platform's ports.
#[pyclass(frozen, get_all, module = "tetrarch._native")]
pub struct RegisterPortAccess {
    pub port: u16,
    pub size: u8,
    pub input: bool,
    /// INS or OUTS: all of it, REP prefix included.
    pub string: bool,
}

/// An event of a deprivileged guest.
#[pyclass(frozen, get_all, module = "tetrarch._native")]
pub struct GuestTrap {
    /// None: SYSCALL.
    pub vector: Option<u8>,
    pub error: Option<u32>,
    /// Of a page fault.
    pub address: u64,
    /// Of SYSCALL: where the guest would go on.
    pub next: Option<u64>,
}
