//! One file descriptor to wait on for a queue around another: the inner queue's event,
//! or one of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

pub(crate) fn either<const N: usize>(fds: [BorrowedFd<'_>; N]) -> io::Result<OwnedFd> {
    let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in fds {
        let data = epoll::EventData::new_u64(0);
        epoll::add(both.as_fd(), fd, data, epoll::EventFlags::IN)?;
    }
    Ok(both)
}
