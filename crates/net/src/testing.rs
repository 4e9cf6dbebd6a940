//! What tests of back ends share.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::{Frame, NetBackend, Offload, SendError};

/// A network that gives back what it gets.
pub struct Loop {
    event: OwnedFd,
    frames: VecDeque<Frame>,
}

impl Loop {
    pub fn new() -> Self {
        Self { event: eventfd(0, EventfdFlags::CLOEXEC).unwrap(), frames: VecDeque::new() }
    }
}

impl NetBackend for Loop {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        Ok(self.frames.pop_front().map(|next| *frame = next).is_some())
    }

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError> {
        self.frames.push_back(Frame { offload: *offload, data: data.to_vec() });
        Ok(())
    }
}

/// All frames that wait.
pub fn received(net: &mut dyn NetBackend) -> Vec<Vec<u8>> {
    let mut frame = Frame::default();
    let mut all = Vec::new();
    while net.receive(&mut frame).unwrap() {
        all.push(std::mem::take(&mut frame.data));
    }
    all
}

/// A TCP packet of IPv4 from 10.0.0.1 to 10.0.0.2.
pub fn tcp(source: u16, destination: u16) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(source.to_be_bytes());
    frame.extend(destination.to_be_bytes());
    frame.extend([0; 16]);
    frame
}

pub fn scratch() -> (File, PathBuf) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name =
        format!("tetrarch-net-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    (File::create(&path).unwrap(), path)
}
