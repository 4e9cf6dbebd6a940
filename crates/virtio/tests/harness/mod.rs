//! What the fuzzer of virtqueues does with its input: a driver that writes anything into its
//! rings, for each data path, through the public interface alone.
//!
//! A finding is a panic, a device that keeps its I/O thread from coming to rest, or one that
//! answers no good request after a reset.

mod back_end;
mod input;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tetrarch_block::{BlockBackend, ImageOptions};
use tetrarch_bus::Interrupt;
use tetrarch_io::IoThread;
use tetrarch_memory::{GuestMemory, GuestPhys};
use tetrarch_net::{Counters, NetBackend, StreamPeer};
use tetrarch_vhost_user::Frontend;
use tetrarch_virtio::console::{self, PortKind};
use tetrarch_virtio::queue::{QueueConfig, QueuePosition};
use tetrarch_virtio::vhost_user::{Served, VhostUser};
use tetrarch_virtio::{
    Balloon, Blk, Console, Control, DataPath, Device, Net, QueueSetup, Rng, Vsock, balloon,
};

use input::Input;

const RAM: u64 = 1 << 20;
/// A region that comes and goes.
const EXTRA: u64 = 16 << 20;
const EXTRA_BYTES: u64 = 64 << 10;
/// The most of one device.
const QUEUES: u64 = 6;
/// Each queue's areas: descriptors, driver's and device's a page apart.
const RINGS: u64 = 0x1_0000;
const APART: u64 = 0x4000;
const BUFFERS: u64 = 0x4_0000;
const SIZE: u16 = 16;
const PATIENCE: Duration = Duration::from_secs(60);
/// The guest's CID.
const CID: u64 = 3;
const DISK_BYTES: usize = 256 << 10;

const WRITE: u16 = 2;

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self) {}
}

