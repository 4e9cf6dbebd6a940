//! Socket device (5.10): connections between the guest's vsock ports and Unix sockets.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tetrarch_io::{Attachment, Trigger};
use tetrarch_vsock::{
    CALLS, FIRST_PORT, Greeted, Greeting, MAX_CONNECTIONS, Programs, Ready, free_port, welcome,
};

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError};
use crate::queues::Queues;

mod packet;
#[cfg(test)]
mod tests;

use packet::{Header, Op};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// The host's CID (vsock(7)).
const HOST: u64 = tetrarch_vsock::HOST as u64;
/// VIRTIO_VSOCK_TYPE_STREAM
const STREAM: u16 = 1;
/// Flags of a shutdown (5.10.6.6): who sends it takes no more, gives no more.
const NO_RECEIVE: u32 = 1;
const NO_SEND: u32 = 2;

/// What a guest may send on a connection before the host's program has read it.
const BUFFER: u32 = 256 << 10;
/// A connection tells how much was read when so much is free again.
const TELL: u32 = BUFFER / 2;
/// What goes to the guest in one packet at most.
const PACKET: usize = 64 << 10;
/// Packets to the guest after which it is the turn of others on the thread.
const PACKETS: usize = 128;

/// Answers that wait for buffers of the guest, beyond which it is not heard (5.10.6.1.2).
const MAX_ANSWERS: usize = 1024;

/// (port of the host, port of the guest)
type Key = (u32, u32);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host's program has not said which port it wants.
    Greeting,
    /// The guest was asked, and has not answered.
    Asked,
    Open,
}

struct Connection {
    stream: UnixStream,
    phase: Phase,
    /// The epoll data of the stream.
    id: u64,
    /// From the host's program before the connection is open.
    greeting: Greeting,
    /// There may be something to read.
    readable: bool,
    /// The host's program has closed its end; the guest was told.
    told_end: bool,
    /// The guest takes no more.
    deaf: bool,
    /// The guest gives no more: the stream is to be shut when `out` is written.
    finished: bool,
    /// From the guest, not yet taken by the host's program.
    out: VecDeque<u8>,
    /// Bytes taken by the host's program, and what the guest knows of that.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes sent to the guest, and what it has said of its buffer.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
}

impl Connection {
    fn new(stream: UnixStream, phase: Phase, id: u64) -> Self {
        Self {
            stream,
            phase,
            id,
            greeting: Greeting::default(),
            readable: true,
            told_end: false,
            deaf: false,
            finished: false,
            out: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
        }
    }

    /// How much the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Writes what waits for the host's program.
    fn flush(&mut self) -> io::Result<()> {
        let taken = tetrarch_vsock::flush(&mut self.out, &self.stream)?;
        self.forwarded = self.forwarded.wrapping_add(taken as u32);
        if self.finished {
            // A program that has gone already is no error here.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }
}

/// What the guest has said when it asked for a program of the host that was busy, and how often
/// that was called.
struct Dial {
    buffer: u32,
    forwarded: u32,
    calls: u32,
}

/// The data path of one socket device.
pub struct Vsock {
    cid: u64,
    programs: Programs,
    attached: bool,
    connections: BTreeMap<Key, Connection>,
    /// Which connection a stream belongs to, by its epoll data.
    streams: BTreeMap<u64, Key>,
    next_port: u32,
    /// Connections whose program on the host has no room for another one yet.
    dials: BTreeMap<Key, Dial>,
    /// Packets without data that wait for a buffer of the guest.
    control: VecDeque<Header>,
    /// The guest is to be told that all connections are gone (5.10.6.8).
    transport_reset: bool,
}

impl Vsock {
    /// `path` is what the listener is bound to.
    pub fn new(cid: u64, path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
            cid,
            programs: Programs::new(path, listener)?,
            attached: false,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_port: FIRST_PORT,
            dials: BTreeMap::new(),
            control: VecDeque::new(),
            transport_reset: false,
        })
    }

    /// The connections of a machine that was saved are gone where it goes on.
    pub fn reset_transport(&mut self) {
        self.transport_reset = true;
    }

    fn header(&self, key: Key, op: Op) -> Header {
        let forwarded = self.connections.get(&key).map_or(0, |one| one.forwarded);
        Header {
            source_cid: HOST,
            destination_cid: self.cid,
            source_port: key.0,
            destination_port: key.1,
            kind: STREAM,
            op: op as u16,
            buffer: BUFFER,
            forwarded,
            ..Header::default()
        }
    }

    fn tell(&mut self, key: Key, op: Op) {
        let header = self.header(key, op);
        self.control.push_back(header);
    }

    fn watch(&mut self, stream: UnixStream, phase: Phase) -> io::Result<Connection> {
        let id = self.programs.watch(&stream)?;
        Ok(Connection::new(stream, phase, id))
    }

    fn add(&mut self, key: Key, connection: Connection) {
        self.streams.insert(connection.id, key);
        self.connections.insert(key, connection);
    }

