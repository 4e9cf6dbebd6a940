//! A driver for tests: one queue over guest memory of its own.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use crate::{BlockError, BlockQueue, Request};

pub(crate) struct Driver {
    pub memory: GuestMemory,
    pub queue: Box<dyn BlockQueue>,
}

impl Driver {
    pub fn new(queue: Box<dyn BlockQueue>) -> Self {
        Self { memory: GuestMemory::new(8 << 20).unwrap(), queue }
    }

    pub fn list(&self, pieces: &[(u64, u64)]) -> ScatterList {
        let pieces = pieces.iter().map(|&(start, len)| (GuestPhys(start), len));
        ScatterList::of(self.memory.snapshot(), pieces).unwrap()
    }

    /// Until `count` requests have completed, by their tags.
    pub fn wait(&mut self, count: usize) -> Vec<(u64, Result<(), BlockError>)> {
        let mut done = Vec::new();
        self.queue.kick();
        self.queue.completions(&mut done);
        while done.len() < count {
            let event = self.queue.event();
            let mut fds = [PollFd::new(&event, PollFlags::IN)];
            let bound = Timespec::try_from(Duration::from_secs(60)).unwrap();
            let ready = poll(&mut fds, Some(&bound)).unwrap();
            assert_eq!(ready, 1, "{} of {count} requests have completed", done.len());
            self.queue.completions(&mut done);
        }
        done.sort_by_key(|(tag, _)| *tag);
        done
    }

    pub fn run(&mut self, request: Request) -> Result<(), BlockError> {
        self.queue.submit(7, request);
        let done = self.wait(1);
        assert_eq!((done.len(), done[0].0), (1, 7));
        done[0].1
    }

    /// Writes bytes that lie in the given pieces of memory.
    pub fn write(&mut self, offset: u64, pieces: &[(u64, u64)], data: &[u8]) {
        let list = self.list(pieces);
        list.write_at(0, data);
        assert_eq!(list.len(), data.len() as u64);
        assert_eq!(self.run(Request::Write { offset, data: list }), Ok(()));
    }

    pub fn read(&mut self, offset: u64, pieces: &[(u64, u64)]) -> Result<Vec<u8>, BlockError> {
        let list = self.list(pieces);
        let mut data = vec![0xEE; list.len() as usize];
        list.write_at(0, &data);
        self.run(Request::Read { offset, data: list.clone() })?;
        list.read_at(0, &mut data);
        Ok(data)
    }
}

/// Bytes that differ from one place to the next.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}
