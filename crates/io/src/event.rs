//! An event: a descriptor that becomes ready when somebody signals it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd(2) that never blocks: a doorbell of a guest, a wish of another thread.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// From any thread. Signals that nobody has taken are one.
    pub fn signal(&self) {
        // Fails only where 2^64 - 2 signals wait, and then it is signalled.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes what was signalled; whether anything was.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_taken_at_once() {
        let event = Event::new().unwrap();
        assert!(!event.take());
        event.signal();
        event.signal();
        assert!(event.take());
        assert!(!event.take());
    }
}