/// An address of a buffer or a table: good ones, those at an end of RAM, and any.
fn address(input: &mut Input<'_>) -> u64 {
    let choice = input.byte();
    let low = u64::from(input.word());
    match choice % 8 {
        0..=2 => BUFFERS + low,
        3 => RINGS + low % (APART * QUEUES),
        4 => RAM - low % 32,
        5 => EXTRA + low,
        6 => low.wrapping_sub(0x8000),
        _ => input.long(),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.byte() % 8 {
        0 => 1,
        1 => 16,
        2 => 512,
        3 => u32::from(input.word() % 64) * 16,
        4 => u32::from(input.word()),
        5 => 0,
        6 => u32::MAX - u32::from(input.byte()),
        _ => (input.long() >> 16) as u32,
    }
}

/// A device, and what a driver needs to reach it.
struct Rig<P> {
    memory: Arc<GuestMemory>,
    io: IoThread,
    device: Arc<Device<P>>,
    queues: u64,
    size: u16,
    packed: bool,
    event_index: bool,
    indirect: bool,
}

/// Where the parts of a queue are: descriptors, driver's area, device's area.
fn area(queue: u64, part: u64) -> u64 {
    RINGS + APART * queue + 0x1000 * part
}

impl<P: DataPath + 'static> Rig<P> {
    fn new(input: &mut Input<'_>, queues: u64, make: impl FnOnce(&Arc<GuestMemory>) -> P) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).expect("memory for a guest"));
        let io = IoThread::new("fuzz").expect("the host has threads");
        let path = make(&memory);
        let device = Device::new(&io, Arc::clone(&memory), "fuzz", queues as usize, path)
            .expect("the host has events");
        let bits = input.byte();
        Self {
            memory,
            io,
            device: Arc::new(device),
            queues,
            size: 1 << (bits >> 4 & 3) << (bits >> 6 & 1),
            packed: bits & 1 != 0,
            event_index: bits & 2 != 0,
            indirect: bits & 4 != 0,
        }
    }

    fn start(&self, position: Option<QueuePosition>, features: u64) {
        let setup = |queue| {
            Some(QueueSetup {
                config: QueueConfig {
                    size: self.size,
                    descriptors: GuestPhys(area(queue, 0)),
                    driver: GuestPhys(area(queue, 1)),
                    device: GuestPhys(area(queue, 2)),
                    packed: self.packed,
                    event_index: self.event_index,
                    indirect: self.indirect,
                },
                position,
                interrupt: Arc::new(Nobody),
            })
        };
        // What cannot be is refused.
        let queues = (0..self.queues).map(setup).collect();
        let _ = self.device.start(features, queues, Arc::new(Nobody));
    }

    fn put(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write(GuestPhys(address), data);
    }

    fn put16(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }

    fn get16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.memory.read(GuestPhys(address), &mut data).expect("it is RAM");
        u16::from_le_bytes(data)
    }

    /// The machine is held and goes on: nothing keeps the thread.
    fn rest(&self) {
        if let Err(error) = self.io.pause(PATIENCE) {
            panic!("the I/O thread does not come to rest: {error}");
        }
        self.device.positions();
        self.io.resume();
    }

    fn drive(&self, input: &mut Input<'_>, mut host: impl FnMut(u8, &mut Input<'_>)) {
        self.start(None, u64::MAX);
        while !input.has_ended() {
            let op = input.byte();
            let queue = u64::from(input.byte()) % self.queues;
            match op % 16 {
                0..=4 => {
                    let at = area(queue, 0) + 16 * u64::from(input.byte() % 32);
                    self.put(at, &address(input).to_le_bytes());
                    self.put(at + 8, &length(input).to_le_bytes());
                    // Packed rings look for the wrap counters' bits.
                    let odd = if op & 16 == 0 { 7 } else { u16::MAX };
                    self.put16(at + 12, input.word() & odd);
                    self.put16(at + 14, input.word() & if self.packed { 0x8087 } else { odd });
                }
                5..=7 => {
                    let slot = u64::from(input.byte() % 32);
                    self.put16(area(queue, 1) + 4 + 2 * slot, input.word() & 0x1F);
                    let index = self.get16(area(queue, 1) + 2);
                    let more = u16::from(input.byte() % 8);
                    self.put16(area(queue, 1) + 2, index.wrapping_add(more));
                    self.device.doorbells()[queue as usize].signal();
                }
                8 => {
                    let at = area(queue, 1 + u64::from(op >> 7)) + u64::from(input.byte());
                    self.put16(at, input.word());
                }
                9 => {
                    let at = address(input);
                    let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                    self.put(at, &bytes);
                }
                10 => self.device.doorbells()[queue as usize].signal(),
                11 => self.rest(),
                12 => {
                    self.device.reset();
                    let position = QueuePosition { available: input.word(), used: input.word() };
                    self.start((op & 16 != 0).then_some(position), input.long());
                }
                13 if op & 32 != 0 => self.device.stop_queue(queue as usize),
                13 => {
                    self.device.set_master(op & 16 != 0);
                    self.device.config_changed();
                }
                14 => {
                    let start = GuestPhys(EXTRA);
                    let _ = match op & 16 {
                        0 => self.memory.add_region(start, EXTRA_BYTES),
                        _ => self.memory.remove_region(start),
                    };
                }
                _ => host(op >> 4, input),
            }
        }
        self.rest();
    }

    /// After a reset the device serves a good driver: `chain` is given to a queue, as address,
    /// length and flags.
    fn prove(&mut self, queue: u64, chain: &[(u64, u32, u16)]) {
        self.ask(queue, chain);
        assert!(!self.device.needs_reset(), "a good driver is refused");
    }

    /// After a reset the device gives a good driver's chain back.
    fn ask(&mut self, queue: u64, chain: &[(u64, u32, u16)]) {
        self.device.reset();
        self.device.set_master(true);
        self.put(RINGS, &vec![0; (APART * QUEUES) as usize]);
        (self.size, self.packed, self.event_index) = (SIZE, false, false);
        self.start(None, 0);
        for (index, &(address, length, flags)) in (0..).zip(chain) {
            let at = area(queue, 0) + 16 * u64::from(index);
            self.put(at, &address.to_le_bytes());
            self.put(at + 8, &length.to_le_bytes());
            let next = u16::from(usize::from(index) + 1 < chain.len());
            self.put16(at + 12, flags | next);
            self.put16(at + 14, index + 1);
        }
        self.put16(area(queue, 1) + 2, 1);
        self.device.doorbells()[queue as usize].signal();
        let start = Instant::now();
        while self.get16(area(queue, 2) + 2) != 1 {
            assert!(start.elapsed() < PATIENCE, "no answer after a reset");
            std::thread::yield_now();
        }
        self.rest();
    }
}

