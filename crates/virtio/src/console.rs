//! Console device (5.3): ports, each with bytes in both directions.

mod control;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tetrarch_io::{Attachment, Event, Output, Trigger};

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError};
use crate::queues::Queues;
use control::Due;

/// Ports of one device, at most: each has two queues.
pub const MAX_PORTS: usize = 16;
/// Feature bit: the driver knows more than port 0, and the control queues (5.3.3).
pub const MULTIPORT: u64 = 1 << 1;

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// After so many chains of one queue it is the turn of others on the thread.
const TURN: usize = 64;

/// Queues of a device with so many ports, if it offers MULTIPORT (5.3.2).
pub fn queues(ports: usize, multiport: bool) -> usize {
    if multiport { 2 * ports + 2 } else { 2 }
}

fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

/// What a port is to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A terminal: /dev/hvcN of Linux.
    Console,
    /// A pipe that is found by its name.
    Named(String),
}

/// What of a port is saved with its machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    pub input: Vec<u8>,
    pub sent: u32,
    pub known: bool,
    pub open: bool,
    pub due: u8,
}

pub struct Port {
    kind: PortKind,
    output: Arc<Output>,
    /// There is room in the output again.
    room: Arc<Event>,
    /// What the guest has not taken yet.
    input: VecDeque<u8>,
    /// So many bytes of the chain that is next in the transmit queue have gone.
    sent: u32,
    /// The driver has said PORT_READY.
    known: bool,
    /// A program of the guest has it open. Only of interest with control queues.
    open: bool,
    due: Due,
    /// Columns and rows; zeroes where there is no terminal.
    size: (u16, u16),
}

impl Port {
    fn new(kind: PortKind) -> io::Result<Self> {
        let room = Arc::new(Event::new()?);
        let output = Arc::new(Output::with_room_event(Arc::clone(&room)));
        Ok(Self {
            kind,
            output,
            room,
            input: VecDeque::new(),
            sent: 0,
            known: false,
            open: false,
            due: Due::default(),
            size: (0, 0),
        })
    }

    /// Takes the next bytes of a chain, as far as there is room; true when that was all of it.
    fn take(&mut self, chain: &Chain) -> bool {
        let mut bytes = [0; 4096];
        loop {
            let got = chain.readable.read_at(u64::from(self.sent), &mut bytes);
            if got == 0 {
                self.sent = 0;
                return true;
            }
            let taken = self.output.offer(&bytes[..got]);
            self.sent += taken as u32; // a chain is less than 4 GiB
            if taken < got {
                return false;
            }
        }
    }
}

/// The data path. Nothing is in flight between its calls: a chain that finds no room stays in
/// its ring.
pub struct Console {
    ports: Vec<Port>,
    multiport: bool,
    /// How often the driver has written to the only terminal since it was started.
    writes: u32,
    attached: bool,
}

impl Console {
    /// `kinds` of the ports, up to [`MAX_PORTS`] of them.
    pub fn new(kinds: Vec<PortKind>) -> io::Result<Self> {
        let ports = kinds.into_iter().map(Port::new).collect::<Result<_, _>>()?;
        Ok(Self { ports, multiport: false, writes: 0, attached: false })
    }

    /// Where the bytes go that the guest writes to a port.
    pub fn output(&self, port: usize) -> Option<Arc<Output>> {
        self.ports.get(port).map(|port| Arc::clone(&port.output))
    }

    /// Input for the guest; it stays here until a program reads it.
    pub fn receive(
        &mut self,
        queues: &mut Queues,
        port: usize,
        data: &[u8],
    ) -> Result<(), QueueError> {
        if let Some(port) = self.ports.get_mut(port) {
            port.input.extend(data);
        }
        self.feed(queues, port)
    }

    /// Input bytes that the guest has not taken.
    pub fn queued(&self, port: usize) -> usize {
        self.ports.get(port).map_or(0, |port| port.input.len())
    }

    /// The terminal of a port has another size.
    pub fn resize(
        &mut self,
        queues: &mut Queues,
        port: usize,
        size: (u16, u16),
    ) -> Result<(), QueueError> {
        if let Some(port) = self.ports.get_mut(port) {
            port.size = size;
            port.due.resized();
        }
        self.tell(queues)
    }

    /// The driver wrote a character to the configuration (5.3.4): it goes to port 0.
    pub fn emergency(&self, character: u8) {
        if let Some(port) = self.ports.first() {
            port.output.offer(&[character]);
        }
    }

