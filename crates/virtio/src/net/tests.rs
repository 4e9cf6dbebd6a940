//! The network device between a driver's rings and a back end that does as it is told.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tetrarch_bus::Interrupt;
use tetrarch_io::{Event, IoThread};
use tetrarch_memory::{GuestMemory, GuestPhys};
use tetrarch_net::{Family, Joined, Segments};

use super::*;
use crate::device::{Control, Device, QueueSetup};
use crate::queue::QueueConfig;

const SIZE: u16 = 16;
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u64 = 0x1_1000;
const LIMIT: Duration = Duration::from_secs(30);
const MAC: MacAddress = [2, 0, 0, 0, 0, 1];
const WRITE: u16 = 2;
const NEXT: u16 = 1;

#[derive(Default)]
struct Count(AtomicU64);

impl Interrupt for Count {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a test has of a back end.
#[derive(Default)]
struct Wire {
    coming: VecDeque<(Offload, Vec<u8>)>,
    sent: Vec<(Offload, Vec<u8>)>,
    /// Packets that are taken before it is busy.
    room: usize,
    down: bool,
    accepted: Option<Offloads>,
    enabled: bool,
    interest: Option<Interest>,
}

#[derive(Clone)]
struct Mock(Arc<Mutex<Wire>>, Arc<Event>);

impl Mock {
    fn new() -> Self {
        let wire = Wire { room: usize::MAX, ..Wire::default() };
        Self(Arc::new(Mutex::new(wire)), Arc::new(Event::new().unwrap()))
    }

    fn change(&self, body: impl FnOnce(&mut Wire)) {
        body(&mut self.0.lock());
        self.1.signal();
    }

    fn comes(&self, offload: Offload, bytes: &[u8]) {
        self.change(|wire| wire.coming.push_back((offload, bytes.to_vec())));
    }

    fn sent(&self) -> usize {
        self.0.lock().sent.len()
    }
}

impl NetBackend for Mock {
    fn event(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        let mut wire = self.0.lock();
        wire.interest = Some(interest);
        let due = interest.receive && !wire.coming.is_empty();
        if due || (interest.send && wire.room > 0) {
            self.1.signal();
        }
    }

    fn work(&mut self) {
        self.1.take();
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn accept(&mut self, offloads: Offloads) {
        self.0.lock().accepted = Some(offloads);
    }

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let mut wire = self.0.lock();
        if wire.room == 0 {
            return Sent::Busy;
        }
        wire.room -= 1;
        let mut bytes = Vec::new();
        packet.copy_to(&mut bytes);
        wire.sent.push((packet.offload, bytes));
        Sent::Taken
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let Some((offload, bytes)) = self.0.lock().coming.pop_front() else { return false };
        frame.set(offload, &bytes);
        true
    }

    fn enable(&mut self, on: bool) {
        self.0.lock().enabled = on;
    }