    fn remove(&mut self, key: Key) {
        self.dials.remove(&key);
        if let Some(connection) = self.connections.remove(&key) {
            self.streams.remove(&connection.id);
        }
    }

    /// Ends a connection and tells the guest.
    fn break_off(&mut self, key: Key) {
        self.remove(key);
        self.tell(key, Op::Reset);
    }

    // From the guest

    fn take(&mut self, chain: &Chain) {
        let mut bytes = [0; Header::BYTES];
        if chain.readable.read_at(0, &mut bytes) < Header::BYTES {
            return;
        }
        let header = Header::decode(&bytes);
        let key = (header.destination_port, header.source_port);
        let op = Op::of(header.op);
        let ours = header.destination_cid == HOST
            && header.source_cid == self.cid
            && header.kind == STREAM;
        match (ours, op) {
            (_, Some(Op::Reset)) => self.remove(key),
            (true, Some(Op::Request)) => self.open(key, &header),
            (true, Some(op)) if self.connections.contains_key(&key) => {
                self.note_credit(key, &header);
                self.act(key, op, &header, chain);
            }
            // What belongs to no connection is refused (5.10.6.4.1).
            _ => self.tell(key, Op::Reset),
        }
    }

    fn note_credit(&mut self, key: Key, header: &Header) {
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.guest_buffer = header.buffer;
            connection.guest_forwarded = header.forwarded;
        }
    }

    fn open(&mut self, key: Key, header: &Header) {
        let taken = self.connections.contains_key(&key) || self.dials.contains_key(&key);
        if taken || self.connections.len() + self.dials.len() >= MAX_CONNECTIONS {
            self.break_off(key);
            return;
        }
        self.call(key, Dial { buffer: header.buffer, forwarded: header.forwarded, calls: 0 });
    }

    /// Connects to who listens for a port of the host.
    fn call(&mut self, key: Key, mut to: Dial) {
        match self.programs.dial(key.0).and_then(|stream| self.watch(stream, Phase::Open)) {
            Ok(mut connection) => {
                connection.guest_buffer = to.buffer;
                connection.guest_forwarded = to.forwarded;
                self.add(key, connection);
                self.tell(key, Op::Response);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && to.calls < CALLS => {
                to.calls += 1;
                self.dials.insert(key, to);
                self.programs.call_again();
            }
            Err(_) => self.tell(key, Op::Reset),
        }
    }

    fn act(&mut self, key: Key, op: Op, header: &Header, chain: &Chain) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match op {
            Op::Response if connection.phase == Phase::Asked => {
                connection.phase = Phase::Open;
                connection.out.extend(welcome(key.0));
                // It is ours, and the guest has no part in it.
                connection.forwarded =
                    connection.forwarded.wrapping_sub(connection.out.len() as u32);
                connection.told_forwarded = 0;
                self.flush(key);
            }
            Op::Data if connection.phase == Phase::Open => {
                let length = u64::from(header.length);
                let data = chain.readable.part(Header::BYTES as u64, length);
                let room = u64::from(BUFFER).saturating_sub(connection.out.len() as u64);
                if data.len() < length || length > room {
                    // More than it said, or than it may (5.10.6.3).
                    self.break_off(key);
                    return;
                }
                let mut bytes = vec![0; data.len() as usize];
                data.read_at(0, &mut bytes);
                connection.out.extend(bytes);
                self.flush(key);
            }
            Op::Shutdown => {
                connection.deaf |= header.flags & NO_RECEIVE != 0;
                connection.finished |= header.flags & NO_SEND != 0;
                let over = connection.deaf && connection.finished;
                self.flush(key);
                if over {
                    // The driver waits for it (5.10.6.6).
                    self.break_off(key);
                }
            }
            Op::CreditRequest => self.tell_credit(key),
            Op::CreditUpdate => {}
            _ => self.break_off(key),
        }
    }

    fn flush(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.flush().is_err() {
            self.break_off(key);
            return;
        }
        let unknown = connection.forwarded.wrapping_sub(connection.told_forwarded);
        // "OK ..." counts below 0 until it is written.
        if (TELL..u32::MAX / 2).contains(&unknown) {
            self.tell_credit(key);
        }
    }

    fn tell_credit(&mut self, key: Key) {
        self.tell(key, Op::CreditUpdate);
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.told_forwarded = connection.forwarded;
        }
    }

    // From the host

    fn poll(&mut self) {
        for ready in self.programs.ready() {
            match ready {
                Ready::Called => self.accept(),
                Ready::Again => {
                    for (key, to) in std::mem::take(&mut self.dials) {
                        self.call(key, to);
                    }
                    self.accept();
                }
                Ready::Stream(id) => {
                    let Some(&key) = self.streams.get(&id) else { continue };
                    if let Some(connection) = self.connections.get_mut(&key) {
                        connection.readable = true;
                    }
                    self.flush(key);
                    self.greet(key);
                }
            }
        }
    }

    /// Takes all who have called.
    fn accept(&mut self) {
        while let Some(stream) = self.programs.accept() {
            if self.connections.len() >= MAX_CONNECTIONS {
                continue; // closed again
            }
            let Ok(connection) = self.watch(stream, Phase::Greeting) else { continue };
            // Until it says a port of the guest it has the key of none.
            let key = (self.free_port(), 0);
            self.add(key, connection);
            self.greet(key);
        }
    }

    fn free_port(&mut self) -> u32 {
        let taken = |port| self.connections.range((port, 0)..=(port, u32::MAX)).next().is_some();
        free_port(&mut self.next_port, taken)
    }

    /// Reads which port the host's program wants.
    fn greet(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.phase != Phase::Greeting {
            return;
        }
        match connection.greeting.read(&connection.stream) {
            Greeted::Port(port) => self.ask(key, port),
            Greeted::NotYet => {}
            Greeted::Nothing => self.remove(key), // closed
        }
    }

    fn ask(&mut self, key: Key, port: u32) {
        let Some(mut connection) = self.connections.remove(&key) else { return };
        connection.phase = Phase::Asked;
        let key = (key.0, port);
        self.add(key, connection);
        self.tell(key, Op::Request);
    }

    // To the guest

    /// A guest that takes no answers is not heard: they would fill the host's memory.
    fn is_deaf(&self) -> bool {
        self.control.len() >= MAX_ANSWERS
    }

    fn fill(&mut self, queues: &mut Queues) -> Result<(), QueueError> {
        let was_deaf = self.is_deaf();
        let mut pushed = 0;
        while self.has_packet() {
            if pushed == PACKETS {
                queues.serve_again(RECEIVE);
                break;
            }
            let Some(chain) = queues.take(RECEIVE)? else { break };
            let Chain { writable, used, .. } = chain;
            let room = (writable.len() as usize).saturating_sub(Header::BYTES).min(PACKET);
            let mut written = 0;
            if let Some((header, data)) = self.next_packet(room) {
                written = writable.write_at(0, &header.encode());
                written += writable.write_at(Header::BYTES as u64, &data);
            }
            queues.push(RECEIVE, used, written as u32);
            pushed += 1;
        }
        if pushed > 0 {
            queues.interrupt(RECEIVE);
        }
        if was_deaf && !self.is_deaf() {
            queues.serve_again(TRANSMIT);
        }
        if self.transport_reset
            && let Some(chain) = queues.take(EVENT)?
        {
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0.
            let written = chain.writable.write_at(0, &[0; 4]) as u32;
            queues.push(EVENT, chain.used, written);
            queues.interrupt(EVENT);
            self.transport_reset = false;
        }
        Ok(())
    }

    fn ready_connection(&self) -> Option<Key> {
        let ready = |one: &Connection| {
            one.phase == Phase::Open
                && one.readable
                && !one.told_end
                && !one.deaf
                && one.credit() > 0
        };
        self.connections.iter().find(|(_, one)| ready(one)).map(|(&key, _)| key)
    }

    /// Whether there is something for the guest. A buffer of its is taken only then.
    fn has_packet(&mut self) -> bool {
        while self.control.is_empty() {
            let Some(key) = self.ready_connection() else { return false };
            let Some(connection) = self.connections.get_mut(&key) else { return false };
            match recv(&connection.stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    connection.told_end = true;
                    let mut header = self.header(key, Op::Shutdown);
                    header.flags = NO_SEND;
                    self.control.push_back(header);
                }
                Ok(_) => return true,
                Err(Errno::AGAIN) => connection.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => self.break_off(key),
            }
        }
        true
    }

    /// `None` for a buffer without room, or where what was there a moment ago is gone.
    fn next_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some(header) = self.control.pop_front() {
            return Some((header, Vec::new()));
        }
        let key = self.ready_connection()?;
        let connection = self.connections.get_mut(&key)?;
        let mut data = vec![0; room.min(connection.credit() as usize)];
        let length = connection.stream.read(&mut data).ok().filter(|&length| length > 0)?;
        data.truncate(length);
        connection.sent = connection.sent.wrapping_add(length as u32);
        connection.told_forwarded = connection.forwarded;
        let mut header = self.header(key, Op::Data);
        header.length = length as u32;
        Some((header, data))
    }
}

impl DataPath for Vsock {
    fn start(&mut self, _features: u64, io: &Attachment) -> io::Result<()> {
        if !self.attached {
            io.add(self.programs.descriptor(), OWN_SOURCES, Trigger::Readable)?;
            self.attached = true;
        }
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        if index == TRANSMIT {
            let mut heard = 0;
            while !self.is_deaf() {
                if heard == PACKETS {
                    queues.serve_again(TRANSMIT);
                    break;
                }
                let Some(chain) = queues.take(TRANSMIT)? else { break };
                self.take(&chain);
                queues.push(TRANSMIT, chain.used, 0);
                heard += 1;
            }
            if heard > 0 {
                queues.interrupt(TRANSMIT);
            }
        }
        self.fill(queues)
    }

    fn ready(&mut self, queues: &mut Queues, _source: u32) -> Result<(), QueueError> {
        self.poll();
        self.fill(queues)
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.streams.clear();
        self.dials.clear();
        self.control.clear();
    }
}
