//! Platforms written in Python: what the engine is told, and the handlers.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyRange};
use tetrarch_bus::{Answered, Handler, NoHandlers, PlatformHandlers, PortAccess};
use tetrarch_engine::{
    CpuidLeaf, GuestFault as Fault, Hypercalls, Platform, RegisterPorts, Registers, Reply, Trap,
    Traps, Vcpu,
};

use crate::error::guest_fault;
use crate::guest_call::{Caller, GuestCall, GuestTrap, Lent, RegisterPortAccess};
use crate::python_device::{Crossings, attached};
use crate::vm::Vm;
use crate::xen::XenDomain;

/// The handlers of a `tetrarch.platforms.Platform`, looked up once.
#[derive(Default)]
pub struct PythonPlatform {
    hypercall: Option<Py<PyAny>>,
    /// Asked first.
    xen: Option<XenDomain>,
    msrs: Vec<Msr>,
    ports: Vec<(RangeInclusive<u16>, Py<PyAny>)>,
    trap: Option<Py<PyAny>>,
}

// Encoding order, as in `Registers::gpr`.
const RAX: usize = 0;
const RDX: usize = 2;

struct Msr {
    indices: RangeInclusive<u32>,
    read: Option<Py<PyAny>>,
    write: Option<Py<PyAny>>,
}

fn callable(object: &Bound<'_, PyAny>, what: &str) -> PyResult<Option<Py<PyAny>>> {
    if object.is_none() {
        return Ok(None);
    }
    if !object.is_callable() {
        let kind = object.get_type().qualname()?;
        return Err(PyTypeError::new_err(format!("{what} is {kind}, which cannot be called")));
    }
    Ok(Some(object.clone().unbind()))
}

/// The numbers of an int or of a range with step 1.
fn numbers<T: TryFrom<u64> + Copy>(
    key: &Bound<'_, PyAny>,
    what: &str,
) -> PyResult<RangeInclusive<T>> {
    let refused = || PyValueError::new_err(format!("{key} is no {what}, and no range of them"));
    let number = |value: u64| T::try_from(value).map_err(|_| refused());
    if let Ok(range) = key.cast::<PyRange>() {
        let end = |name| range.getattr(name)?.extract::<u64>();
        let (start, stop, step) = (end("start")?, end("stop")?, end("step")?);
        if step != 1 || start >= stop {
            return Err(refused());
        }
        return Ok(number(start)?..=number(stop - 1)?);
    }
    let value = number(key.extract().map_err(|_| refused())?)?;
    Ok(value..=value)
}

/// A key of `cpuid`: a leaf, or a leaf with its subleaf.
fn leaf_key(key: &Bound<'_, PyAny>) -> PyResult<(u32, Option<u32>)> {
    let found = match key.extract::<(u32, u32)>() {
        Ok((leaf, subleaf)) => Ok((leaf, Some(subleaf))),
        Err(_) => key.extract::<u32>().map(|leaf| (leaf, None)),
    };
    found.map_err(|_| {
        PyValueError::new_err(format!("{key} is no CPUID leaf: an int, or (leaf, subleaf)"))
    })
}

fn cpuid(leaves: &Bound<'_, PyAny>, vcpus: u32) -> PyResult<Vec<CpuidLeaf>> {
    let mut table = Vec::new();
    for item in leaves.call_method0("items")?.try_iter()? {
        let (key, value) = item?.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        let (leaf, subleaf) = leaf_key(&key)?;
        let registers = |value: &Bound<'_, PyAny>| {
            value.extract::<(u32, u32, u32, u32)>().map(<[u32; 4]>::from).map_err(|_| {
                PyValueError::new_err(format!(
                    "CPUID leaf {leaf:#x} is not four registers of 32 bits: (eax, ebx, ecx, edx)"
                ))
            })
        };
        if value.is_callable() {
            for vcpu in 0..vcpus {
                let registers = registers(&value.call1((vcpu,))?)?;
                table.push(CpuidLeaf { leaf, subleaf, vcpu: Some(vcpu), registers });
            }
        } else {
            table.push(CpuidLeaf { leaf, subleaf, vcpu: None, registers: registers(&value)? });
        }
    }
    Ok(table)
}

