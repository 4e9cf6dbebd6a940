//! `tetrarch._native.Network` and `VirtioNet`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::prelude::*;
use tetrarch_net::{
    Capture, CaptureFile, Counters, Direction, Filter, Flow, Joined, Judge, NetBackend, Shape,
    Shaper, StreamPeer, Tap,
};
use tetrarch_virtio::{Device, MAX_PAIRS, MacAddress, Net, NetConfig, NetState};

use crate::descriptor::own_descriptor;
use crate::error::Failure;
use crate::virtio::VirtioDevice;
use crate::vm::Vm;

/// The way to a network, until a card has it.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Network {
    backends: Mutex<Vec<Box<dyn NetBackend>>>,
    counters: Arc<Counters>,
    /// Of a switch that may be ours.
    switched: Option<Arc<Counters>>,
}

/// Those of all queues, and what counts their frames.
pub type BackEnds = (Vec<Box<dyn NetBackend>>, Arc<Counters>);

impl Network {
    fn new(backends: Vec<Box<dyn NetBackend>>, counters: Arc<Counters>) -> Self {
        Self { backends: Mutex::new(backends), counters, switched: None }
    }

    /// What a card is made with.
    pub fn take(&self, name: &str) -> Result<BackEnds, Failure> {
        let backends = std::mem::take(&mut *self.backends.lock());
        let queues = backends.len();
        if !(1..=MAX_PAIRS).contains(&queues) {
            return Err(Failure::refused(format!(
                "{name}: a network of {queues} queues, not 1 to {MAX_PAIRS}"
            )));
        }
        Ok((backends, Arc::clone(&self.counters)))
    }

    /// Puts something around each of the back ends.
    fn wrap(
        &self,
        wrapper: impl Fn(Box<dyn NetBackend>) -> io::Result<Box<dyn NetBackend>>,
    ) -> Result<(), Failure> {
        let mut backends = self.backends.lock();
        let wrapped = std::mem::take(&mut *backends).into_iter().map(wrapper);
        *backends = wrapped.collect::<io::Result<_>>()?;
        Ok(())
    }
}

#[pymethods]
impl Network {
    /// A program at the other end of a stream socket; `name` is what messages call it.
    #[staticmethod]
    fn stream(name: &str, socket: i32) -> Result<Self, Failure> {
        let counters = Arc::new(Counters::default());
        let peer = StreamPeer::new(name, own_descriptor(socket)?, Arc::clone(&counters))?;
        Ok(Self::new(vec![Box::new(peer)], counters))
    }

    /// Machines that name the same socket.
    #[staticmethod]
    fn joined(py: Python<'_>, path: PathBuf) -> Result<Self, Failure> {
        let (counters, switched) = (Arc::new(Counters::default()), Arc::new(Counters::default()));
        let joined =
            py.detach(|| Joined::new(&path, Arc::clone(&counters), Arc::clone(&switched)))?;
        Ok(Self { switched: Some(switched), ..Self::new(vec![Box::new(joined)], counters) })
    }

    /// The queues of a tap device.
    #[staticmethod]
    fn tap(queues: Vec<i32>) -> Result<Self, Failure> {
        let counters = Arc::new(Counters::default());
        let queue = |number| -> Result<Box<dyn NetBackend>, Failure> {
            Ok(Box::new(Tap::new(own_descriptor(number)?, Arc::clone(&counters))?))
        };
        let queues = queues.into_iter().map(queue).collect::<Result<_, _>>()?;
        Ok(Self::new(queues, counters))
    }

    /// Makes it slower and worse: delay in seconds, loss of 0 to 1, rate in bits a second.
    #[pyo3(signature = (*, delay = 0.0, loss = 0.0, rate = None, seed = 0))]
    fn shape(&self, delay: f64, loss: f64, rate: Option<u64>, seed: u64) -> Result<(), Failure> {
        let delay = Duration::try_from_secs_f64(delay)
            .map_err(|error| Failure::refused(format!("a delay of {delay} s: {error}")))?;
        let shape = Shape { delay, loss, rate, seed };
        self.wrap(|inner| Ok(Box::new(Shaper::new(inner, shape, Arc::clone(&self.counters))?)))
    }

    /// Has each new flow judged: protocol, source, destination, ports of both if there are any,
    /// and whether the guest began it.
    fn filter(&self, py: Python<'_>, judge: &Bound<'_, PyAny>) -> Result<(), Failure> {
        self.wrap(|inner| {
            let judge = PythonJudge(judge.clone().unbind());
            let filter = Filter::new(inner, Box::new(judge), Arc::clone(&self.counters));
            Ok(Box::new(py.detach(|| filter)?))
        })
    }

