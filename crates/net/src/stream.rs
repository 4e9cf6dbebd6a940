//! Frames over a stream socket: a length of 4 bytes, big-endian, before each.
//!
//! It is the form of passt(1), and of QEMU's "-netdev stream" and "-netdev socket".

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// QEMU sends no longer ones (NET_BUFSIZE); what claims more is no frame.
const MAX_LENGTH: usize = 4096 + 65_536;
const PREFIX: usize = 4;
const INPUT: usize = 2 * MAX_LENGTH;
/// What may wait for the peer.
const OUTPUT: usize = 1 << 18;

/// Why a stream is at its end.
#[derive(Debug)]
pub enum Ended {
    Closed,
    NoFrame(u32),
    Failed(io::Error),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("it has closed the connection"),
            Self::NoFrame(length) => write!(f, "it sent a frame of {length} bytes"),
            Self::Failed(error) => write!(f, "{error}"),
        }
    }
}

pub struct Stream {
    socket: OwnedFd,
    input: Box<[u8]>,
    /// What of `input` was read and not given on.
    start: usize,
    end: usize,
    output: Vec<u8>,
    written: usize,
}

impl Stream {
    /// Of a connected socket, which does not block from now on.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let input = vec![0; INPUT].into_boxed_slice();
        Ok(Self { socket, input, start: 0, end: 0, output: Vec::new(), written: 0 })
    }

    pub fn has_room(&self) -> bool {
        self.waiting() < OUTPUT
    }

    /// Bytes that the peer has not taken.
    pub fn waiting(&self) -> usize {
        self.output.len() - self.written
    }

    /// Has a frame sent by the next [`Stream::flush`].
    pub fn push(&mut self, frame: &[u8]) {
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
        }
        self.output.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.output.extend_from_slice(frame);
    }

    /// Sends as much as the peer takes.
    pub fn flush(&mut self) -> Result<(), Ended> {
        while self.written < self.output.len() {
            let rest = &self.output[self.written..];
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => self.written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Ended::Closed),
                Err(error) => return Err(Ended::Failed(error.into())),
            }
        }
        if self.written > OUTPUT / 2 {
            self.output.drain(..self.written);
            self.written = 0;
        }
        Ok(())
    }

    /// The next frame, if all of it is there. It may be too short for one, or too long.
    pub fn receive(&mut self) -> Result<Option<&[u8]>, Ended> {
        loop {
            let have = self.end - self.start;
            let mut need = PREFIX;
            if have >= PREFIX {
                let mut prefix = [0; PREFIX];
                prefix.copy_from_slice(&self.input[self.start..self.start + PREFIX]);
                let length = u32::from_be_bytes(prefix);
                if length as usize > MAX_LENGTH {
                    return Err(Ended::NoFrame(length));
                }
                need += length as usize;
                if have >= need {
                    let from = self.start + PREFIX;
                    self.start += need;
                    return Ok(Some(&self.input[from..self.start]));
                }
            }
            if !self.fill(need)? {
                return Ok(None);
            }
        }
    }

    /// Reads, with room for `need` bytes from `start` on; whether anything came.
    fn fill(&mut self, need: usize) -> Result<bool, Ended> {
        if self.start == self.end || self.start + need > self.input.len() {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            let room = &mut self.input[self.end..];
            match rustix::net::recv(&self.socket, room, RecvFlags::empty()) {
                Ok((0, _)) => return Err(Ended::Closed),
                Ok((count, _)) => {
                    self.end += count;
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::CONNRESET) => return Err(Ended::Closed),
                Err(error) => return Err(Ended::Failed(error.into())),
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::testing::numbered;

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours.into()).unwrap(), theirs)
    }

    #[test]
    fn frames_come_whole_however_the_stream_is_cut() {
        let (mut stream, mut peer) = pair();
        let frames: Vec<Vec<u8>> = [60, 0, 1, 1514, 65_557, 14, MAX_LENGTH, 60]
            .map(|length| vec![length as u8; length])
            .into();
        let mut bytes = Vec::new();
        for frame in &frames {
            bytes.extend_from_slice(&(frame.len() as u32).to_be_bytes());
            bytes.extend_from_slice(frame);
        }
        for piece in [1, 7, 4096, 100_000] {
            let mut got = Vec::new();
            for part in bytes.chunks(piece) {
                peer.write_all(part).unwrap();
                while let Some(frame) = stream.receive().unwrap() {
                    got.push(frame.to_vec());
                }
            }
            assert_eq!(got, frames, "in pieces of {piece}");
        }
    }

    #[test]
    fn frames_that_the_peer_does_not_take_wait() {
        let (mut stream, mut peer) = pair();
        let mut count = 0;
        while stream.has_room() {
            stream.push(&numbered(count));
            stream.flush().unwrap();
            count += 1;
        }
        assert!(stream.waiting() >= OUTPUT);
        let mut got = Vec::new();
        let mut buffer = [0; 5000];
        peer.set_nonblocking(true).unwrap();
        while got.len() < count as usize * 64 {
            if let Ok(read) = peer.read(&mut buffer) {
                got.extend_from_slice(&buffer[..read]);
            }
            stream.flush().unwrap();
        }
        assert_eq!(stream.waiting(), 0);
        for (number, frame) in (0..).zip(got.chunks(64)) {
            assert_eq!(frame[..4], [0, 0, 0, 60]);
            assert_eq!(frame[4..], numbered(number));
        }
    }

    #[test]
    fn peer_that_sends_no_frames_is_at_its_end() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&0x0001_1001_u32.to_be_bytes()).unwrap();
        assert!(matches!(stream.receive(), Err(Ended::NoFrame(0x1_1001))));
        let (mut stream, mut peer) = pair();
        peer.write_all(&[0, 0, 0, 60, 1]).unwrap();
        assert!(matches!(stream.receive(), Ok(None)));
        drop(peer);
        assert!(matches!(stream.receive(), Err(Ended::Closed)));
        stream.push(&numbered(0));
        assert!(matches!(stream.flush(), Err(Ended::Closed)));
    }
}