    fn link(&self) -> bool {
        !self.0.lock().down
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    device: Device<Net>,
    _io: IoThread,
    wires: Vec<Mock>,
    counters: Arc<Counters>,
    config: Arc<NetConfig>,
    changes: Arc<Count>,
    features: u64,
    next: Vec<u16>,
    seen: Vec<u16>,
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

fn frame(number: u8, length: usize) -> Vec<u8> {
    let mut frame = [MAC, [2, 0, 0, 0, 0, 9]].concat();
    frame.extend([0x88, 0xB5, number]);
    frame.resize(length, number);
    frame
}

impl Guest {
    fn with(features: u64, pairs: usize) -> Self {
        let wires: Vec<Mock> = (0..pairs).map(|_| Mock::new()).collect();
        let backends = wires.iter().map(|wire| Box::new(wire.clone()) as Box<dyn NetBackend>);
        let mut guest = Self::of(features, backends.collect(), Arc::default());
        guest.wires = wires;
        guest
    }

    fn of(features: u64, backends: Vec<Box<dyn NetBackend>>, counters: Arc<Counters>) -> Self {
        let memory = Arc::new(GuestMemory::new(16 << 20).unwrap());
        let io = IoThread::new("test").unwrap();
        let queues = 2 * backends.len() + 1;
        let net = Net::new(MAC, backends, Arc::clone(&counters));
        let config = net.config();
        let device = Device::new(&io, Arc::clone(&memory), "net", queues, net).unwrap();
        let mut guest = Self {
            memory,
            device,
            _io: io,
            wires: Vec::new(),
            counters,
            config,
            changes: Arc::default(),
            features,
            next: vec![0; queues],
            seen: vec![0; queues],
        };
        guest.start();
        guest
    }

    fn new(features: u64) -> Self {
        Self::with(features, 1)
    }

    fn start(&mut self) {
        let queues = self.next.len();
        (self.next, self.seen) = (vec![0; queues], vec![0; queues]);
        let setup = |queue: u64| {
            let base = RINGS + 0x4000 * queue;
            self.put(base, &[0; 0x4000]);
            Some(QueueSetup {
                config: QueueConfig {
                    size: SIZE,
                    descriptors: GuestPhys(base),
                    driver: GuestPhys(base + 0x1000),
                    device: GuestPhys(base + 0x2000),
                    ..QueueConfig::default()
                },
                position: None,
                interrupt: Arc::new(Count::default()),
            })
        };
        let setups = (0..queues as u64).map(setup).collect();
        self.device.start(self.features, setups, Arc::clone(&self.changes) as _).unwrap();
    }

    fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(GuestPhys(address), data).unwrap();
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read(GuestPhys(address), &mut data).unwrap();
        data
    }

    /// Makes one chain of buffers available; its first descriptor is the `slot`th.
    fn offer_at(&mut self, queue: usize, slot: u16, buffers: &[(u64, u32, u16)]) {
        let base = RINGS + 0x4000 * queue as u64;
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let at = (slot + index as u16) % SIZE;
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend((flags | more).to_le_bytes());
            descriptor.extend(((at + 1) % SIZE).to_le_bytes());
            self.put(base + 16 * u64::from(at), &descriptor);
        }
        let entry = u64::from(self.next[queue] % SIZE);
        self.put(base + 0x1004 + 2 * entry, &slot.to_le_bytes());
        self.next[queue] = self.next[queue].wrapping_add(1);
        self.put(base + 0x1002, &self.next[queue].to_le_bytes());
        self.device.doorbells()[queue].signal();
    }

    fn offer(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let slot = self.next[queue] * buffers.len() as u16 % SIZE;
        self.offer_at(queue, slot, buffers);
    }

    fn used_index(&self, queue: usize) -> u16 {
        let data = self.get(RINGS + 0x4000 * queue as u64 + 0x2002, 2);
        u16::from_le_bytes([data[0], data[1]])
    }

    /// How much was written to the next used chain.
    fn wait(&mut self, queue: usize) -> u32 {
        until("nothing is given back", || self.used_index(queue) != self.seen[queue]);
        let entry = u64::from(self.seen[queue] % SIZE);
        let data = self.get(RINGS + 0x4000 * queue as u64 + 0x2004 + 8 * entry + 4, 4);
        self.seen[queue] = self.seen[queue].wrapping_add(1);
        u32::from_le_bytes([data[0], data[1], data[2], data[3]])
    }

    fn buffer(&self, queue: usize) -> u64 {
        BUFFERS + BUFFER * (u64::from(SIZE) * queue as u64 + u64::from(self.next[queue] % SIZE))
    }

    /// Sends header and frame, in one buffer.
    fn send(&mut self, queue: usize, header: &[u8], frame: &[u8]) {
        let at = self.buffer(queue);
        self.put(at, header);
        self.put(at + header.len() as u64, frame);
        self.offer(queue, &[(at, (header.len() + frame.len()) as u32, 0)]);
    }

    fn sends(&mut self, header: &[u8], frame: &[u8]) {
        self.send(1, header, frame);
        assert_eq!(self.wait(1), 0);
    }

    /// A buffer to receive into.
    fn room(&mut self, queue: usize, length: u32) -> u64 {
        let at = self.buffer(queue);
        self.offer(queue, &[(at, length, WRITE)]);
        at
    }

    /// Does a command; the answer.
    fn ask(&mut self, command: &[u8]) -> u8 {
        let queue = self.next.len() - 1;
        self.ask_at(queue, command)
    }

    fn ask_at(&mut self, queue: usize, command: &[u8]) -> u8 {
        let at = BUFFERS - 0x8000;
        self.put(at, command);
        self.put(at - 1, &[0xEE]);
        self.offer(queue, &[(at, command.len() as u32, 0), (at - 1, 1, WRITE)]);
        assert_eq!(self.wait(queue), 1);
        self.get(at - 1, 1)[0]
    }

    fn drops(&self, direction: Direction, reason: DropReason) -> u64 {
        self.counters.drops(direction, reason)
    }
}

fn partial(size: Option<u16>) -> Offload {
    Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        segments: size.map(|size| Segments { family: Family::V4, size, ecn: false, header: 54 }),
    }
}

