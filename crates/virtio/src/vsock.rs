//! Socket device (5.10): connections between the guest's vsock ports and Unix sockets.
//!
//! As Firecracker's users know it: a program of the host connects to PATH, writes
//! "CONNECT port\n" and gets "OK port\n" when a program in the guest has accepted; one of
//! the guest that connects to port N of the host meets who listens at PATH_N.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tetrarch_io::{Attachment, Trigger};

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError};
use crate::queues::Queues;

mod dial;
mod packet;
#[cfg(test)]
mod tests;

use dial::{Dial, dial};
use packet::{Header, Op};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// The host's CID (vsock(7)).
const HOST: u64 = 2;
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
const MAX_CONNECTIONS: usize = 1024;
/// "CONNECT 4294967295\n" and room to spare.
const MAX_GREETING: usize = 32;
/// Ports of the host for connections that begin there (as in vsock(7): not yet in use).
const FIRST_PORT: u32 = 1 << 30;

/// Answers that wait for buffers of the guest, beyond which it is not heard (5.10.6.1.2).
const MAX_ANSWERS: usize = 1024;

/// A program that listens and is too busy to accept is called again so often, in this time:
/// 2 s in all, after which Linux's connect(2) gives up too.
const CALLS: u32 = 100;
const CALL_AGAIN_NS: i64 = 20_000_000;

/// Epoll data of the listener and of the timer; streams have the numbers from 0 on.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

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
    greeting: Vec<u8>,
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
            greeting: Vec::new(),
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
        while !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match self.stream.write(first) {
                Ok(written) => {
                    self.out.drain(..written);
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.finished {
            // A program that has gone already is no error here.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }
}

/// The data path of one socket device.
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    epoll: rustix::fd::OwnedFd,
    attached: bool,
    connections: BTreeMap<Key, Connection>,
    /// Which connection a stream belongs to, by its epoll data.
    streams: BTreeMap<u64, Key>,
    next_stream: u64,
    next_port: u32,
    /// Connections whose program on the host has no room for another one yet.
    dials: BTreeMap<Key, Dial>,
    timer: rustix::fd::OwnedFd,
    /// The log knows that programs wait until this process has descriptors for them.
    told_waiting: bool,
    /// Packets without data that wait for a buffer of the guest.
    control: VecDeque<Header>,
    /// The guest is to be told that all connections are gone (5.10.6.8).
    transport_reset: bool,
}

impl Vsock {
    /// `path` is what the listener is bound to.
    pub fn new(cid: u64, path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(LISTENER);
        // Edges: one that cannot be accepted does not come again and again.
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, data, edges)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;
        Ok(Self {
            cid,
            path,
            listener,
            epoll,
            attached: false,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_stream: 0,
            next_port: FIRST_PORT,
            dials: BTreeMap::new(),
            timer,
            told_waiting: false,
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
        stream.set_nonblocking(true)?;
        let id = self.next_stream;
        self.next_stream += 1;
        // Edges: a stream that the guest has no room for does not come again and again.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(id), flags)?;
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

    /// Connects to who listens for a port of the host. Nothing here waits: other devices have
    /// the same thread.
    fn call(&mut self, key: Key, mut to: Dial) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.0));
        match dial(&path).and_then(|stream| self.watch(stream, Phase::Open)) {
            Ok(mut connection) => {
                connection.guest_buffer = to.buffer;
                connection.guest_forwarded = to.forwarded;
                self.add(key, connection);
                self.tell(key, Op::Response);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && to.calls < CALLS => {
                to.calls += 1;
                self.dials.insert(key, to);
                self.call_again();
            }
            Err(_) => self.tell(key, Op::Reset),
        }
    }

    /// Has [`call`](Self::call) and [`accept`](Self::accept) be made again in a while.
    fn call_again(&self) {
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: 0, tv_nsec: CALL_AGAIN_NS },
        };
        // It fails only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }

    fn act(&mut self, key: Key, op: Op, header: &Header, chain: &Chain) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match op {
            Op::Response if connection.phase == Phase::Asked => {
                connection.phase = Phase::Open;
                connection.out.extend(format!("OK {}\n", key.0).into_bytes());
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
        let mut events = Vec::with_capacity(64);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let room = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, room, Some(&now)).is_err() {
            return;
        }
        for event in events {
            let data = event.data.u64();
            if data == LISTENER {
                self.accept();
            } else if data == TIMER {
                // Reading is what makes it not ready again.
                let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
                for (key, to) in std::mem::take(&mut self.dials) {
                    self.call(key, to);
                }
                self.accept();
            } else if let Some(&key) = self.streams.get(&data) {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.readable = true;
                }
                self.flush(key);
                self.greet(key);
            }
        }
    }

    /// Takes all who have called. One whom the host gives no descriptor waits in the backlog.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.wait_for_descriptors(&error);
                    return;
                }
            };
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

    fn wait_for_descriptors(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.told_waiting, true) {
            log::warn!(
                "vsock: programs that connect to {} wait, since the host has nothing for them: \
                 {error}; raise the limit of open files: ulimit -n",
                self.path.display()
            );
        }
        self.call_again();
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if self.connections.range((port, 0)..=(port, u32::MAX)).next().is_none() {
                return port;
            }
        }
    }

    /// Reads which port the host's program wants: byte by byte, for what follows is the
    /// guest's.
    fn greet(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        while connection.phase == Phase::Greeting {
            let mut byte = [0];
            match connection.stream.read(&mut byte) {
                Ok(1) if byte[0] != b'\n' && connection.greeting.len() < MAX_GREETING => {
                    connection.greeting.push(byte[0]);
                }
                Ok(1) => {
                    let line = String::from_utf8_lossy(&connection.greeting);
                    let port = line.trim().strip_prefix("CONNECT ").map(str::parse::<u32>);
                    let Some(Ok(port)) = port else { break };
                    self.ask(key, port);
                    return;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        if self.connections.get(&key).is_some_and(|one| one.phase == Phase::Greeting) {
            self.remove(key); // no greeting: closed
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
            io.add(self.epoll.as_fd(), OWN_SOURCES, Trigger::Readable)?;
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
