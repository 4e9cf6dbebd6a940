//! vSockets (Linux, net/vmw_vsock/vmci_transport.c): the host's end of connections with the
//! guest's ports, whose bytes are in queue pairs.
//!
//! Who connects sends a request with a size; who listens answers with the size that it takes; who
//! connects makes a queue pair of that and offers it; the other end attaches, and says so. From
//! then on a packet tells that something was written, or read.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use tetrarch_vsock::{
    CALLS, FIRST_PORT, Greeted, MAX_CONNECTIONS, Programs, Ready, free_port, welcome,
};

mod connection;
mod packet;

use connection::{Connection, Leaving, Phase};
pub use packet::{BYTES, RESOURCE};
use packet::{Kind, Packet, Protocol, STATES};

use crate::inbox::Inbox;
use crate::layout::Handle;
use crate::pairs::{Pairs, QueuePair};

/// Of a ring, at most: as much as Linux has by itself (VSOCK_DEFAULT_BUFFER_SIZE).
const MAX_RING: u64 = 256 << 10;
/// Packets of the guest that wait for the I/O thread, beyond which more are refused.
const MAX_HEARD: usize = 1024;
/// Modes of a shutdown: who sends it takes no more, gives no more.
const NO_RECEIVE: u64 = 1;
const NO_SEND: u64 = 2;

/// (port of the host, port of the guest)
type Key = (u32, u32);

/// Between ports that nobody has. A driver with sockets answers a packet of no connection with a
/// reset; one without is silent, and what it is asked is lost.
const PROBE: Key = (0, u32::MAX);

/// A connection of the guest to a program that has no room for another one yet.
struct Dial {
    protocol: Protocol,
    size: u64,
    calls: u32,
}

/// What there is of the guest.
pub struct Guest<'a> {
    /// Its driver hears of datagrams.
    pub listens: bool,
    pub pairs: &'a mut Pairs,
    pub inbox: &'a mut Inbox,
}

/// All connections of one device. The I/O thread's, but for what says otherwise.
pub struct Sockets {
    programs: Programs,
    connections: BTreeMap<Key, Connection>,
    /// Which connection a stream belongs to.
    streams: BTreeMap<u64, Key>,
    leaving: BTreeMap<u64, Leaving>,
    dials: BTreeMap<Key, Dial>,
    /// Streams that there may be something to do for.
    due: BTreeSet<u64>,
    /// The guest has sockets: something has come from them.
    proven: bool,
    /// Programs wait for that.
    waiting: bool,
    /// From the guest, not looked at yet.
    heard: VecDeque<Packet>,
    next_port: u32,
}

