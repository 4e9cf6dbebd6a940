//! The socket device between a driver's rings and programs on Unix sockets.

use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tetrarch_bus::Interrupt;
use tetrarch_io::IoThread;
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::*;
use crate::device::{Control, Device, QueueSetup};
use crate::queue::QueueConfig;

const CID: u64 = 3;
const SIZE: u16 = 64;
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 0x1_1000;
const LIMIT: Duration = Duration::from_secs(30);

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self) {}
}

/// A guest: split rings, and what has come on the receive queue.
struct Guest {
    memory: Arc<GuestMemory>,
    device: Device<Vsock>,
    path: PathBuf,
    _io: IoThread,
    next: [u16; 3],
    seen: u16,
    received: VecDeque<(Header, Vec<u8>)>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Guest {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tetrarch-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let memory = Arc::new(GuestMemory::new(16 << 20).unwrap());
        let io = IoThread::new("test").unwrap();
        let vsock = Vsock::new(CID, path.clone(), listener).unwrap();
        let device = Device::new(&io, Arc::clone(&memory), "vsock", 3, vsock).unwrap();
        let setup = |queue: u64| {
            let base = RINGS + 0x4000 * queue;
            Some(QueueSetup {
                config: QueueConfig {
                    size: SIZE,
                    descriptors: GuestPhys(base),
                    driver: GuestPhys(base + 0x1000),
                    device: GuestPhys(base + 0x2000),
                    ..QueueConfig::default()
                },
                position: None,
                interrupt: Arc::new(Nobody),
            })
        };
        device.start(0, (0..3).map(setup).collect(), Arc::new(Nobody)).unwrap();
        let mut guest = Self {
            memory,
            device,
            path,
            _io: io,
            next: [0; 3],
            seen: 0,
            received: VecDeque::new(),
        };
        for _ in 0..SIZE {
            guest.offer_buffer();
        }
        guest
    }

    fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(GuestPhys(address), data).unwrap();
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read(GuestPhys(address), &mut data).unwrap();
        data
    }

    fn offer(&mut self, queue: usize, address: u64, length: u32, flags: u16) {
        let base = RINGS + 0x4000 * queue as u64;
        let slot = self.next[queue] % SIZE;
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0, 0]);
        self.put(base + 16 * u64::from(slot), &descriptor);
        self.put(base + 0x1004 + 2 * u64::from(slot), &slot.to_le_bytes());
        self.next[queue] = self.next[queue].wrapping_add(1);
        self.put(base + 0x1002, &self.next[queue].to_le_bytes());
        self.device.doorbells()[queue].signal();
    }

    fn offer_buffer(&mut self) {
        let slot = u64::from(self.next[RECEIVE] % SIZE);
        self.offer(RECEIVE, BUFFERS + BUFFER_BYTES * slot, BUFFER_BYTES as u32, 2);
    }

    fn send(&mut self, mut header: Header, data: &[u8]) {
        header.source_cid = CID;
        header.kind = STREAM;
        header.length = data.len() as u32;
        let slot = u64::from(self.next[TRANSMIT] % SIZE);
        let at = BUFFERS + BUFFER_BYTES * (u64::from(SIZE) + slot);
        self.put(at, &header.encode());
        self.put(at + Header::BYTES as u64, data);
        let before = self.next[TRANSMIT];
        self.offer(TRANSMIT, at, (Header::BYTES + data.len()) as u32, 0);
        // Its buffer is used again only when it is back.
        let start = Instant::now();
        while self.get(RINGS + 0x4000 + 0x2002, 2) != before.wrapping_add(1).to_le_bytes() {
            assert!(start.elapsed() < LIMIT, "a packet is not taken");
            std::thread::yield_now();
        }
    }

    fn packet(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            self.collect();
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            assert!(start.elapsed() < LIMIT, "no packet comes");
            std::thread::yield_now();
        }
    }

    fn collect(&mut self) {
        let used = self.get(RINGS + 0x2002, 2);
        while self.seen.to_le_bytes() != used[..] {
            let at = RINGS + 0x2004 + 8 * u64::from(self.seen % SIZE);
            let entry = self.get(at, 8);
            let slot = u64::from(entry[0]);
            let written = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]) as usize;
            let bytes = self.get(BUFFERS + BUFFER_BYTES * slot, written);
            let (header, data) = bytes.split_first_chunk().unwrap();
            self.received.push_back((Header::decode(header), data.to_vec()));
            self.seen = self.seen.wrapping_add(1);
            self.offer_buffer();
        }
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, data) = self.packet();
        assert_eq!((Op::of(header.op), data.len()), (Some(op), 0), "{header:?}");
        header
    }
}

fn to_host(host: u32, guest: u32, op: Op) -> Header {
    Header {
        destination_cid: HOST,
        source_port: guest,
        destination_port: host,
        op: op as u16,
        buffer: 1 << 20,
        ..Header::default()
    }
}