    pub fn states(&self) -> Vec<PortState> {
        let state = |port: &Port| PortState {
            input: port.input.iter().copied().collect(),
            sent: port.sent,
            known: port.known,
            open: port.open,
            due: port.due.bits(),
        };
        self.ports.iter().map(state).collect()
    }

    /// States of a saved device, before it is started; those of ports it does not have are left.
    pub fn set_states(&mut self, states: Vec<PortState>) {
        for (port, state) in self.ports.iter_mut().zip(states) {
            port.input = state.input.into();
            port.sent = state.sent;
            port.known = state.known;
            port.open = state.open;
            port.due = Due::from_bits(state.due);
        }
    }

    /// Has the guest read what waits for it.
    fn feed(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
        let queue = receive_queue(index);
        let mut turn = TURN;
        while !port.input.is_empty() && (port.open || !self.multiport) {
            if turn == 0 {
                queues.serve_again(queue);
                break;
            }
            turn -= 1;
            let Some(chain) = queues.take(queue)? else { break };
            let written = chain.writable.write_at(0, port.input.make_contiguous());
            port.input.drain(..written);
            queues.push(queue, chain.used, written as u32);
        }
        queues.interrupt(queue);
        Ok(())
    }

    /// Takes what the guest writes, while there is room.
    fn drain(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
        let queue = receive_queue(index) + 1;
        let mut turn = TURN;
        while let Some(chain) = queues.take(queue)? {
            if turn == 0 || !port.take(&chain) {
                queues.put_back(queue, chain.used);
                break;
            }
            turn -= 1;
            queues.push(queue, chain.used, 0);
            // Linux never looks for the size by itself, and what it is told of it before its port
            // is on a list of its own is lost. That is so before some write, no one knows which.
            self.writes = self.writes.saturating_add(1);
            if self.writes.is_power_of_two() && !self.multiport && port.size != (0, 0) {
                queues.config_changed();
            }
        }
        queues.interrupt(queue);
        if turn == 0 {
            queues.serve_again(queue);
        }
        Ok(())
    }

    /// Takes what the driver says of ports.
    fn listen(&mut self, queues: &mut Queues) -> Result<(), QueueError> {
        let mut opened = 0_u32;
        let ports = &mut self.ports;
        queues.serve(CONTROL_TRANSMIT, |chain| {
            let mut message = [0; control::BYTES];
            if chain.readable.read_at(0, &mut message) == message.len()
                && let Some(port) = control::take(message, ports)
            {
                opened |= 1 << port;
            }
            Some((chain.used, 0))
        })?;
        for port in (0..self.ports.len()).filter(|port| opened & 1 << port != 0) {
            self.feed(queues, port)?;
        }
        self.tell(queues)
    }

    /// Tells the driver what it is to know of ports.
    fn tell(&mut self, queues: &mut Queues) -> Result<(), QueueError> {
        if !self.multiport {
            return Ok(());
        }
        for (id, port) in self.ports.iter_mut().enumerate() {
            loop {
                let before = port.due;
                let Some(message) = control::next(id, port) else { break };
                let Some(chain) = queues.take(CONTROL_RECEIVE)? else {
                    port.due = before;
                    break;
                };
                let written = chain.writable.write_at(0, &message);
                queues.push(CONTROL_RECEIVE, chain.used, written as u32);
            }
        }
        queues.interrupt(CONTROL_RECEIVE);
        Ok(())
    }
}

impl DataPath for Console {
    fn start(&mut self, features: u64, io: &Attachment) -> io::Result<()> {
        self.multiport = features & MULTIPORT != 0;
        self.writes = 0;
        if !self.attached {
            for (source, port) in (OWN_SOURCES..).zip(&self.ports) {
                io.add(&*port.room, source, Trigger::Edge)?;
            }
            self.attached = true;
        }
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        match index {
            CONTROL_RECEIVE => self.tell(queues),
            CONTROL_TRANSMIT if self.multiport => self.listen(queues),
            CONTROL_TRANSMIT => Ok(()),
            0 => self.feed(queues, 0),
            1 => self.drain(queues, 0),
            _ if !self.multiport => Ok(()),
            _ if index.is_multiple_of(2) => self.feed(queues, index / 2 - 1),
            _ => self.drain(queues, index / 2 - 1),
        }
    }

    fn ready(&mut self, queues: &mut Queues, source: u32) -> Result<(), QueueError> {
        self.drain(queues, (source - OWN_SOURCES) as usize)
    }

    /// What the host typed waits for the next driver.
    fn reset(&mut self) {
        for port in &mut self.ports {
            port.sent = 0;
            port.known = false;
            port.open = false;
            port.due = Due::default();
        }
    }
}