impl PythonPlatform {
    /// Takes a `tetrarch.platforms.Platform` apart. Raises TypeError or ValueError.
    pub fn new(platform: &Bound<'_, PyAny>, vcpus: u32) -> PyResult<(Platform, Self)> {
        let mut data = Platform {
            kvm: platform.getattr("kvm")?.extract()?,
            cpuid: cpuid(&platform.getattr("cpuid")?, vcpus)?,
            ..Platform::default()
        };
        let mut handlers = Self::default();

        let calls = platform.getattr("hypercalls")?;
        if !calls.is_none() {
            handlers.hypercall = callable(&calls.getattr("handler")?, "a hypercall handler")?;
            handlers.xen = calls.getattr("native")?.extract()?;
            let all = calls.getattr("user_mode")?.extract()?;
            data.hypercalls = if all { Hypercalls::All } else { Hypercalls::Kernel };
        }
        for item in platform.getattr("msrs")?.call_method0("items")?.try_iter()? {
            let (key, msr) = item?.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            let indices = numbers::<u32>(&key, "MSR index")?;
            data.msrs.push(indices.clone());
            handlers.msrs.push(Msr {
                indices,
                read: callable(&msr.getattr("read")?, "the read handler of an MSR")?,
                write: callable(&msr.getattr("write")?, "the write handler of an MSR")?,
            });
        }
        for item in platform.getattr("ports")?.call_method0("items")?.try_iter()? {
            let (key, port) = item?.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            let ports = numbers::<u16>(&key, "port")?;
            let any_privilege = port.getattr("any_privilege")?.extract()?;
            data.ports.push(RegisterPorts { ports: ports.clone(), any_privilege });
            if let Some(handler) = callable(&port.getattr("handler")?, "the handler of a port")? {
                handlers.ports.push((ports, handler));
            }
        }
        let hook = platform.getattr("trap_hook")?;
        if !hook.is_none() {
            handlers.trap = callable(&hook.getattr("handler")?, "a trap hook's handler")?;
            let mut traps = Traps { syscall: hook.getattr("syscall")?.extract()?, exceptions: 0 };
            for vector in hook.getattr("exceptions")?.try_iter()? {
                let vector: u32 = vector?.extract()?;
                traps.exceptions |= 1_u32.checked_shl(vector).ok_or_else(|| {
                    PyValueError::new_err(format!("there is no exception {vector}: 0-31"))
                })?;
            }
            data.traps = traps;
        }
        Ok((data, handlers))
    }

    fn msr(&self, index: u32) -> Option<&Msr> {
        self.msrs.iter().find(|msr| msr.indices.contains(&index))
    }

    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.hypercall)?;
        visit.call(&self.trap)?;
        for msr in &self.msrs {
            visit.call(&msr.read)?;
            visit.call(&msr.write)?;
        }
        self.ports.iter().try_for_each(|(_, handler)| visit.call(handler))
    }
}

/// A platform's handlers for one vCPU, while that runs.
pub struct OnVcpu {
    pub platform: Arc<PythonPlatform>,
    pub vm: Py<Vm>,
    pub id: u32,
    pub crossings: Arc<Crossings>,
}

/// What a handler may return, and where it goes in registers that it changed.
struct Returns {
    bits: u32,
    put: fn(&mut Registers, u64, u32),
}

const TO_RAX: Returns = Returns { bits: 64, put: |registers, value, _| registers.gpr[RAX] = value };
const TO_EDX_EAX: Returns = Returns {
    bits: 64,
    put: |registers, value, _| {
        registers.gpr[RAX] = value & 0xFFFF_FFFF;
        registers.gpr[RDX] = value >> 32;
    },
};
const NOTHING: Returns = Returns { bits: 0, put: |_, _, _| {} };

/// AL, AX or EAX.
fn to_accumulator(size: u8) -> Returns {
    Returns {
        bits: u32::from(size) * 8,
        put: |registers, value, bits| {
            let old = registers.gpr[RAX];
            let low = (1 << bits) - 1;
            registers.gpr[RAX] = if bits == 32 { value } else { old & !low | value };
        },
    }
}

impl Returns {
    /// The number that a handler returned, if it is one for this place.
    fn number(&self, result: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
        if result.is_none() {
            return Ok(None);
        }
        let Ok(number) = result.cast::<PyInt>() else {
            let kind = result.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!(
                "a handler of the platform returned {kind}, not int or None"
            )));
        };
        let negative = || number.extract::<i64>().ok().map(|value| value as u64);
        let value = number.extract::<u64>().ok().or_else(|| negative().filter(|_| self.bits == 64));
        match value {
            Some(value) if self.bits >= 64 || value >> self.bits == 0 => Ok(Some(value)),
            _ => Err(PyValueError::new_err(format!(
                "a handler of the platform returned {}, which does not fit {} bits",
                number.str()?,
                self.bits
            ))),
        }
    }
}