/// A connection that a program of the host has made; the host's port, and the program's end.
fn connected(guest: &mut Guest, port: u32) -> (u32, UnixStream) {
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("CONNECT {port}\nearly").as_bytes()).unwrap();
    let asked = guest.expect(Op::Request);
    assert_eq!((asked.destination_port, asked.destination_cid), (port, CID));
    let host = asked.source_port;
    guest.send(to_host(host, port, Op::Response), b"");
    let mut line = String::new();
    io::BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {host}\n"));
    let (header, data) = guest.packet();
    assert_eq!((Op::of(header.op), data.as_slice()), (Some(Op::Data), &b"early"[..]));
    (host, stream)
}

#[test]
fn program_of_the_host_talks_to_a_port_of_the_guest() {
    let mut guest = Guest::new("host");
    let (host, mut stream) = connected(&mut guest, 5000);
    guest.send(to_host(host, 5000, Op::Data), b"from the guest");
    let mut text = [0; 14];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");
    stream.write_all(b"from the host").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.packet().1, b"from the host");
    let over = guest.expect(Op::Shutdown);
    assert_eq!(over.flags, NO_SEND);
    // Half of it is open still.
    guest.send(to_host(host, 5000, Op::Data), b"!");
    stream.read_exact(&mut text[..1]).unwrap();
    let mut end = to_host(host, 5000, Op::Shutdown);
    end.flags = NO_SEND | NO_RECEIVE;
    guest.send(end, b"");
    guest.expect(Op::Reset);
    assert_eq!(stream.read(&mut text).unwrap(), 0);
}

#[test]
fn guest_reaches_who_listens_and_is_refused_where_nobody_does() {
    let mut guest = Guest::new("guest");
    guest.send(to_host(80, 1234, Op::Request), b"");
    assert_eq!(guest.expect(Op::Reset).destination_port, 1234);
    let path = format!("{}_80", guest.path.display());
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    guest.send(to_host(80, 1234, Op::Request), b"");
    guest.expect(Op::Response);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"hello").unwrap();
    assert_eq!(guest.packet().1, b"hello");
    drop(stream);
    guest.expect(Op::Shutdown);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn neither_side_sends_more_than_the_other_has_room_for() {
    let mut guest = Guest::new("credit");
    let (host, mut stream) = connected(&mut guest, 9);
    // The guest says that it has room for 1000 bytes more.
    let mut update = to_host(host, 9, Op::CreditUpdate);
    update.buffer = 1000;
    update.forwarded = 5;
    guest.send(update, b"");
    stream.write_all(&[7; 5000]).unwrap();
    let mut got = 0;
    while got < 1000 {
        got += guest.packet().1.len();
    }
    assert_eq!(got, 1000);
    std::thread::sleep(Duration::from_millis(50));
    guest.collect();
    assert!(guest.received.is_empty(), "beyond its room");
    update.forwarded = 1005;
    update.buffer = 1 << 20;
    guest.send(update, b"");
    while got < 5000 {
        got += guest.packet().1.len();
    }
    // And the other way: nobody reads, so at most BUFFER beside what the socket holds.
    let mut sent = 0_u64;
    loop {
        guest.send(to_host(host, 9, Op::Data), &[1; 60_000]);
        sent += 60_000;
        guest.collect();
        if let Some((header, _)) =
            guest.received.drain(..).find(|(header, _)| header.op == Op::Reset as u16)
        {
            assert_eq!(header.source_port, host);
            break;
        }
        assert!(sent < 4 << 20, "a guest that ignores its credit is cut off");
    }
}

/// Bytes of a stream in which every word says where it is.
fn stretch(offset: u64, length: usize) -> Vec<u8> {
    let words = offset / 8..=(offset + length as u64) / 8;
    let bytes = words.flat_map(u64::to_le_bytes);
    bytes.skip((offset % 8) as usize).take(length).collect()
}

/// A program of the host sends back what the guest sends to it, in packets of `length` bytes.
fn echo(name: &str, total: u64, length: usize) {
    let mut guest = Guest::new(name);
    let (host, stream) = connected(&mut guest, 7);
    let mut reader = stream.try_clone().unwrap();
    let program = std::thread::spawn(move || {
        let mut writer = reader.try_clone().unwrap();
        io::copy(&mut (&mut reader).take(total), &mut writer).unwrap();
    });
    let (mut sent, mut got, mut room) = (0_u64, 0_u64, BUFFER);
    let mut changed = Instant::now();
    while got < total {
        assert!(changed.elapsed() < LIMIT, "of {sent} bytes {got} came back");
        let length = length.min((total - sent) as usize);
        let (op, data) = if length > 0 && room >= length as u32 {
            (Op::Data, stretch(sent, length))
        } else {
            (Op::CreditRequest, Vec::new())
        };
        let mut header = to_host(host, 7, op);
        header.forwarded = 5 + got as u32;
        guest.send(header, &data);
        sent += data.len() as u64;
        room -= data.len() as u32;
        guest.collect();
        while let Some((header, data)) = guest.received.pop_front() {
            assert!(data == stretch(got, data.len()), "what came back at {got} is something else");
            got += data.len() as u64;
            room = BUFFER.saturating_sub((sent as u32).wrapping_sub(header.forwarded));
            changed = Instant::now();
        }
    }
    program.join().unwrap();
    assert_eq!((sent, got), (total, total));
}