#[test]
fn frames_reach_the_back_end_with_what_was_left_of_them() {
    let mut guest = Guest::new(CSUM | HOST_TSO4);
    for (number, offload) in (0..).zip([Offload::default(), partial(None), partial(Some(1000))]) {
        let bytes = frame(number, 100 + usize::from(number) * 2000);
        guest.sends(&offload.encode(0), &bytes);
        assert_eq!(guest.wires[0].0.lock().sent.pop(), Some((offload, bytes)));
    }
    // What it says of checksums is for receivers alone.
    let verified = Offload { checksum: Checksum::Verified, segments: None };
    guest.sends(&verified.encode(0), &frame(9, 60));
    assert_eq!(guest.wires[0].0.lock().sent.pop(), Some((Offload::default(), frame(9, 60))));
    assert!(guest.counters.stats().contains(&("sent".into(), 4)));
}

#[test]
fn frame_may_be_in_pieces_and_its_header_too() {
    let mut guest = Guest::new(0);
    let whole = [&[0; HEADER][..], &frame(3, 300)].concat();
    guest.put(BUFFERS, &whole);
    let cuts = [0, 5, 12, 13, 30, whole.len()];
    let pieces: Vec<_> =
        cuts.windows(2).map(|cut| (BUFFERS + cut[0] as u64, (cut[1] - cut[0]) as u32, 0)).collect();
    guest.offer(1, &pieces);
    assert_eq!(guest.wait(1), 0);
    assert_eq!(guest.wires[0].0.lock().sent.pop(), Some((Offload::default(), frame(3, 300))));
}

#[test]
fn what_is_no_frame_is_counted_and_given_back() {
    let mut guest = Guest::new(CSUM);
    let plain = [0; HEADER];
    guest.sends(&plain[..11], &[]);
    guest.sends(&plain, &frame(1, 60)[..13]);
    guest.sends(&partial(Some(100)).encode(0), &frame(1, 600));
    guest.sends(&partial(None).encode(0), &frame(1, 51));
    guest.sends(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame(1, 60));
    // For the device to write, or larger than any frame: 16 times 1 MiB.
    guest.offer(1, &[(BUFFERS, 60, WRITE)]);
    assert_eq!(guest.wait(1), 0);
    guest.offer_at(1, 0, &[(0, 1 << 20, 0); 16]);
    assert_eq!(guest.wait(1), 0);
    assert_eq!(guest.drops(Direction::Sent, DropReason::Malformed), 7);
    guest.sends(&plain, &frame(1, 60));
    assert_eq!(guest.wires[0].sent(), 1);
    assert!(!guest.device.needs_reset());
}

#[test]
fn offloads_that_were_not_negotiated_are_refused() {
    let mut guest = Guest::new(HOST_TSO4);
    guest.sends(&partial(None).encode(0), &frame(1, 60));
    guest.sends(&partial(Some(10)).encode(0), &frame(1, 60));
    assert_eq!(guest.drops(Direction::Sent, DropReason::Malformed), 2);
    assert_eq!(guest.wires[0].sent(), 0);
}

#[test]
fn packets_wait_in_their_order_for_a_back_end_that_is_busy() {
    let mut guest = Guest::new(0);
    guest.wires[0].change(|wire| wire.room = 3);
    for number in 0..10 {
        guest.send(1, &[0; HEADER], &frame(number, 60));
    }
    until("three are taken", || guest.used_index(1) == 3);
    until("it waits", || guest.wires[0].0.lock().interest.is_some_and(|what| what.send));
    assert_eq!(guest.wires[0].sent(), 3);
    guest.wires[0].change(|wire| wire.room = 100);
    for _ in 0..10 {
        guest.wait(1);
    }
    let numbers: Vec<u8> = guest.wires[0].0.lock().sent.iter().map(|sent| sent.1[14]).collect();
    assert_eq!(numbers, Vec::from_iter(0..10));
}

#[test]
fn frames_come_with_their_header_and_wait_for_buffers() {
    let mut guest = Guest::new(GUEST_CSUM | GUEST_TSO4);
    let accepted = Offloads { checksum: true, tcp4: true, tcp6: false, ecn: false };
    assert_eq!(guest.wires[0].0.lock().accepted, Some(accepted));
    let segments = partial(Some(1448));
    guest.wires[0].comes(Offload::default(), &frame(1, 60));
    guest.wires[0].comes(segments, &frame(2, 9000));
    until("one waits", || guest.wires[0].0.lock().interest.is_some_and(|what| !what.receive));
    for (number, length, offload) in [(1, 60, Offload::default()), (2, 9000, segments)] {
        let at = guest.room(0, 0x1_0000);
        assert_eq!(guest.wait(0), 12 + length);
        let got = guest.get(at, 12 + length as usize);
        assert_eq!(got[..12], offload.encode(1));
        assert_eq!(got[12..], frame(number, length as usize));
    }
    assert!(guest.counters.stats().contains(&("received_bytes".into(), 9060)));
}

