//! What the fuzzer of network cards does with its input: a driver that writes anything into rings,
//! registers and what it shares, through the public interface alone.
//!
//! A finding is a panic, a card that keeps its I/O thread from coming to rest, one that refuses the
//! state which it saved, or one that serves no good driver after a reset.

mod e1000;
#[path = "../../../virtio/tests/harness/input.rs"]
mod input;
mod vmxnet3;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tetrarch_io::IoThread;
use tetrarch_net::{Counters, NetBackend, StreamPeer};

use input::Input;

pub const RAM: u64 = 1 << 20;
/// A region that comes and goes.
pub const EXTRA: u64 = 16 << 20;
pub const EXTRA_BYTES: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// Where drivers have their rings and their buffers.
pub const RINGS: u64 = 0x8000;
pub const BUFFERS: u64 = 0x4_0000;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What a card has of its host: a thread, and programs at the other ends of its network.
pub struct Host {
    pub io: IoThread,
    programs: Vec<UnixStream>,
}

type Network = (Vec<Box<dyn NetBackend>>, Arc<Counters>);

impl Host {
    pub fn new(ends: usize) -> (Self, Network) {
        let io = IoThread::new("fuzz").expect("the host has threads");
        let mut programs = Vec::new();
        let backends = (0..ends).map(|_| {
            let (ours, theirs) = UnixStream::pair().expect("a socket");
            theirs.set_nonblocking(true).expect("a socket");
            programs.push(theirs);
            let peer = StreamPeer::new("fuzz", ours.into(), Arc::default()).expect("a back end");
            Box::new(peer) as Box<dyn NetBackend>
        });
        let backends = backends.collect();
        (Self { io, programs }, (backends, Arc::new(Counters::default())))
    }

    /// The machine is held, and goes on after `body`: nothing keeps the thread.
    pub fn rest<T>(&self, body: impl FnOnce() -> T) -> T {
        if let Err(error) = self.io.pause(PATIENCE) {
            panic!("the I/O thread does not come to rest: {error}");
        }
        let result = body();
        self.io.resume();
        result
    }

    /// A frame comes from a program, or something like it.
    pub fn arrive(&mut self, input: &mut Input<'_>) {
        let at = usize::from(input.byte()) % self.programs.len();
        let frame = frame(input);
        let length = if input.byte().is_multiple_of(16) {
            u32::from(input.word()) << 4
        } else {
            frame.len() as u32
        };
        let bytes = [&length.to_be_bytes()[..], &frame].concat();
        let _ = self.programs[at].write(&bytes);
    }

    /// One reads what was sent.
    pub fn drain(&mut self, input: &mut Input<'_>) {
        let at = usize::from(input.byte()) % self.programs.len();
        let _ = self.programs[at].read(&mut [0; 1 << 16]);
    }

    /// Until something has come about; frames of before make room.
    pub fn wait(&mut self, what: &str, mut done: impl FnMut() -> bool) {
        let mut bytes = vec![0; 1 << 20];
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "{what}: no answer after a reset");
            self.programs.iter_mut().for_each(|program| drop(program.read(&mut bytes)));
            std::thread::yield_now();
        }
    }
}

/// An address of a buffer or a ring: good ones, those at an end of RAM, and any.
pub fn address(input: &mut Input<'_>) -> u64 {
    let choice = input.byte();
    let low = u64::from(input.word());
    match choice % 8 {
        0..=2 => BUFFERS + low,
        3 => RINGS + low % 0x6000,
        4 => RAM - low % 32,
        5 => EXTRA + low,
        6 => EXTRA + EXTRA_BYTES - low % 64,
        _ => input.long(),
    }
}

/// A frame of TCP or UDP by IPv4 or IPv6, or of any bytes.
pub fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.byte();
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 9]].concat();
    if kind & 8 != 0 {
        frame[0] = input.byte();
    }
    if kind & 16 != 0 {
        frame.extend([0x81, 0, kind, input.byte()]);
    }
    let length = usize::from(input.word() % 3000);
    match kind % 4 {
        0 => {
            let total = (20 + 20 + length) as u16;
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 1, 0x40, 0, 64, 6 + 11 * (kind >> 7), 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        1 => {
            frame.extend([0x86, 0xDD, 0x60, 0, 0, 0]);
            frame.extend((20 + length as u16).to_be_bytes());
            frame.extend([6 + 11 * (kind >> 7), 64]);
            frame.extend([input.byte(); 32]);
        }
        _ => frame.extend([input.byte(), input.byte()]),
    }
    frame.extend([0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0, 64, 0, 0, 0, 0]);
    frame.resize(frame.len() + length, input.byte());
    frame
}

/// A driver of a card, and then a good one.
pub fn cards(data: &[u8]) {
    let mut input = Input::new(data);
    if input.byte() & 1 == 0 { vmxnet3::run(input) } else { e1000::run(input) }
}
