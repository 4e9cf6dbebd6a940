//! The socket to a back end: one request at a time, each with a time limit.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};

use crate::message::{HEADER, Request, answers, encode};

/// Descriptors that one message takes along (VHOST_MEMORY_BASELINE_NREGIONS).
pub const MAX_DESCRIPTORS: usize = 8;

/// Why a back end is of no use; goes on behind "the back end".
#[derive(Debug, thiserror::Error)]
pub enum BackEndError {
    #[error("hung up")]
    Closed,
    #[error("has not answered {request} within {} s", .patience.as_secs_f32())]
    Silent { request: Request, patience: Duration },
    #[error("answered {0} with something else")]
    Answer(Request),
    #[error("refused {0}")]
    Refused(Request),
    #[error("spoke without being asked")]
    Unasked,
    #[error("sent descriptors that nobody asked for")]
    Descriptors,
    #[error("does not offer {0}")]
    Lacks(&'static str),
    #[error("takes {MAX_DESCRIPTORS} regions of memory at most, of which one is for the queues")]
    Regions,
    #[error("cannot be reached: {0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for BackEndError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

pub struct Connection {
    socket: UnixStream,
    patience: Duration,
}

impl Connection {
    pub fn new(socket: UnixStream, patience: Duration) -> Result<Self, BackEndError> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, patience })
    }

    /// Sends a request; without `need_reply` there is no answer but to those that ask for
    /// something.
    pub fn send(
        &self,
        request: Request,
        need_reply: bool,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), BackEndError> {
        let message = encode(request, need_reply, payload);
        let deadline = Instant::now() + self.patience;
        let mut sent = 0;
        while sent < message.len() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // They go with the first byte.
            if sent == 0
                && !descriptors.is_empty()
                && !control.push(SendAncillaryMessage::ScmRights(descriptors))
            {
                return Err(BackEndError::Regions);
            }
            let rest = [IoSlice::new(&message[sent..])];
            match sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline, request)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The answer to a request, of exactly so many bytes.
    pub fn answer(&self, request: Request, length: usize) -> Result<Vec<u8>, BackEndError> {
        let deadline = Instant::now() + self.patience;
        let mut header = [0; HEADER];
        self.fill(&mut header, request, deadline)?;
        if !answers(&header, request, length) {
            return Err(BackEndError::Answer(request));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload, request, deadline)?;
        Ok(payload)
    }

    fn fill(
        &self,
        bytes: &mut [u8],
        request: Request,
        deadline: Instant,
    ) -> Result<(), BackEndError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.receive(&mut bytes[filled..], RecvFlags::empty()) {
                Ok(0) => return Err(BackEndError::Closed),
                Ok(count) => filled += count,
                Err(BackEndError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(BackEndError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, deadline, request)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(&self, bytes: &mut [u8], flags: RecvFlags) -> Result<usize, BackEndError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [IoSliceMut::new(bytes)];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(&self.socket, &mut rest, &mut control, flags)?.bytes;
        // No answer that is used here has any. They are closed with the buffer.
        if control.drain().count() > 0 {
            return Err(BackEndError::Descriptors);
        }
        Ok(count)
    }

    fn wait(
        &self,
        what: PollFlags,
        deadline: Instant,
        request: Request,
    ) -> Result<(), BackEndError> {
        let silent = || BackEndError::Silent { request, patience: self.patience };
        let left = deadline.checked_duration_since(Instant::now()).ok_or_else(silent)?;
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&self.socket, what)], Some(&left)) {
            Ok(0) => Err(silent()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether the back end is there and waits for requests.
    pub fn check(&self) -> Result<(), BackEndError> {
        match self.receive(&mut [0], RecvFlags::PEEK) {
            Ok(0) => Err(BackEndError::Closed),
            Ok(_) => Err(BackEndError::Unasked),
            Err(BackEndError::Io(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