#[test]
fn checksums_are_verified_for_the_driver_that_asks_for_it() {
    // UDP from [::1]:1 to [::1]:2 with the data "ab".
    let mut udp = frame(0, 12);
    udp.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 10, 17, 64]);
    for _ in 0..2 {
        udp.extend([0; 15]);
        udp.push(1);
    }
    udp.extend([0, 1, 0, 2, 0, 10, 0x9E, 0x73, b'a', b'b']);
    for (features, flags) in [(0, 0), (GUEST_CSUM, 2)] {
        let mut guest = Guest::new(features);
        for (checksum, damage) in
            [(Checksum::Unknown, 0), (Checksum::Verified, 0), (Checksum::Unknown, 1)]
        {
            let mut bytes = udp.clone();
            bytes[62] ^= damage;
            guest.wires[0].comes(Offload { checksum, segments: None }, &bytes);
            let at = guest.room(0, 2000);
            guest.wait(0);
            let expected = if damage == 0 { flags } else { 0 };
            assert_eq!(guest.get(at, 1)[0], expected, "{checksum:?} {damage}");
        }
    }
}

#[test]
fn frame_fills_buffers_that_are_mergeable() {
    let mut guest = Guest::new(MRG_RXBUF);
    let bytes: Vec<u8> = frame(1, 60).into_iter().chain((0..4000_u16).map(|n| n as u8)).collect();
    let at = [guest.room(0, 1526), guest.room(0, 1526)];
    guest.wires[0].comes(Offload::default(), &bytes);
    until("it waits", || guest.wires[0].0.lock().interest.is_some_and(|what| !what.receive));
    assert_eq!(guest.used_index(0), 0, "part of a frame");
    let last = guest.room(0, 1526);
    let written = [guest.wait(0), guest.wait(0), guest.wait(0)];
    assert_eq!(written, [1526, 1526, 4060 + 12 - 2 * 1526]);
    let mut got = Vec::new();
    for (at, length) in [at[0], at[1], last].into_iter().zip(written) {
        got.extend(guest.get(at, length as usize));
    }
    assert_eq!(got[..12], Offload::default().encode(3));
    assert_eq!(got[12..], bytes);
}

#[test]
fn header_may_fill_several_buffers_too() {
    let mut guest = Guest::new(MRG_RXBUF);
    let at: Vec<u64> = [0, 5, 0, 1, 100].map(|length| guest.room(0, length)).into();
    guest.wires[0].comes(Offload::default(), &frame(7, 60));
    let written: Vec<u32> = at.iter().map(|_| guest.wait(0)).collect();
    assert_eq!(written, [0, 5, 0, 1, 66]);
    let got = [guest.get(at[1], 5), guest.get(at[3], 1), guest.get(at[4], 66)].concat();
    assert_eq!(got[..12], Offload::default().encode(5));
    assert_eq!(got[12..], frame(7, 60));
}

#[test]
fn frame_for_which_no_buffers_will_do_is_counted_and_takes_none() {
    let mut guest = Guest::new(0);
    guest.room(0, 71);
    guest.wires[0].comes(Offload::default(), &frame(1, 60));
    until("dropped", || guest.drops(Direction::Received, DropReason::NoRoom) == 1);
    assert_eq!(guest.used_index(0), 0);
    guest.wires[0].comes(Offload::default(), &frame(2, 59));
    assert_eq!(guest.wait(0), 71);

    let mut guest = Guest::new(MRG_RXBUF);
    for _ in 0..SIZE {
        guest.offer(0, &[(BUFFERS, 1, WRITE)]);
    }
    guest.wires[0].comes(Offload::default(), &frame(1, 60));
    until("dropped", || guest.drops(Direction::Received, DropReason::NoRoom) == 1);
    assert_eq!(guest.used_index(0), 0);
    assert!(!guest.device.needs_reset());
}