impl OnVcpu {
    /// Calls a handler by `invoke`, with the vCPU lent to it.
    fn call(
        &self,
        vcpu: &mut dyn Vcpu,
        caller: Caller,
        returns: &Returns,
        invoke: impl FnOnce(&Bound<'_, GuestCall>) -> PyResult<Py<PyAny>>,
    ) -> Answered {
        self.crossings.calls.fetch_add(1, Ordering::Relaxed);
        let reply = attached(|py| {
            let before = vcpu.registers().map_err(crate::error::Failure::from)?;
            let lent = Lent::new(py, self.vm.clone_ref(py), self.id, caller, vcpu)?;
            let result = invoke(lent.call());
            // Nobody else ends the call, so they are there.
            let registers = lent.take_back().unwrap_or(before);
            let result = match result {
                Ok(result) => result,
                Err(raised) => return guest_fault(py, raised).map(Reply::Fault),
            };
            let value = returns.number(result.bind(py))?;
            if registers == before {
                return Ok(value.map_or(Reply::Done, Reply::Value));
            }
            let mut registers = registers;
            if let Some(value) = value {
                (returns.put)(&mut registers, value, returns.bits);
            }
            Ok(Reply::Registers(Box::new(registers)))
        })?;
        Ok((reply, Handler::Python))
    }
}

impl PlatformHandlers for OnVcpu {
    fn hypercall(&self, vcpu: &mut dyn Vcpu, cpl: u8) -> Answered {
        if let Some(xen) = &self.platform.xen
            && let Some(answered) = xen.hypercall(self.id, vcpu, cpl)
        {
            return answered;
        }
        let Some(handler) = &self.platform.hypercall else {
            return NoHandlers.hypercall(vcpu, cpl);
        };
        let caller = Caller { cpl: Some(cpl), trapped: false };
        self.call(vcpu, caller, &TO_RAX, |call| handler.call1(call.py(), (call,)))
    }

    fn msr_read(&self, vcpu: &mut dyn Vcpu, index: u32) -> Answered {
        let handler = self.platform.msr(index).and_then(|msr| msr.read.as_ref());
        let Some(handler) = handler else { return NoHandlers.msr_read(vcpu, index) };
        let invoke = |call: &Bound<'_, GuestCall>| {
            let result = handler.call1(call.py(), (call, index))?;
            if result.is_none(call.py()) {
                return Err(PyTypeError::new_err(format!(
                    "the read handler of MSR {index:#x} returned None, not int"
                )));
            }
            Ok(result)
        };
        self.call(vcpu, Caller::KERNEL, &TO_EDX_EAX, invoke)
    }

    fn msr_write(&self, vcpu: &mut dyn Vcpu, index: u32, value: u64) -> Answered {
        let handler = self.platform.msr(index).and_then(|msr| msr.write.as_ref());
        let Some(handler) = handler else { return NoHandlers.msr_write(vcpu, index, value) };
        let invoke = |call: &Bound<'_, GuestCall>| handler.call1(call.py(), (call, index, value));
        self.call(vcpu, Caller::KERNEL, &NOTHING, invoke)
    }

    fn port(&self, vcpu: &mut dyn Vcpu, access: PortAccess) -> Answered {
        let mut ports = self.platform.ports.iter();
        let Some((_, handler)) = ports.find(|(ports, _)| ports.contains(&access.port)) else {
            return NoHandlers.port(vcpu, access);
        };
        let PortAccess { port, size, input, string } = access;
        let returns = if input && !string { to_accumulator(size) } else { NOTHING };
        self.call(vcpu, Caller { cpl: None, trapped: false }, &returns, |call| {
            handler.call1(call.py(), (call, RegisterPortAccess { port, size, input, string }))
        })
    }

    fn trap(&self, vcpu: &mut dyn Vcpu, trap: Trap) -> Answered {
        let Some(handler) = &self.platform.trap else { return NoHandlers.trap(vcpu, trap) };
        let (seen, returns) = match trap {
            Trap::Exception(Fault { vector, error, address }) => {
                let seen = GuestTrap { vector: Some(vector), error, address, next: None };
                (seen, NOTHING)
            }
            Trap::Syscall { next } => {
                let seen = GuestTrap { vector: None, error: None, address: 0, next: Some(next) };
                (seen, TO_RAX)
            }
        };
        let caller = Caller { cpl: Some(3), trapped: true };
        self.call(vcpu, caller, &returns, |call| handler.call1(call.py(), (call, seen)))
    }
}
