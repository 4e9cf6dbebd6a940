//! Several descriptors that are one: an epoll(7) of its own is ready when one of them is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Whether to wait until there is something to read, or room to write. For neither the
    /// descriptor is left out altogether: a peer that has gone is an event always.
    pub fn set(&self, descriptor: impl AsFd, read: bool, write: bool) {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, read);
        flags.set(EventFlags::OUT, write);
        let (epoll, data) = (&self.0, EventData::new_u64(0));
        let result = if flags.is_empty() {
            epoll::delete(epoll, &descriptor)
        } else {
            match epoll::modify(epoll, &descriptor, data, flags) {
                Err(Errno::NOENT) => epoll::add(epoll, &descriptor, data, flags),
                result => result,
            }
        };
        if let Err(error) = result
            && error != Errno::NOENT
        {
            // Out of memory, or of the host's limit of watches.
            log::error!("a network card is not told of frames: {error}");
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