#[test]
fn more_frames_than_one_turn_takes_come_in_their_order() {
    let mut guest = Guest::new(0);
    guest.wires[0].change(|wire| {
        for number in 0..3 * TURN {
            wire.coming.push_back((Offload::default(), frame(number as u8, 60)));
        }
    });
    for number in 0..3 * TURN {
        let at = guest.room(0, 100);
        guest.wait(0);
        assert_eq!(guest.get(at + 26, 1)[0], number as u8);
    }
}

#[test]
fn driver_gets_what_its_commands_ask_for() {
    let mut guest = Guest::new(CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR);
    let other = [2, 0, 0, 0, 0, 7];
    let mut number = 0;
    let mut comes = |guest: &mut Guest, to: MacAddress| {
        number += 1;
        let mut bytes = frame(number, 60);
        bytes[..6].copy_from_slice(&to);
        let before = guest.drops(Direction::Received, DropReason::Unwanted);
        guest.wires[0].comes(Offload::default(), &bytes);
        let mut came = false;
        until("it came or was dropped", || {
            came = guest.used_index(0) != guest.seen[0];
            came || guest.drops(Direction::Received, DropReason::Unwanted) != before
        });
        if came {
            guest.wait(0);
            guest.room(0, 100);
        }
        came
    };
    guest.room(0, 100);
    assert!(comes(&mut guest, other));
    assert_eq!(guest.ask(&[0, 0, 0]), OK);
    assert!(!comes(&mut guest, other));
    assert!(comes(&mut guest, MAC));
    let table = [&[1, 0, 1, 0, 0, 0][..], &other, &[0; 4]].concat();
    assert_eq!(guest.ask(&table), OK);
    assert!(comes(&mut guest, other));
    assert_eq!(guest.ask(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), OK);
    assert!(!comes(&mut guest, other));
    assert_eq!(guest.ask(&[&[1, 1][..], &other].concat()), OK);
    assert!(comes(&mut guest, other));
    assert!(!comes(&mut guest, MAC));
    assert_eq!(guest.config.mac(), other);
    guest.device.reset();
    assert_eq!(guest.config.mac(), MAC);
}

#[test]
fn commands_that_cannot_be_are_errors_and_no_more() {
    let all = CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR | GUEST_ANNOUNCE;
    let mut guest = Guest::new(all | CTRL_GUEST_OFFLOADS | GUEST_CSUM);
    let state = guest.device.with_path(|net, _| net.state());
    for command in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 6, 1],
        &[0, 255, 1],
        &[1, 0],
        &[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5],
        &[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0],
        &[1, 0, 0xFF, 0xFF, 0xFF, 0xFF],
        &[1, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F],
        &[1, 1, 1, 2, 3, 4, 5],
        &[1, 2, 1, 2, 3, 4, 5, 6],
        &[2, 0, 1],
        &[2, 0, 0, 0x10],
        &[2, 2, 1, 0],
        &[3, 1],
        &[4, 0, 1, 0],
        &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0, 0],
        &[255, 255, 255],
    ] {
        assert_eq!(guest.ask(command), ERR, "{command:?}");
    }
    assert_eq!(guest.device.with_path(|net, _| net.state()), state);
    // Nowhere to answer to.
    guest.offer(2, &[(BUFFERS, 3, 0)]);
    assert_eq!(guest.wait(2), 0);

    let mut guest = Guest::new(0);
    for command in [
        &[0, 0, 1][..],
        &[0, 2, 1],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 1, 2, 2, 2, 2, 2, 2],
        &[2, 0, 1, 0],
        &[3, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(guest.ask(command), ERR, "not negotiated: {command:?}");
    }
}

#[test]
fn guest_switches_its_offloads_off_and_on() {
    let mut guest = Guest::new(CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4);
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    let accepted = |guest: &Guest| guest.wires[0].0.lock().accepted.unwrap();
    assert!(accepted(&guest).tcp4);
    assert_eq!(guest.ask(&set(0)), OK);
    assert_eq!(accepted(&guest), Offloads::NONE);
    // What comes all the same is not given.
    guest.room(0, 5000);
    guest.wires[0].comes(partial(Some(1448)), &frame(1, 4000));
    until("dropped", || guest.drops(Direction::Received, DropReason::Unwanted) == 1);
    assert_eq!(guest.ask(&set(GUEST_CSUM)), OK);
    assert_eq!(accepted(&guest), Offloads { checksum: true, ..Offloads::NONE });
    assert_eq!(guest.ask(&set(GUEST_CSUM | GUEST_TSO6)), ERR);
}