/// Any rings for a data path, which the first byte chooses.
pub fn rings(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 7 {
        0 => {
            let mut rig = Rig::new(&mut input, 1, |_| Rng);
            rig.drive(&mut input, |_, _| {});
            rig.prove(0, &[(BUFFERS, 8, WRITE)]);
        }
        1 => {
            let disk = disk();
            let mut rig = Rig::new(&mut input, 2, |_| Blk::new(Arc::clone(&disk), "fuzz"));
            rig.drive(&mut input, |_, _| disk.retry());
            rig.put(BUFFERS, &[8, 0, 0, 0]);
            rig.prove(1, &[(BUFFERS, 16, 0), (BUFFERS + 64, 21, WRITE)]);
        }
        2 => sockets(&mut input),
        4 => network(&mut input),
        5 => terminals(&mut input),
        6 => served_by_others(&mut input),
        _ => {
            let make = |memory: &Arc<GuestMemory>| Balloon::new(Arc::clone(memory));
            let queues = balloon::QUEUES as u64;
            let mut rig = Rig::new(&mut input, queues, make);
            rig.drive(&mut input, |_, _| {});
            rig.prove(0, &[(BUFFERS, 4, 0)]);
        }
    }
}

fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| TempDir::new().expect("the host has room for temporary files")).path()
}

/// One for all inputs: its data are of no matter.
fn disk() -> Arc<dyn BlockBackend> {
    static DISK: OnceLock<Arc<dyn BlockBackend>> = OnceLock::new();
    let open = || {
        let path = folder().join("disk.img");
        std::fs::write(&path, vec![0; DISK_BYTES]).expect("room for a file");
        Arc::from(tetrarch_block::open(&path, ImageOptions::default()).expect("a raw image"))
    };
    Arc::clone(DISK.get_or_init(open))
}

