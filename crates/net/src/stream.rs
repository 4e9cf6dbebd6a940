//! Frames on a stream socket, each behind its length: passt's protocol, and that of QEMU's
//! `-netdev stream` (passt(1), "DESCRIPTION": 4 bytes, big-endian).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, recv, sendmsg};

use crate::{Frame, MAX_FRAME, NetBackend, Offload, SendError};

const LENGTH: usize = 4;
/// What is read at once.
const CHUNK: usize = 256 << 10;

/// One end of a stream socket; or a place where the other end can come, and come again.
pub struct Stream {
    /// What is waited for: the listener or the socket.
    epoll: OwnedFd,
    listener: Option<OwnedFd>,
    socket: Option<OwnedFd>,
    /// Received and not yet taken: `input[start..]`.
    input: Vec<u8>,
    start: usize,
    /// The rest of a frame that the socket took a part of.
    output: Vec<u8>,
}

impl Stream {
    /// Of a socket that is connected.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let mut stream = Self::empty(None)?;
        stream.connect(socket)?;
        Ok(stream)
    }

    /// Of a socket that listens: frames go nowhere until somebody connects. One at a time.
    pub fn listening(listener: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let stream = Self::empty(Some(listener))?;
        stream.watch_listener()?;
        Ok(stream)
    }

    fn empty(listener: Option<OwnedFd>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (input, output) = (Vec::new(), Vec::new());
        Ok(Self { epoll, listener, socket: None, input, start: 0, output })
    }

    fn watch_listener(&self) -> io::Result<()> {
        if let Some(listener) = &self.listener {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&self.epoll, listener, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    fn connect(&mut self, socket: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let data = epoll::EventData::new_u64(1);
        epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
        if let Some(listener) = &self.listener {
            // The next one waits until this one is gone.
            epoll::delete(&self.epoll, listener)?;
        }
        self.socket = Some(socket);
        Ok(())
    }

    /// The other end is gone: what was under way is lost.
    fn disconnect(&mut self) {
        self.socket = None;
        self.input.clear();
        self.output.clear();
        self.start = 0;
        if let Err(error) = self.watch_listener() {
            log::warn!("a network's socket listens no more: {error}");
        }
    }

    /// Whether somebody is there, or has come.
    fn is_connected(&mut self) -> io::Result<bool> {
        if self.socket.is_none()
            && let Some(listener) = &self.listener
        {
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => self.connect(socket)?,
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.socket.is_some())
    }

    /// Reads what is there; false where nothing came.
    fn fill(&mut self) -> io::Result<bool> {
        let Some(socket) = &self.socket else { return Ok(false) };
        self.input.drain(..self.start);
        self.start = 0;
        let old = self.input.len();
        self.input.resize(old + CHUNK, 0);
        let got = recv(socket, &mut self.input[old..], RecvFlags::DONTWAIT);
        self.input.truncate(old + got.as_ref().map_or(0, |&(length, _)| length));
        match got {
            Ok((0, _)) => {
                Err(self
                    .lost(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end is closed")))
            }
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(self.lost(error.into())),
        }
    }

    fn lost(&mut self, error: io::Error) -> io::Error {
        self.disconnect();
        error
    }

    fn next(&mut self, frame: &mut Frame) -> io::Result<bool> {
        let waiting = &self.input[self.start..];
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() else { return Ok(false) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME {
            // Where the next one begins cannot be known any more.
            let what = format!("a frame of {length} bytes, longer than any");
            return Err(self.lost(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        let Some(data) = rest.get(..length) else { return Ok(false) };
        frame.offload = Offload::default();
        frame.data.clear();
        frame.data.extend_from_slice(data);
        self.start += LENGTH + length;
        Ok(true)
    }

    /// Sends the rest of the frame before; false where there is still no room.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.output.is_empty() {
            match self.write(&[IoSlice::new(&self.output)]) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(self.lost(error.into())),
            }
        }
        Ok(true)
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> rustix::io::Result<usize> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN)?;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::io::retry_on_intr(|| {
            sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags)
        })
    }
}

impl NetBackend for Stream {
    fn event(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        if !self.is_connected()? {
            return Ok(false);
        }
        loop {
            if self.next(frame)? {
                return Ok(true);
            }
            if !self.fill()? {
                return Ok(false);
            }
        }
    }

    /// Where nobody is, a frame is lost as on a cable that ends.
    fn send(&mut self, _: &Offload, data: &[u8]) -> Result<(), SendError> {
        if !self.is_connected()? {
            return Ok(());
        }
        if !self.flush()? {
            return Err(SendError::Full);
        }
        let length = (data.len() as u32).to_be_bytes();
        match self.write(&[IoSlice::new(&length), IoSlice::new(data)]) {
            Ok(sent) => {
                // What is missing goes first next time: a frame is sent whole or not at all.
                self.output.extend(length.iter().chain(data).skip(sent));
                Ok(())
            }
            Err(Errno::AGAIN) => Err(SendError::Full),
            Err(error) => Err(self.lost(error.into()).into()),
        }
    }

    fn want_room(&mut self, wanted: bool) {
        let out = if wanted { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
        if let Some(socket) = &self.socket {
            let data = epoll::EventData::new_u64(1);
            // Fails only for a socket that is not in it.
            let _ = epoll::modify(&self.epoll, socket, data, epoll::EventFlags::IN | out);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketType, bind, connect, listen, socket, socketpair,
    };

    use super::*;
    use crate::testing::received;

    fn pair() -> (Stream, Stream) {
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        (Stream::new(one).unwrap(), Stream::new(other).unwrap())
    }

    #[test]
    fn frames_arrive_whole_and_in_order_however_the_socket_cuts_them() {
        let (mut one, mut other) = pair();
        let mut expected = Vec::new();
        let mut got = Vec::new();
        for turn in 0..2000_usize {
            let frame = vec![turn as u8; 1 + turn * 37 % MAX_FRAME];
            while let Err(error) = one.send(&Offload::default(), &frame) {
                assert!(matches!(error, SendError::Full));
                got.extend(received(&mut other));
            }
            expected.push(frame);
        }
        while got.len() < expected.len() {
            one.flush().unwrap();
            got.extend(received(&mut other));
        }
        assert!(got == expected);
    }

    #[test]
    fn peer_that_closes_or_lies_is_an_error_once_and_then_silent() {
        let (one, mut other) = pair();
        drop(one);
        let mut frame = Frame::default();
        assert!(other.receive(&mut frame).is_err());
        assert!(!other.receive(&mut frame).unwrap());
        other.send(&Offload::default(), b"into the air").unwrap();
        let (one, mut other) = pair();
        rustix::io::write(one.socket.as_ref().unwrap(), &u32::MAX.to_be_bytes()).unwrap();
        assert!(other.receive(&mut frame).unwrap_err().to_string().contains("4294967295"));
        assert!(!other.receive(&mut frame).unwrap());
    }

    #[test]
    fn other_end_comes_and_goes() {
        let new = || socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let address = SocketAddrUnix::new_abstract_name(
            format!("tetrarch-net-{}", std::process::id()).as_bytes(),
        );
        let (address, listener) = (address.unwrap(), new());
        bind(&listener, &address).unwrap();
        listen(&listener, 1).unwrap();
        let mut here = Stream::listening(listener).unwrap();
        here.send(&Offload::default(), b"nobody hears").unwrap();
        for turn in 0..3_u8 {
            let there = new();
            connect(&there, &address).unwrap();
            let mut there = Stream::new(there).unwrap();
            there.send(&Offload::default(), &[turn; 5]).unwrap();
            assert_eq!(received(&mut here), [vec![turn; 5]]);
            here.send(&Offload::default(), &[turn; 6]).unwrap();
            assert_eq!(received(&mut there), [vec![turn; 6]]);
            drop(there);
            assert!(here.receive(&mut Frame::default()).is_err(), "it is told that it went");
        }
    }

    #[test]
    fn event_tells_of_frames_and_of_room_that_is_wanted() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let ready = |stream: &Stream| {
            let event = stream.event();
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)).unwrap() > 0
        };
        let (mut one, mut other) = pair();
        assert!(!ready(&one));
        one.want_room(true);
        assert!(ready(&one));
        while one.send(&Offload::default(), &[0; 9000]).is_ok() {}
        assert!(!ready(&one));
        assert!(ready(&other));
        received(&mut other);
        assert!(ready(&one) && !ready(&other));
        one.want_room(false);
        assert!(!ready(&one));
    }
}
