//! Ranges of guest memory, one after another, as a list of as few pieces as there can be.

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, ScatterList};

/// Puts ranges that follow each other together.
pub struct Runs {
    list: ScatterList,
    run: Option<(u64, u64)>,
}

impl Runs {
    pub fn new(memory: &GuestMemory) -> Self {
        Self { list: ScatterList::new(memory.snapshot()), run: None }
    }

    pub fn add(&mut self, address: u64, length: u64) -> Result<(), MemoryError> {
        match &mut self.run {
            Some((start, so_far)) if start.checked_add(*so_far) == Some(address) => {
                *so_far += length;
            }
            _ => {
                self.push()?;
                self.run = Some((address, length));
            }
        }
        Ok(())
    }

    fn push(&mut self) -> Result<(), MemoryError> {
        match self.run.take() {
            Some((start, length)) => self.list.push(GuestPhys(start), length),
            None => Ok(()),
        }
    }

    pub fn finish(mut self) -> Result<ScatterList, MemoryError> {
        self.push()?;
        Ok(self.list)
    }
}