#[test]
fn pairs_of_queues_are_used_as_the_driver_says() {
    let mut guest = Guest::with(MQ, 3);
    let enabled = |guest: &Guest| -> Vec<bool> {
        guest.wires.iter().map(|wire| wire.0.lock().enabled).collect()
    };
    assert_eq!(enabled(&guest), [true, false, false]);
    assert_eq!(guest.ask(&[4, 0, 0, 0]), ERR);
    assert_eq!(guest.ask(&[4, 0, 4, 0]), ERR);
    assert_eq!(guest.ask(&[4, 0, 3, 0]), OK);
    assert_eq!(enabled(&guest), [true; 3]);
    for pair in 0..3_u8 {
        let at = guest.room(2 * usize::from(pair), 100);
        guest.wires[usize::from(pair)].comes(Offload::default(), &frame(pair, 60));
        assert_eq!(guest.wait(2 * usize::from(pair)), 72);
        assert_eq!(guest.get(at + 26, 1)[0], pair);
        guest.send(2 * usize::from(pair) + 1, &[0; HEADER], &frame(pair, 60));
        guest.wait(2 * usize::from(pair) + 1);
        assert_eq!(guest.wires[usize::from(pair)].sent(), 1);
    }
    assert_eq!(guest.ask(&[4, 0, 1, 0]), OK);
    assert_eq!(enabled(&guest), [true, false, false]);
}

/// Linux goes on to fill a queue until it has heard that the command is done.
#[test]
fn packets_of_a_pair_that_is_given_up_go_by_the_first() {
    let mut guest = Guest::with(MQ, 3);
    assert_eq!(guest.ask(&[4, 0, 3, 0]), OK);
    // One waits for its back end, and others behind it.
    guest.wires[2].change(|wire| wire.room = 0);
    for number in 0..3 {
        guest.send(5, &[0; HEADER], &frame(number, 60));
    }
    until("the back end is not waited for", || {
        guest.wires[2].0.lock().interest.is_some_and(|interest| interest.send)
    });
    assert_eq!(guest.ask(&[4, 0, 1, 0]), OK);
    assert!(!guest.wires[2].0.lock().interest.unwrap().send);
    guest.send(5, &[0; HEADER], &frame(3, 60));
    for _ in 0..4 {
        guest.wait(5);
    }
    assert_eq!(guest.wires[2].sent(), 0);
    let numbers: Vec<u8> =
        guest.wires[0].0.lock().sent.iter().map(|(_, bytes)| bytes[14]).collect();
    assert_eq!(numbers, [0, 1, 2, 3]);
    // Where that one is busy they are lost, and counted.
    guest.wires[0].change(|wire| wire.room = 0);
    guest.send(5, &[0; HEADER], &frame(4, 60));
    guest.wait(5);
    assert_eq!(guest.drops(Direction::Sent, DropReason::QueueFull), 1);
    assert_eq!(guest.counters.stats()[0], ("sent".into(), 5));
    // The queue is served again as before.
    guest.wires[2].change(|wire| wire.room = usize::MAX);
    assert_eq!(guest.ask(&[4, 0, 3, 0]), OK);
    guest.send(5, &[0; HEADER], &frame(5, 60));
    guest.wait(5);
    assert_eq!(guest.wires[2].sent(), 1);
}

#[test]
fn packets_that_wait_go_on_where_a_pair_is_given_up_and_used_again() {
    let mut guest = Guest::with(MQ, 2);
    assert_eq!(guest.ask(&[4, 0, 2, 0]), OK);
    guest.wires[1].change(|wire| wire.room = 0);
    guest.send(3, &[0; HEADER], &frame(0, 60));
    until("the back end is not waited for", || {
        guest.wires[1].0.lock().interest.is_some_and(|interest| interest.send)
    });
    // Both commands are there when the device looks: it has no bus before.
    let control = guest.next.len() - 1;
    guest.device.set_master(false);
    let at = BUFFERS - 0x8000;
    for (index, pairs) in [1, 2].into_iter().enumerate() {
        let at = at + 16 * index as u64;
        guest.put(at, &[4, 0, pairs, 0]);
        guest.offer(control, &[(at, 4, 0), (at + 8, 1, WRITE)]);
    }
    guest.device.set_master(true);
    for _ in 0..2 {
        guest.wait(control);
    }
    guest.wires[1].change(|wire| wire.room = usize::MAX);
    guest.wait(3);
    assert_eq!((guest.wires[0].sent(), guest.wires[1].sent()), (0, 1));
}