    /// Writes frames into a file, which is open for writing.
    fn capture(&self, file: i32) -> Result<(), Failure> {
        let file = Arc::new(CaptureFile::new(File::from(own_descriptor(file)?))?);
        self.wrap(|inner| Ok(Box::new(Capture::new(inner, Arc::clone(&file)))))
    }

    #[getter]
    fn queues(&self) -> usize {
        self.backends.lock().len()
    }

    /// Whether frames come from it with checksums and segmentation left to the guest.
    #[getter]
    fn offloads(&self) -> bool {
        self.backends.lock().iter().all(|backend| backend.offloads().tcp4)
    }

    /// Counters by name: frames, bytes, and what was dropped by the reason.
    fn stats(&self) -> BTreeMap<String, u64> {
        let own = self.counters.stats().into_iter();
        let switched = self.switched.iter().flat_map(|counters| counters.stats());
        own.chain(switched.map(|(name, count)| (format!("switch_{name}"), count))).collect()
    }
}

struct PythonJudge(Py<PyAny>);

impl Judge for PythonJudge {
    /// One that raises has said no.
    fn allows(&mut self, flow: &Flow, direction: Direction) -> bool {
        Python::attach(|py| {
            let (source, destination) = (flow.source, flow.destination);
            let sent = direction == Direction::Sent;
            let answer = self.0.call1(py, (flow.protocol, source, destination, flow.ports, sent));
            match answer.and_then(|answer| answer.is_truthy(py)) {
                Ok(yes) => yes,
                Err(raised) => {
                    raised.write_unraisable(py, None);
                    false
                }
            }
        })
    }
}

/// What a saved machine has of a card.
#[derive(FromPyObject, IntoPyObject)]
#[pyo3(from_item_all)]
struct State {
    permanent: Vec<u8>,
    mac: Vec<u8>,
    mode: u8,
    unicast: Vec<u8>,
    multicast: Vec<u8>,
    vlans: Vec<u8>,
    pairs: u16,
    guest_offloads: u64,
}

pub fn address(bytes: &[u8]) -> Result<MacAddress, Failure> {
    bytes.try_into().map_err(|_| Failure::refused(format!("an address of {} bytes", bytes.len())))
}

fn table(bytes: &[u8]) -> Vec<MacAddress> {
    bytes.as_chunks().0.to_vec()
}

/// The network device.
#[pyclass(frozen, extends = VirtioDevice, module = "tetrarch._native")]
pub struct VirtioNet {
    device: Arc<Device<Net>>,
    config: Arc<NetConfig>,
}

#[pymethods]
impl VirtioNet {
    /// Takes the network over.
    #[new]
    fn new(
        vm: &Bound<'_, Vm>,
        name: &str,
        network: &Bound<'_, Network>,
        mac: &[u8],
    ) -> Result<PyClassInitializer<Self>, Failure> {
        let mac = address(mac)?;
        let (backends, counters) = network.get().take(name)?;
        let pairs = backends.len();
        let net = Net::new(mac, backends, counters);
        let config = net.config();
        let (base, device) = VirtioDevice::make(vm, name, 2 * pairs + 1, net)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self { device, config }))
    }

    /// The field `status` of the configuration.
    #[getter]
    fn status(&self) -> u16 {
        self.config.status()
    }

    /// The field `mac`.
    #[getter]
    fn mac(&self) -> MacAddress {
        self.config.mac()
    }

    fn state(&self, py: Python<'_>) -> State {
        let state = py.detach(|| self.device.with_path(|net, _| net.state()));
        State {
            permanent: state.permanent.into(),
            mac: state.mac.into(),
            mode: state.mode,
            unicast: state.unicast.concat(),
            multicast: state.multicast.concat(),
            vlans: state.vlans,
            pairs: state.pairs,
            guest_offloads: state.guest_offloads,
        }
    }

    /// Takes a saved state up, before the driver's next start.
    fn restore(&self, py: Python<'_>, state: State) -> Result<(), Failure> {
        let state = NetState {
            permanent: address(&state.permanent)?,
            mac: address(&state.mac)?,
            mode: state.mode,
            unicast: table(&state.unicast),
            multicast: table(&state.multicast),
            vlans: state.vlans,
            pairs: state.pairs,
            guest_offloads: state.guest_offloads,
        };
        py.detach(|| self.device.with_path(|net, _| net.restore(state)));
        Ok(())
    }

    /// Lets go of the network.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.device.with_path(|net, _| net.close()));
    }
}
