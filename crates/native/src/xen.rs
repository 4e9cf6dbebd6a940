//! `tetrarch._native.XenDomain`: what a guest of Xen's calls per event or per tick.

use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use tetrarch_bus::{Answered, Handler};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{EngineError, Reply, Vcpu};
use tetrarch_xen::{Channel, Domain, PORTS, Port, Saved, SavedVcpu, errno};

use crate::error::Failure;
use crate::saved::saved_state;
use crate::vm::Vm;

/// A domain without what it calls rarely.
#[pyclass(frozen, from_py_object, module = "tetrarch._native")]
#[derive(Clone, Default)]
pub struct XenDomain(Arc<OnceLock<Arc<Domain>>>);

// Encoding order, as in `Registers::gpr`.
const RAX: usize = 0;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;

/// The L bit of a segment's attributes: 64-bit code.
const LONG: u32 = 1 << 13;

impl XenDomain {
    /// Answers the hypercall if it is one of those.
    pub fn hypercall(&self, id: u32, vcpu: &mut dyn Vcpu, cpl: u8) -> Option<Answered> {
        let domain = self.0.get().filter(|_| cpl == 0)?;
        let number = |vcpu: &mut dyn Vcpu| -> Result<_, EngineError> {
            let gpr = vcpu.registers()?.gpr;
            let wide = vcpu.system_registers()?.cs.attributes & LONG != 0;
            Ok(wide.then_some((gpr[RAX], [gpr[RDI], gpr[RSI], gpr[RDX]])))
        };
        let (number, arguments) = number(vcpu).ok().flatten()?;
        let result = domain.hypercall(id, vcpu, number, arguments)?;
        Some(Ok((Reply::Value(result as u64), Handler::Native)))
    }

    fn domain(&self) -> Result<&Domain, Failure> {
        self.0.get().map(Arc::as_ref).ok_or_else(|| Failure::refused("the domain has no machine"))
    }
}

fn number(result: Result<u32, i64>) -> i64 {
    result.map_or_else(|error| error, i64::from)
}

fn done(result: Result<(), i64>) -> i64 {
    result.err().unwrap_or(0)
}

/// Numbers of what a port is bound to, as EVTCHNOP_status gives them.
mod status {
    pub const CLOSED: u32 = 0;
    pub const UNBOUND: u32 = 1;
    pub const INTERDOMAIN: u32 = 2;
    pub const VIRQ: u32 = 4;
    pub const IPI: u32 = 5;
}

fn described(port: Port) -> (u32, u32, u32) {
    let (kind, detail) = match port.channel {
        Channel::Free => (status::CLOSED, 0),
        Channel::Unbound { remote } => (status::UNBOUND, remote.into()),
        Channel::Own { port } => (status::INTERDOMAIN, port),
        Channel::Virq(virq) => (status::VIRQ, virq),
        Channel::Ipi => (status::IPI, 0),
    };
    (kind, port.vcpu, detail)
}

fn from_described(numbers: &[u32]) -> Option<Port> {
    let [kind, vcpu, detail] = *numbers else { return None };
    let channel = match kind {
        status::CLOSED => Channel::Free,
        status::UNBOUND => Channel::Unbound { remote: detail.try_into().ok()? },
        status::INTERDOMAIN => Channel::Own { port: detail },
        status::VIRQ => Channel::Virq(detail),
        status::IPI => Channel::Ipi,
        _ => return None,
    };
    Some(Port { channel, vcpu })
}

/// `Saved`, in numbers.
struct Numbers {
    shared_info: Option<u64>,
    vcpus: Vec<Vec<u64>>,
    ports: Vec<Vec<u32>>,
    clock_ns: u64,
}

saved_state!(State of Numbers {
    shared_info: Option<u64>,
    vcpus: Vec<Vec<u64>>,
    ports: Vec<Vec<u32>>,
    clock_ns: u64,
});

/// Where a vCPU has registered no vcpu_info.
const NOWHERE: u64 = u64::MAX;

fn numbers(vcpu: &SavedVcpu) -> Vec<u64> {
    vec![vcpu.info.unwrap_or(NOWHERE), vcpu.time, vcpu.vector.into(), vcpu.deadline]
}

fn saved_vcpu(numbers: &[u64]) -> Option<SavedVcpu> {
    let [info, time, vector, deadline] = *numbers else { return None };
    let info = Some(info).filter(|&at| at != NOWHERE);
    Some(SavedVcpu { info, time, vector: vector.try_into().ok()?, deadline })
}