/// The socket device, with a program of the host that connects and one that listens.
fn sockets(input: &mut Input<'_>) {
    let path: PathBuf = folder().join("vsock");
    let beside = folder().join("vsock_1");
    for path in [&path, &beside] {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(&path).expect("a socket");
    let program = UnixListener::bind(&beside).expect("a socket");
    program.set_nonblocking(true).expect("a socket");
    let vsock = Vsock::new(CID, path.clone(), listener).expect("a socket device");
    let mut rig = Rig::new(input, 3, |_| vsock);
    let mut streams: Vec<UnixStream> = Vec::new();
    // A packet of the guest's that is right but for what the input says.
    let memory = Arc::clone(&rig.memory);
    rig.drive(input, |choice, input| match choice % 8 {
        0 => {
            let Ok(mut stream) = UnixStream::connect(&path) else { return };
            let _ = stream.set_nonblocking(true);
            let _ = writeln!(stream, "CONNECT {}", input.byte());
            streams.push(stream);
        }
        1 => {
            let Some(stream) = streams.last_mut() else { return };
            let _ = stream.write(&vec![input.byte(); usize::from(input.word())]);
        }
        2 => {
            if let Some(stream) = streams.pop() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        3 => {
            if let Ok((stream, _)) = program.accept() {
                let _ = stream.set_nonblocking(true);
                streams.push(stream);
            }
        }
        _ => {
            let mut header = [0; 44];
            header[0] = CID as u8;
            header[8] = 2;
            header[16..20].copy_from_slice(&u32::from(input.byte() % 4).to_le_bytes());
            header[20..24].copy_from_slice(&u32::from(input.byte() % 4).to_le_bytes());
            header[24..28].copy_from_slice(&length(input).to_le_bytes());
            header[28] = 1;
            header[30] = input.byte() % 10;
            header[32] = input.byte();
            header[36..40].copy_from_slice(&length(input).to_le_bytes());
            header[40..44].copy_from_slice(&length(input).to_le_bytes());
            let at = BUFFERS + u64::from(input.word());
            let _ = memory.write(GuestPhys(at), &header);
        }
    });
    rig.put(BUFFERS, &[0; 44]);
    rig.prove(1, &[(BUFFERS, 44, 0)]);
}

/// A network card of two pairs, with a program at the other end of each.
fn network(input: &mut Input<'_>) {
    let mut programs = Vec::new();
    let backends = (0..2).map(|_| {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        theirs.set_nonblocking(true).expect("a socket");
        programs.push(theirs);
        let peer = StreamPeer::new("fuzz", ours.into(), Arc::default()).expect("a back end");
        Box::new(peer) as Box<dyn NetBackend>
    });
    let net = Net::new([2, 0, 0, 0, 0, 1], backends.collect(), Arc::new(Counters::default()));
    let mut rig = Rig::new(input, 5, |_| net);
    let memory = Arc::clone(&rig.memory);
    rig.drive(input, |choice, input| match choice % 8 {
        0 | 1 => {
            let _ = programs[usize::from(choice % 2)].read(&mut [0; 1 << 16]);
        }
        2..=4 => {
            // A frame, of a length that may be none.
            let length = length(input) % 0x2_0000;
            let mut frame = length.to_be_bytes().to_vec();
            frame.resize(4 + length.min(0x1_1000) as usize, input.byte());
            let _ = programs[usize::from(choice % 2)].write(&frame);
        }
        5 if input.byte() % 8 == 0 => {
            let _ = programs[0].shutdown(Shutdown::Both);
        }
        _ => {
            // What a driver sends, right but for what the input says: TCP by IPv4 or IPv6.
            let six = choice & 8 != 0;
            let mut bytes = vec![input.byte() % 8, if six { 4 } else { 1 }];
            for _ in 0..4 {
                bytes.extend((input.word() % 2048).to_le_bytes());
            }
            bytes.extend([0; 2 + 12]);
            bytes.extend(if six { [0x86, 0xDD, 0x60] } else { [8, 0, 0x45] });
            bytes.extend((0..40).map(|_| input.byte()));
            let _ = memory.write(GuestPhys(BUFFERS + u64::from(input.word())), &bytes);
        }
    });
    // Nobody takes what the card sends: it is dropped, and the driver has its buffer back.
    drop(programs);
    rig.put(BUFFERS, &[0; 100]);
    rig.prove(1, &[(BUFFERS, 100, 0)]);
}

/// The console, with a terminal and a named port.
fn terminals(input: &mut Input<'_>) {
    let kinds = vec![PortKind::Console, PortKind::Named("fuzz".into())];
    let queues = console::queues(kinds.len(), true) as u64;
    let console = Console::new(kinds).expect("the host has events");
    let outputs = [0, 1].map(|port| console.output(port).expect("it is a port"));
    let mut rig = Rig::new(input, queues, |_| console);
    let device = Arc::clone(&rig.device);
    rig.drive(input, |choice, input| match choice % 4 {
        0 | 1 => drop(outputs[usize::from(choice % 2)].take()),
        2 => {
            let data = vec![input.byte(); usize::from(input.word() % 512)];
            device.apply(|console, queues| console.receive(queues, 1, &data));
        }
        _ => {
            let size = (input.word(), input.word());
            device.apply(|console, queues| console.resize(queues, 0, size));
        }
    });
    rig.put(BUFFERS, b"bytes");
    outputs[0].take();
    rig.prove(1, &[(BUFFERS, 5, 0)]);
}

/// A disk of another process, which serves it until its script says otherwise.
fn served_by_others(input: &mut Input<'_>) {
    // The handshake, as it should be, and what the input says.
    let mut script = vec![u8::MAX; 3];
    script.extend((0..input.byte() % 64).map(|_| input.byte()));
    // Short, since many a script falls silent: on a busy host the thread may miss it.
    let patience = Duration::from_millis(200);
    let connect = |_| {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let hang_up = theirs.try_clone().expect("a socket");
        let thread = back_end::serve(theirs, script.clone(), 2);
        Frontend::new(ours, patience).ok().map(|frontend| (frontend, hang_up, thread))
    };
    let (frontend, hang_up, thread) = (0..50).find_map(connect).expect("a good handshake");
    let mut frontend = Some(frontend);
    let mut rig = Rig::new(input, 2, |memory| {
        let frontend = frontend.take().expect("there is one");
        VhostUser::new(Served::Blk, Arc::clone(memory), frontend, 2).expect("memory for rings")
    });
    rig.drive(input, |choice, _| {
        if choice == 0 {
            let _ = hang_up.shutdown(Shutdown::Both);
        }
    });
    // Without it each request is an error.
    let _ = hang_up.shutdown(Shutdown::Both);
    rig.ask(1, &[(BUFFERS, 16, 0), (BUFFERS + 64, 513, WRITE)]);
    drop(rig);
    thread.join().expect("the back end of the test's");
}