impl Sockets {
    /// `path` is what the listener is bound to.
    pub fn new(path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
            programs: Programs::new(path, listener)?,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            leaving: BTreeMap::new(),
            dials: BTreeMap::new(),
            due: BTreeSet::new(),
            proven: false,
            waiting: false,
            heard: VecDeque::new(),
            next_port: FIRST_PORT,
        })
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.programs.descriptor()
    }

    /// Ends all connections.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.streams.clear();
        self.leaving.clear();
        self.dials.clear();
        self.due.clear();
        (self.proven, self.waiting) = (false, false);
        self.heard.clear();
    }

    // On a vCPU's thread, which neither reads nor writes streams

    /// A packet of the guest's; false where too many wait. [`Sockets::work`] is due.
    pub fn hear(&mut self, payload: &[u8]) -> bool {
        if self.heard.len() >= MAX_HEARD {
            return false;
        }
        self.heard.extend(Packet::decode(payload));
        true
    }

    /// The guest has detached from a queue pair. [`Sockets::work`] is due.
    pub fn detached(&mut self, handle: Handle, mut pair: QueuePair) {
        let found = self.connections.iter().find(|(_, one)| one.pair == Some(handle));
        let Some((&key, _)) = found else { return };
        // What it has said before is of the connection that has ended, up to another request.
        let mut old = true;
        self.heard.retain(|packet| {
            let same = (packet.host, packet.guest) == key;
            old &= !(same && packet.is_request());
            !(same && old)
        });
        self.let_go(key, Some(&mut pair));
    }

    /// A connection whose guest has gone; an open one whose queue pair there is yet leaves.
    fn let_go(&mut self, key: Key, pair: Option<&mut QueuePair>) {
        let Some(connection) = self.connections.remove(&key) else { return };
        let id = connection.id;
        self.streams.remove(&id);
        if let (Phase::Open, Some(pair)) = (connection.phase, pair) {
            self.leaving.insert(id, connection.leave(pair));
            self.due.insert(id);
        }
    }

    // On the I/O thread

    /// Programs have come, or said something.
    pub fn ready(&mut self, guest: &mut Guest) {
        for ready in self.programs.ready() {
            match ready {
                Ready::Called => self.accept(guest),
                Ready::Again => {
                    for (key, to) in std::mem::take(&mut self.dials) {
                        self.call(guest, key, to);
                    }
                    self.give_up(guest);
                    self.accept(guest);
                }
                Ready::Stream(id) => {
                    if let Some(connection) = self.connection_of(id) {
                        connection.readable = true;
                    }
                    self.due.insert(id);
                }
            }
        }
    }

    /// Hears the guest, and moves bytes. Gives whether there is more to do at once.
    pub fn work(&mut self, guest: &mut Guest) -> bool {
        while !guest.inbox.is_full()
            && let Some(packet) = self.heard.pop_front()
        {
            self.take(guest, packet);
        }
        if self.proven && self.waiting {
            self.ask_all(guest);
        }
        let mut later = BTreeSet::new();
        while !guest.inbox.is_full()
            && let Some(id) = self.due.pop_first()
        {
            if let Some(leaving) = self.leaving.get_mut(&id) {
                if leaving.is_over() {
                    self.leaving.remove(&id);
                }
            } else if self.serve(guest, id) {
                later.insert(id);
            }
        }
        let more = !later.is_empty() && !guest.inbox.is_full();
        self.due.append(&mut later);
        more
    }

    /// Ends those that the guest has not answered for: a driver without sockets says nothing.
    fn give_up(&mut self, guest: &mut Guest) {
        let begun = self.connections.iter_mut().filter(|(_, one)| one.is_beginning());
        let late: Vec<Key> = begun
            .filter_map(|(&key, one)| {
                one.calls += 1;
                (one.calls > CALLS).then_some(key)
            })
            .collect();
        for key in late {
            self.break_off(guest, key);
        }
        if self.connections.values().any(Connection::is_beginning) {
            self.programs.call_again();
        }
        self.probe(guest);
    }

    /// Asks for a sign of the guest's sockets where somebody waits for one.
    fn probe(&self, guest: &mut Guest) {
        let waits = self.connections.values().any(|one| one.phase == Phase::Waiting);
        if waits && !self.proven && !guest.inbox.is_full() {
            self.tell(guest, PROBE, Kind::Wrote, [0; 2]);
        }
    }

    fn connection_of(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.get_mut(self.streams.get(&id)?)
    }

    fn tell(&self, guest: &mut Guest, key: Key, kind: Kind, words: [u64; 2]) {
        guest.inbox.push(Packet { words, ..Packet::new(kind, key) }.encode());
    }

    fn count(&self) -> usize {
        self.connections.len() + self.leaving.len() + self.dials.len()
    }

    fn add(&mut self, key: Key, connection: Connection) {
        self.due.insert(connection.id);
        self.streams.insert(connection.id, key);
        self.connections.insert(key, connection);
    }

    fn remove(&mut self, guest: &mut Guest, key: Key) {
        self.dials.remove(&key);
        if let Some(connection) = self.connections.remove(&key) {
            self.streams.remove(&connection.id);
            if let Some(handle) = connection.pair {
                guest.pairs.leave(handle, guest.inbox);
            }
        }
    }

    /// Ends a connection and tells the guest.
    fn break_off(&mut self, guest: &mut Guest, key: Key) {
        self.tell(guest, key, Kind::Reset, [0; 2]);
        self.remove(guest, key);
    }

    /// Gives whether there may be more.
    fn serve(&mut self, guest: &mut Guest, id: u64) -> bool {
        let Some(&key) = self.streams.get(&id) else { return false };
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if connection.phase == Phase::Greeting {
            self.greet(guest, key);
            return false;
        }
        let pair = connection.pair.and_then(|handle| guest.pairs.get_mut(handle));
        let (Phase::Open, Some(pair)) = (connection.phase, pair) else { return false };
        let mut notices = Vec::new();
        let exchanged = connection.exchange(pair, &mut notices);
        let over = connection.is_over();
        for (kind, words) in notices {
            self.tell(guest, key, kind, words);
        }
        match exchanged {
            Ok(more) if !over => return more,
            // The guest hears that our end of the queue pair is gone.
            Ok(_) => self.remove(guest, key),
            Err(_) => self.break_off(guest, key),
        }
        false
    }

    // From the guest

    fn take(&mut self, guest: &mut Guest, packet: Packet) {
        let key = (packet.host, packet.guest);
        self.proven = true;
        let [word, _] = packet.words;
        let states = packet.protocol & STATES != 0;
        match packet.kind {
            Some(Kind::Reset) => self.reset(guest, key),
            Some(Kind::Request) => self.open(guest, key, Protocol::Asked, word),
            Some(Kind::Request2) if states => self.open(guest, key, Protocol::States, word),
            Some(kind) => {
                if !self.act(guest, key, kind, packet.protocol, word) {
                    self.break_off(guest, key);
                }
            }
            // It is to try what is older.
            None => self.tell(guest, key, Kind::Invalid, [0; 2]),
        }
    }

    /// The guest's socket is gone, perhaps before it has detached: what it has written before is
    /// the program's.
    fn reset(&mut self, guest: &mut Guest, key: Key) {
        self.dials.remove(&key);
        if let Some(handle) = self.connections.get(&key).and_then(|one| one.pair) {
            self.let_go(key, guest.pairs.get_mut(handle));
            guest.pairs.leave(handle, guest.inbox);
        }
        self.remove(guest, key);
    }

    fn open(&mut self, guest: &mut Guest, key: Key, protocol: Protocol, size: u64) {
        match self.connections.get(&key).map(|one| one.phase) {
            // Of a socket that has the port of one that is gone, but has not detached yet.
            None | Some(Phase::Told | Phase::Open) => self.reset(guest, key),
            Some(_) => return self.break_off(guest, key),
        }
        if size == 0 || self.count() >= MAX_CONNECTIONS {
            return self.break_off(guest, key);
        }
        self.call(guest, key, Dial { protocol, size: size.min(MAX_RING), calls: 0 });
    }

    /// Connects to who listens for a port of the host.
    fn call(&mut self, guest: &mut Guest, key: Key, mut to: Dial) {
        let dialed = self.programs.dial(key.0).and_then(|stream| {
            let id = self.programs.watch(&stream)?;
            Ok(Connection::new(stream, id, Phase::Told))
        });
        match dialed {
            Ok(mut connection) => {
                connection.protocol = to.protocol;
                connection.size = to.size;
                self.add(key, connection);
                self.programs.call_again();
                let mut answer = match to.protocol {
                    Protocol::Asked => Packet::new(Kind::Negotiate, key),
                    Protocol::States => Packet::new(Kind::Negotiate2, key),
                };
                if to.protocol == Protocol::States {
                    answer.protocol = STATES;
                }
                answer.words[0] = to.size;
                guest.inbox.push(answer.encode());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && to.calls < CALLS => {
                to.calls += 1;
                self.dials.insert(key, to);
                self.programs.call_again();
            }
            Err(_) => self.tell(guest, key, Kind::Reset, [0; 2]),
        }
    }

    /// False where the packet is none for the connection, or there is none.
    fn act(&mut self, guest: &mut Guest, key: Key, kind: Kind, protocol: u16, word: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        self.due.insert(connection.id);
        match (connection.phase, kind) {
            (Phase::Asked(Protocol::States), Kind::Negotiate2) if protocol == STATES => {
                return self.offer(guest, key, word);
            }
            (Phase::Asked(Protocol::Asked), Kind::Negotiate) => {
                connection.protocol = Protocol::Asked;
                return self.offer(guest, key, word);
            }
            (Phase::Asked(Protocol::States), Kind::Invalid) => {
                connection.phase = Phase::Asked(Protocol::Asked);
                self.tell(guest, key, Kind::Request, [MAX_RING, 0]);
            }
            (Phase::Told, Kind::Offer) => {
                let handle = Handle::of(word);
                if !guest.pairs.attach(handle, connection.size, guest.inbox) {
                    return false;
                }
                connection.pair = Some(handle);
                connection.phase = Phase::Open;
                self.tell(guest, key, Kind::Attach, [word, 0]);
            }
            (Phase::Offered, Kind::Attach) => {
                let attached = connection.pair == Some(Handle::of(word))
                    && guest.pairs.get_mut(Handle::of(word)).is_some();
                if !attached {
                    return false;
                }
                connection.phase = Phase::Open;
                connection.out.extend(welcome(key.0));
            }
            (Phase::Open, Kind::Wrote) => connection.told_reading = false,
            (Phase::Open, Kind::Read) => connection.told_writing = false,
            (Phase::Open, Kind::WaitingRead) => connection.waits_to_read = true,
            (Phase::Open, Kind::WaitingWrite) => connection.waits_to_write = true,
            (Phase::Open, Kind::Shutdown) => {
                connection.deaf |= word & NO_RECEIVE != 0;
                connection.finished |= word & NO_SEND != 0;
            }
            _ => return false,
        }
        true
    }

    /// The guest takes a connection with rings of a size: it is to attach to ours.
    fn offer(&mut self, guest: &mut Guest, key: Key, size: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&key) else { return false };
        if !(1..=MAX_RING).contains(&size) {
            return false;
        }
        let handle = guest.pairs.offer(size);
        connection.size = size;
        connection.pair = Some(handle);
        connection.phase = Phase::Offered;
        self.tell(guest, key, Kind::Offer, [handle.word(), 0]);
        true
    }

    // From the host

    /// Takes all who have called.
    fn accept(&mut self, guest: &mut Guest) {
        while let Some(stream) = self.programs.accept() {
            if self.count() >= MAX_CONNECTIONS {
                continue; // closed again
            }
            let Ok(id) = self.programs.watch(&stream) else { continue };
            self.greeted_later(guest, stream, id);
        }
    }

    fn greeted_later(&mut self, guest: &mut Guest, stream: UnixStream, id: u64) {
        // Until it says a port of the guest it has the key of none.
        let key = (self.free_port(), 0);
        self.add(key, Connection::new(stream, id, Phase::Greeting));
        self.greet(guest, key);
    }

    fn free_port(&mut self) -> u32 {
        let taken = |port| self.connections.range((port, 0)..=(port, u32::MAX)).next().is_some();
        free_port(&mut self.next_port, taken)
    }

    /// Reads which port the host's program wants.
    fn greet(&mut self, guest: &mut Guest, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match connection.greeting.read(&connection.stream) {
            Greeted::Port(port) => self.ask(guest, key, port),
            Greeted::NotYet => {}
            Greeted::Nothing => self.remove(guest, key), // closed
        }
    }

    fn ask(&mut self, guest: &mut Guest, key: Key, port: u32) {
        if !guest.listens || guest.inbox.is_full() {
            return self.remove(guest, key); // closed: nobody is there
        }
        let Some(mut connection) = self.connections.remove(&key) else { return };
        self.programs.call_again();
        connection.phase = Phase::Waiting;
        self.waiting = true;
        self.add((key.0, port), connection);
        if self.proven {
            self.ask_all(guest);
        } else {
            self.probe(guest);
        }
    }

    /// Asks for the connections that wait for the guest's sockets.
    fn ask_all(&mut self, guest: &mut Guest) {
        self.waiting = false;
        for (&key, one) in &mut self.connections {
            if one.phase == Phase::Waiting {
                one.phase = Phase::Asked(Protocol::States);
                let mut packet = Packet::new(Kind::Request2, key);
                packet.protocol = STATES;
                packet.words[0] = MAX_RING;
                guest.inbox.push(packet.encode());
            }
        }
    }
}