#[pymethods]
impl XenDomain {
    #[classattr]
    const PORTS: u32 = PORTS;

    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn connect(
        &self,
        vm: &Bound<'_, Vm>,
        domid: u16,
        topology: (u32, u32, u32),
    ) -> Result<(), Failure> {
        let machine = &vm.get().machine;
        let (engine, memory) = (Arc::clone(&machine.engine), Arc::clone(&machine.memory));
        let (sockets, cores, threads) = topology;
        let topology = Topology { sockets, cores, threads };
        let domain = Domain::new(domid, engine, memory, topology, &machine.io)?;
        self.0.set(domain).map_err(|_| Failure::refused("the domain has a machine already"))
    }

    fn reset(&self) {
        if let Some(domain) = self.0.get() {
            domain.reset();
        }
    }

    fn now_ns(&self) -> Result<u64, Failure> {
        Ok(self.domain()?.now_ns())
    }

    fn place_shared_info(&self, address: u64) -> Result<i64, Failure> {
        Ok(done(self.domain()?.place_shared_info(address)))
    }

    fn register_vcpu_info(&self, vcpu: u32, address: u64) -> Result<i64, Failure> {
        Ok(done(self.domain()?.register_vcpu_info(vcpu, address)))
    }

    fn register_time(&self, vcpu: u32, address: u64) -> Result<i64, Failure> {
        Ok(done(self.domain()?.register_time(vcpu, address)))
    }

    fn set_upcall_vector(&self, vcpu: u32, vector: u8) -> Result<i64, Failure> {
        Ok(done(self.domain()?.set_upcall_vector(vcpu, vector)))
    }

    fn allocate_unbound(&self, remote: u16) -> Result<i64, Failure> {
        Ok(number(self.domain()?.with_channels(|it| it.allocate_unbound(remote))))
    }

    fn bind_own(&self, domid: u16, port: u32) -> Result<i64, Failure> {
        Ok(number(self.domain()?.with_channels(|it| it.bind_own(domid, port))))
    }

    fn bind_virq(&self, virq: u32, vcpu: u32) -> Result<i64, Failure> {
        Ok(number(self.domain()?.with_channels(|it| it.bind_virq(virq, vcpu))))
    }

    fn bind_ipi(&self, vcpu: u32) -> Result<i64, Failure> {
        Ok(number(self.domain()?.with_channels(|it| it.bind_ipi(vcpu))))
    }

    fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<i64, Failure> {
        Ok(done(self.domain()?.with_channels(|it| it.bind_vcpu(port, vcpu))))
    }

    fn close(&self, port: u32) -> Result<i64, Failure> {
        Ok(done(self.domain()?.close(port)))
    }

    fn status(&self, port: u32) -> Result<(u32, u32, u32), Failure> {
        let found = self.domain()?.with_channels(|it| it.get(port));
        Ok(found.map_or((status::CLOSED, 0, 0), described))
    }

    fn open_ports(&self) -> Result<Vec<u32>, Failure> {
        let ports = self.domain()?.with_channels(|it| it.ports().to_vec());
        let open =
            |(at, port): (usize, &Port)| (port.channel != Channel::Free).then_some(at as u32);
        Ok(ports.iter().enumerate().filter_map(open).collect())
    }

    fn save(&self) -> Result<State, Failure> {
        let Saved { shared_info, vcpus, ports, clock_ns } = self.domain()?.save();
        let vcpus = vcpus.iter().map(numbers).collect();
        let ports = ports.into_iter().map(|port| <[u32; 3]>::from(described(port)).to_vec());
        let ports = ports.collect();
        Ok(Numbers { shared_info, vcpus, ports, clock_ns }.into())
    }

    fn load(&self, state: State, tsc: u64) -> Result<(), Failure> {
        let Numbers { shared_info, vcpus, ports, clock_ns } = state.into();
        let damaged = || Failure::refused("the state of Xen's domain is damaged");
        let vcpus: Option<Vec<_>> = vcpus.iter().map(|vcpu| saved_vcpu(vcpu)).collect();
        let ports: Option<Vec<_>> = ports.iter().map(|port| from_described(port)).collect();
        let (vcpus, ports) = (vcpus.ok_or_else(damaged)?, ports.ok_or_else(damaged)?);
        let saved = Saved { shared_info, vcpus, ports, clock_ns };
        match self.domain()?.load(saved, tsc) {
            Ok(()) => Ok(()),
            Err(errno::INVAL) => Err(damaged()),
            Err(error) => Err(Failure::refused(format!("error {error} of Xen's domain"))),
        }
    }
}
