//! Programs of the host: those that call, and those that are called.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::CALL_AGAIN_NS;

/// Epoll data of the listener and of the timer; streams have the numbers from 0 on.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Programs have called: [`Programs::accept`].
    Called,
    /// What was put off by [`Programs::call_again`] is due, and so is `accept`.
    Again,
    /// There is something to read from the stream of a number, or room to write.
    Stream(u64),
}

/// The socket at PATH, those at PATH_N, and the streams of all connections.
///
/// Nothing here waits: other devices have the same thread.
pub struct Programs {
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    timer: OwnedFd,
    next_stream: u64,
    /// The log knows that programs wait until this process has descriptors for them.
    told_waiting: bool,
}

impl Programs {
    /// `path` is what the listener is bound to.
    pub fn new(path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(LISTENER);
        // Edges: one that cannot be accepted does not come again and again.
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, data, edges)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;
        Ok(Self { path, listener, epoll, timer, next_stream: 0, told_waiting: false })
    }

    /// Readable while there is something to be done.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// What is to be done now; more than this is told by the descriptor.
    pub fn ready(&self) -> Vec<Ready> {
        let mut events = Vec::with_capacity(64);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let room = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, room, Some(&now)).is_err() {
            return Vec::new();
        }
        let kind = |event: &epoll::Event| match event.data.u64() {
            LISTENER => Ready::Called,
            TIMER => {
                // Reading is what makes it not ready again.
                let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
                Ready::Again
            }
            stream => Ready::Stream(stream),
        };
        events.iter().map(kind).collect()
    }

    /// The next program that has called. One whom the host gives no descriptor waits in the
    /// backlog, for `Ready::Again`.
    pub fn accept(&mut self) -> Option<UnixStream> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.wait_for_descriptors(&error);
                    return None;
                }
            }
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

    /// Has [`Ready::Again`] come in a while.
    pub fn call_again(&self) {
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: 0, tv_nsec: CALL_AGAIN_NS },
        };
        // It fails only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// Connects to who listens for a port of the host. `WouldBlock` where its backlog is full
    /// (unix(7)), which no descriptor becomes ready for.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }

    /// Tells of a stream from now on; gives its number, which is new. It begins with being ready.
    pub fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        stream.set_nonblocking(true)?;
        let number = self.next_stream;
        self.next_stream += 1;
        // Edges: a stream that the guest has no room for does not come again and again.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.epoll, stream, epoll::EventData::new_u64(number), flags)?;
        Ok(number)
    }
}

/// Writes what waits for the host's program; gives how much it has taken.
pub fn flush(out: &mut VecDeque<u8>, mut stream: &UnixStream) -> io::Result<usize> {
    let mut taken = 0;
    while !out.is_empty() {
        let (first, _) = out.as_slices();
        match stream.write(first) {
            Ok(written) => {
                out.drain(..written);
                taken += written;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_is_busy_is_told_from_one_that_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut programs = Programs::new(path.clone(), listener).unwrap();
        assert!(programs.dial(80).is_err_and(|error| error.kind() != ErrorKind::WouldBlock));
        let busy = UnixListener::bind(folder.path().join("vsock_80")).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let _first = programs.dial(80).unwrap();
        assert!(programs.dial(80).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
        assert!(programs.accept().is_none());
        let caller = UnixStream::connect(&path).unwrap();
        assert_eq!(programs.ready(), [Ready::Called]);
        let stream = programs.accept().unwrap();
        let number = programs.watch(&stream).unwrap();
        assert_eq!(programs.ready(), [Ready::Stream(number)]);
        assert!(programs.ready().is_empty());
        drop(caller);
        assert_eq!(programs.ready(), [Ready::Stream(number)]);
    }
}