#[test]
fn driver_without_several_pairs_has_its_commands_behind_the_first() {
    let mut guest = Guest::with(CTRL_RX, 3);
    assert_eq!(guest.ask_at(2, &[0, 1, 1]), OK);
    assert_eq!(guest.ask_at(2, &[4, 0, 2, 0]), ERR);
    for queue in 3..7 {
        guest.send(queue, &[0; HEADER], &frame(1, 60));
    }
    guest.sends(&[0; HEADER], &frame(1, 60));
    assert_eq!(guest.ask_at(2, &[0, 1, 0]), OK);
    let sent: Vec<usize> = guest.wires.iter().map(Mock::sent).collect();
    assert_eq!(sent, [1, 0, 0]);
}

#[test]
fn driver_is_told_when_the_link_goes_and_comes() {
    let guest = Guest::new(0);
    assert_eq!(guest.config.status(), LINK_UP);
    for (down, status, count) in [(true, 0, 1), (false, LINK_UP, 2)] {
        guest.wires[0].change(|wire| wire.down = down);
        until("told", || guest.changes.0.load(Ordering::SeqCst) == count);
        assert_eq!(guest.config.status(), status);
    }
}

#[test]
fn after_a_reset_nothing_comes_until_the_driver_is_back() {
    let mut guest = Guest::new(MRG_RXBUF);
    let at = guest.room(0, 100);
    guest.put(at, &[0xEE; 100]);
    guest.device.reset();
    guest.wires[0].comes(Offload::default(), &frame(1, 60));
    until("discarded", || guest.drops(Direction::Received, DropReason::Unwanted) == 1);
    assert_eq!(guest.get(at, 100), [0xEE; 100]);
    guest.start();
    let at = guest.room(0, 100);
    guest.wires[0].comes(Offload::default(), &frame(2, 60));
    guest.wait(0);
    assert_eq!(guest.get(at + 26, 1)[0], 2);
}

#[test]
fn what_a_driver_asked_survives_a_save_and_the_network_hears_of_the_guest() {
    let features = CTRL_RX | CTRL_VLAN | CTRL_MAC_ADDR | GUEST_ANNOUNCE | MQ;
    let mut guest = Guest::with(features, 2);
    assert_eq!(guest.ask(&[0, 0, 0]), OK);
    assert_eq!(guest.ask(&[2, 0, 42, 0]), OK);
    assert_eq!(guest.ask(&[1, 1, 2, 2, 2, 2, 2, 2]), OK);
    assert_eq!(guest.ask(&[4, 0, 2, 0]), OK);
    let state = guest.device.with_path(|net, _| net.state());
    let mut other = Guest::with(features, 2);
    other.device.reset();
    other.device.with_path(|net, _| net.restore(state.clone()));
    other.start();
    assert_eq!(other.device.with_path(|net, _| net.state()), state);
    until("told", || other.changes.0.load(Ordering::SeqCst) == 1);
    assert_eq!(other.config.status(), LINK_UP | ANNOUNCE);
    assert_eq!(other.config.mac(), [2; 6]);
    assert!(other.wires[1].0.lock().enabled);
    assert_eq!(other.ask(&[3, 0]), OK);
    assert_eq!(other.config.status(), LINK_UP);
}

#[test]
fn saved_state_of_somebody_else_is_cut_to_what_can_be() {
    let guest = Guest::with(MQ, 2);
    guest.device.with_path(|net, _| {
        net.reset();
        net.restore(NetState {
            permanent: MAC,
            mac: MAC,
            mode: 0xFF,
            unicast: vec![[1; 6]; 100_000],
            multicast: vec![[1; 6]; 100_000],
            vlans: vec![0xFF; 100_000],
            pairs: 0xFFFF,
            guest_offloads: u64::MAX,
        });
        let state = net.state();
        assert_eq!(state.unicast.len(), MAX_ADDRESSES);
        assert_eq!((state.vlans.len(), state.pairs), (VLAN_BYTES, 2));
        assert_eq!(state.guest_offloads, GUEST_OFFLOADS);
        net.restore(NetState::default());
        assert_eq!(net.state().pairs, 1);
    });
}

#[test]
fn device_that_is_closed_answers_and_has_no_network() {
    let mut guest = Guest::new(CTRL_RX);
    guest.device.with_path(|net, _| net.close());
    assert_eq!(guest.config.status(), 0);
    guest.send(1, &[0; HEADER], &frame(1, 60));
    guest.room(0, 100);
    assert_eq!(guest.wires[0].sent(), 0);
}