#[test]
fn megabytes_go_both_ways_whole() {
    echo("bulk", 4 << 20, 4096);
}

/// More than the counters of credit hold.
#[test]
#[ignore = "gigabytes"]
fn gigabytes_go_both_ways_whole() {
    echo("gigabytes", 5 << 30, 60_000);
}

#[test]
fn packets_of_no_connection_and_greetings_of_none_end_in_a_reset_or_a_close() {
    let mut guest = Guest::new("bad");
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::CreditRequest, Op::CreditUpdate] {
        guest.send(to_host(1, 2, op), b"x");
        guest.expect(Op::Reset);
    }
    let mut wrong = to_host(1, 2, Op::Request);
    wrong.destination_cid = 99;
    guest.send(wrong, b"");
    guest.expect(Op::Reset);
    guest.send(to_host(1, 2, Op::Reset), b"");
    let mut lying = to_host(1, 2, Op::Request);
    lying.op = 77;
    guest.send(lying, b"");
    guest.expect(Op::Reset);
    for greeting in ["HELLO 5\n", "CONNECT \n", "CONNECT 4294967296\n", &"x".repeat(100)] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        let _ = stream.write_all(greeting.as_bytes());
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)), "{greeting}");
    }
    connected(&mut guest, 4000);
}

/// Who listens at a port of the host and has room for one connection that it does not accept.
fn busy_listener(guest: &Guest, port: u32) -> (UnixListener, UnixStream, PathBuf) {
    let path = PathBuf::from(format!("{}_{port}", guest.path.display()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let first = guest.device.with_path(|vsock, _| {
        let first = vsock.programs.dial(port).unwrap();
        assert_eq!(vsock.programs.dial(port).unwrap_err().kind(), ErrorKind::WouldBlock);
        first
    });
    (listener, first, path)
}

#[test]
fn program_that_is_busy_is_called_again_and_nobody_waits_for_it() {
    let mut guest = Guest::new("busy");
    let (listener, _first, path) = busy_listener(&guest, 81);
    guest.send(to_host(81, 1234, Op::Request), b"");
    // A second time is against the rules, and the end of both.
    guest.send(to_host(81, 1235, Op::Request), b"");
    guest.send(to_host(81, 1235, Op::Request), b"");
    assert_eq!(guest.expect(Op::Reset).destination_port, 1235);
    let (host, mut stream) = connected(&mut guest, 5000);
    guest.send(to_host(host, 5000, Op::Data), b"meanwhile");
    stream.read_exact(&mut [0; 9]).unwrap();
    drop(listener.accept().unwrap());
    assert_eq!(guest.expect(Op::Response).destination_port, 1234);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(to_host(81, 1234, Op::Data), b"hello");
    stream.read_exact(&mut [0; 5]).unwrap();
    std::fs::remove_file(path).unwrap();
}

#[test]
fn program_that_never_accepts_is_given_up() {
    let mut guest = Guest::new("never");
    let (_listener, _first, path) = busy_listener(&guest, 82);
    guest.send(to_host(82, 1234, Op::Request), b"");
    assert_eq!(guest.expect(Op::Reset).destination_port, 1234);
    assert!(guest.device.with_path(|path, _| path.dials.is_empty()));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn guest_that_takes_no_answers_is_not_heard_until_it_does() {
    let mut guest = Guest::new("deaf");
    let packets = usize::from(SIZE) + MAX_ANSWERS;
    for _ in 0..packets {
        guest.send(to_host(1, 2, Op::Data), b"x");
    }
    let header = Header { source_cid: CID, kind: STREAM, ..to_host(1, 2, Op::Data) };
    guest.put(BUFFERS + BUFFER_BYTES * 100, &header.encode());
    for _ in 0..10 {
        guest.offer(TRANSMIT, BUFFERS + BUFFER_BYTES * 100, Header::BYTES as u32, 0);
    }
    let waiting = guest.device.with_path(|path, queues| {
        path.serve(queues, TRANSMIT).unwrap();
        path.control.len()
    });
    assert_eq!(waiting, MAX_ANSWERS);
    for _ in 0..packets + 10 {
        guest.expect(Op::Reset);
    }
    connected(&mut guest, 4000);
}
