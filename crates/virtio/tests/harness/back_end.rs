//! A back end of vhost-user that serves a device's queues, until its script has it do what none
//! should: it answers something else, gives back what it does not have, or is gone.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

const HEADER: usize = 12;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

// Requests that are more than to be acknowledged.
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;

/// Where rings lie in memory that is shared with the back end, above all of the guest's, and
/// what of a ring is where.
const RINGS: u64 = 1 << 47;
const RING_BYTES: u64 = 0x8000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const SIZE: u16 = 1024;

/// What is odd about an answer or a chain that goes back, one after the other.
struct Script(Vec<u8>);

impl Script {
    fn next(&mut self) -> u8 {
        if self.0.is_empty() { u8::MAX } else { self.0.remove(0) }
    }
}

struct BackEnd {
    socket: UnixStream,
    script: Script,
    queues: u64,
    rings: Option<(File, u64)>,
    calls: Vec<Option<OwnedFd>>,
    used: Vec<u16>,
}

/// It ends when the socket's other end is closed, or when its script says so.
pub fn serve(socket: UnixStream, script: Vec<u8>, queues: usize) -> JoinHandle<()> {
    let calls = (0..queues).map(|_| None).collect();
    let mut back_end = BackEnd {
        socket,
        script: Script(script),
        queues: queues as u64,
        rings: None,
        calls,
        used: vec![0; queues],
    };
    std::thread::spawn(move || while back_end.turn().is_some() {})
}

impl BackEnd {
    /// One message, if there is one soon, and what drivers have given since. `None` is the end.
    fn turn(&mut self) -> Option<()> {
        let soon = Timespec::try_from(Duration::from_millis(1)).ok()?;
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&soon)) == Ok(1) {
            self.message()?;
        }
        for queue in 0..self.queues {
            self.give_back(queue);
        }
        Some(())
    }

    fn receive(&self, bytes: &mut [u8]) -> Option<Vec<OwnedFd>> {
        let (mut done, mut files) = (0, Vec::new());
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut bytes[done..])];
            match recvmsg(&self.socket, &mut rest, &mut control, RecvFlags::empty()) {
                Ok(message) if message.bytes > 0 => done += message.bytes,
                Err(rustix::io::Errno::INTR) => {}
                _ => return None,
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(given) = message {
                    files.extend(given);
                }
            }
        }
        Some(files)
    }

    fn message(&mut self) -> Option<()> {
        let mut header = [0; HEADER];
        let files = self.receive(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4"));
        let (request, flags) = (word(0), word(4));
        let mut payload = vec![0; word(8) as usize];
        self.receive(&mut payload)?;
        let number = |at: usize| {
            payload.get(at..at + 8).map_or(0, |it| u64::from_ne_bytes(it.try_into().expect("8")))
        };
        let answer = match request {
            GET_FEATURES => Some(u64::MAX),
            GET_PROTOCOL_FEATURES => Some(1 | 1 << 3 | 1 << 9),
            GET_QUEUE_NUM => Some(self.queues),
            GET_VRING_BASE => Some(number(0) & 0xFFFF_FFFF),
            _ => (flags & NEED_REPLY != 0).then_some(0),
        };
        match request {
            SET_MEM_TABLE => {
                for (index, file) in files.into_iter().enumerate() {
                    let at = 8 + 32 * index;
                    if number(at) >= RINGS {
                        self.rings = Some((File::from(file), number(at + 24)));
                    }
                }
            }
            SET_VRING_CALL => {
                if let Some(call) = self.calls.get_mut((number(0) & 0xFF) as usize) {
                    *call = files.into_iter().next();
                }
            }
            _ => {}
        }
        if let Some(answer) = answer {
            self.answer(request, answer)?;
        }
        Some(())
    }

    fn answer(&mut self, mut request: u32, mut value: u64) -> Option<()> {
        let (mut length, mut times) = (8, 1);
        match self.script.next() {
            0 => return None,
            1 => request ^= 1,
            2 => value = u64::from(self.script.next()) << 24 | 1,
            3 => length = u32::from(self.script.next()),
            4 => times = 2,
            5 => times = 0,
            _ => {}
        }
        for _ in 0..times {
            let mut bytes = Vec::new();
            for word in [request, 1 | REPLY, length] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(value.to_ne_bytes());
            self.socket.write_all(&bytes).ok()?;
        }
        Some(())
    }

    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        if let Some((file, start)) = &self.rings {
            let _ = file.read_exact_at(&mut bytes, start + at);
        }
        u16::from_le_bytes(bytes)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        if let Some((file, start)) = &self.rings {
            let _ = file.write_all_at(bytes, start + at);
        }
    }

    /// Says of all chains that they are done.
    fn give_back(&mut self, queue: u64) {
        let ring = RING_BYTES * queue;
        let (available, mut used) = (self.word(ring + AVAILABLE + 2), self.used[queue as usize]);
        if available == used || self.rings.is_none() {
            return;
        }
        while used != available {
            let head = self.word(ring + AVAILABLE + 4 + 2 * u64::from(used % SIZE));
            let mut element = (u64::from(head) | 1 << 32).to_le_bytes();
            match self.script.next() {
                0 => element[1] ^= self.script.next(),
                1 => element[5] = self.script.next(),
                2 => {
                    let at = ring + u64::from(self.script.next()) * 16;
                    self.put(at, &[0xFF; 16]);
                }
                3 => used = used.wrapping_add(u16::from(self.script.next())),
                _ => {}
            }
            self.put(ring + USED + 4 + 8 * u64::from(used % SIZE), &element);
            used = used.wrapping_add(1);
            if used.wrapping_sub(available) < 0x8000 {
                break;
            }
        }
        self.used[queue as usize] = used;
        self.put(ring + USED + 2, &used.to_le_bytes());
        if let Some(call) = &self.calls[queue as usize] {
            let _ = rustix::io::write(call.as_fd(), &1u64.to_ne_bytes());
        }
    }
}