/// Any descriptors and any bytes: the device answers, or says that it needs a reset.
#[test]
fn guest_that_does_anything_harms_nobody() {
    let mut seed = 0x1234_5678_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u32
    };
    let features = MRG_RXBUF | CSUM | HOST_TSO4 | GUEST_CSUM | CTRL_RX | CTRL_MAC_ADDR | CTRL_VLAN;
    let mut guest = Guest::new(features);
    let (mut broken, mut sent) = (0, 0);
    for round in 0..3000 {
        let noise: Vec<u8> = (0..64).map(|_| (random() & random()) as u8 % 6).collect();
        guest.put(BUFFERS, &noise);
        let queue = random() as usize % 3;
        let count = 1 + random() as usize % 4;
        let buffers: Vec<(u64, u32, u16)> = (0..count)
            .map(|_| {
                let address = match random() % 20 {
                    0 => u64::from(random()) << 20,
                    _ => BUFFERS + u64::from(random() % 64),
                };
                let length = match random() % 10 {
                    0 => random(),
                    1 => 0,
                    _ => random() % 2000,
                };
                (address, length, (random() % 8) as u16 & !4)
            })
            .collect();
        guest.offer_at(queue, (random() % u32::from(SIZE)) as u16, &buffers);
        guest.wires[0].comes(partial((round % 3 == 0).then_some(7)), &frame(1, 100));
        if random() % 4 == 0 {
            guest.wires[0].comes(Offload::default(), &frame(2, 60_000));
        }
        // Until what was offered is back, or the device has had enough.
        if queue != 0 {
            until("the device is silent", || {
                guest.device.needs_reset() || guest.used_index(queue) == guest.next[queue]
            });
        }
        if guest.device.needs_reset() {
            broken += 1;
            guest.device.reset();
            guest.start();
        }
        sent += std::mem::take(&mut guest.wires[0].0.lock().sent).len();
    }
    assert!(broken > 10 && sent > 10, "{broken} resets, {sent} frames");
    guest.device.reset();
    guest.start();
    guest.sends(&[0; HEADER], &frame(1, 60));
    assert_eq!(guest.wires[0].sent(), 1);
}

/// Ring, card, stream, switch, stream, card, ring: each frame arrives in its order, or is counted
/// where it was dropped.
#[test]
#[ignore = "a million frames"]
fn each_of_a_million_frames_is_accounted_for() {
    const FRAMES: u32 = 1_000_000;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let switched = Arc::new(Counters::default());
    let join = || {
        let counters = Arc::new(Counters::default());
        let joined = Joined::new(&path, Arc::clone(&counters), Arc::clone(&switched)).unwrap();
        Guest::of(0, vec![Box::new(joined)], counters)
    };
    let (mut one, mut two) = (join(), join());
    let dropped = |one: &Guest, two: &Guest| -> u64 {
        let stats = [&*one.counters, &*two.counters, &*switched].map(Counters::stats).concat();
        stats.iter().filter(|(name, _)| name.contains("_dropped_")).map(|(_, count)| count).sum()
    };
    for _ in 0..SIZE {
        two.room(0, 100);
    }
    let (mut sent, mut delivered, mut last) = (0, 0, None);
    let mut changed = Instant::now();
    while sent < FRAMES || delivered + dropped(&one, &two) < u64::from(FRAMES) {
        assert!(changed.elapsed() < LIMIT, "of {sent} frames {delivered} came");
        while sent < FRAMES && one.next[1].wrapping_sub(one.used_index(1)) < SIZE {
            let mut bytes = frame(0, 60);
            bytes[20..24].copy_from_slice(&sent.to_be_bytes());
            one.send(1, &[0; HEADER], &bytes);
            sent += 1;
        }
        while two.used_index(0) != two.seen[0] {
            assert_eq!(two.wait(0), 72);
            // The oldest buffer, which is also the next.
            let number = two.get(two.buffer(0) + HEADER as u64 + 20, 4);
            let number = u32::from_be_bytes(number.try_into().unwrap());
            assert!(last.is_none_or(|last| last < number), "{number} came after {last:?}");
            last = Some(number);
            delivered += 1;
            changed = Instant::now();
            two.room(0, 100);
        }
    }
    assert_eq!(delivered + dropped(&one, &two), u64::from(FRAMES));
    for (counters, name) in [(&one.counters, "sent"), (&switched, "sent")] {
        assert!(counters.stats().contains(&(name.into(), FRAMES.into())));
    }
    println!("{delivered} delivered, {} dropped", dropped(&one, &two));
}
