//! A disk whose requests are waited for: for a device that moves a few sectors at a time, by bytes
//! and not from guest memory.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use crate::{BlockError, BlockQueue, Request};

pub struct Waited {
    queue: Box<dyn BlockQueue>,
    /// Where the bytes are meanwhile.
    buffer: GuestMemory,
}

impl Waited {
    /// Bytes that move in one request, and the size of the buffer.
    pub const STEP: usize = 64 << 10;

    pub fn new(queue: Box<dyn BlockQueue>, buffer: GuestMemory) -> Self {
        Self { queue, buffer }
    }

    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
        for (number, part) in data.chunks_mut(Self::STEP).enumerate() {
            let list = self.list(part.len())?;
            let offset = offset + (number * Self::STEP) as u64;
            self.serve(Request::Read { offset, data: list.clone() })?;
            list.read_at(0, part);
        }
        Ok(())
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        for (number, part) in data.chunks(Self::STEP).enumerate() {
            let list = self.list(part.len())?;
            list.write_at(0, part);
            let offset = offset + (number * Self::STEP) as u64;
            self.serve(Request::Write { offset, data: list })?;
        }
        Ok(())
    }

    fn list(&self, length: usize) -> Result<ScatterList, BlockError> {
        ScatterList::of(self.buffer.snapshot(), [(GuestPhys(0), length as u64)])
            .map_err(|_| BlockError::Host(Errno::FAULT))
    }

    fn serve(&mut self, request: Request) -> Result<(), BlockError> {
        let mut done = Vec::new();
        self.queue.submit(0, request);
        self.queue.kick();
        loop {
            self.queue.completions(&mut done);
            if let Some((_, result)) = done.pop() {
                return result;
            }
            let event = self.queue.event();
            let mut ready = [PollFd::new(&event, PollFlags::IN)];
            match poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(BlockError::Host(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pattern;
    use crate::{Format, ImageOptions};

    #[test]
    fn bytes_come_back_from_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![0; 200 << 10]).unwrap();
        let options = ImageOptions { format: Some(Format::Raw), ..ImageOptions::default() };
        let disk = crate::open(&path, options).unwrap();
        let buffer = GuestMemory::new(Waited::STEP as u64).unwrap();
        let mut access = Waited::new(disk.open_queue().unwrap(), buffer);
        let wanted = pattern(1, (130 << 10) + 17);
        access.write(513, &wanted).unwrap();
        let mut found = vec![0; wanted.len()];
        access.read(513, &mut found).unwrap();
        assert!(found == wanted);
        assert!(std::fs::read(&path).unwrap()[513..][..wanted.len()] == wanted);
        let beyond = access.read(200 << 10, &mut [0]);
        assert!(matches!(beyond, Err(BlockError::Beyond { .. })), "{beyond:?}");
    }
}
