//! Queues of commands and of completions in guest memory (4.1, 4.6).

use std::sync::atomic::Ordering;

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, Window};

use super::command::{Command, ENTRY};
use super::status::Status;

/// Bytes of a completion queue's entry.
const COMPLETION: usize = 16;

/// Commands of a driver.
pub struct Submissions {
    entries: Window,
    pub size: u32,
    /// The entry that is taken next.
    pub head: u32,
    /// The number of the completion queue where its commands end.
    pub completions: usize,
    /// Commands that were taken and have not ended.
    pub in_flight: u32,
    /// The command that deletes it, which waits for those in flight.
    pub deletion: Option<u16>,
}

impl Submissions {
    pub fn new(
        memory: &GuestMemory,
        base: u64,
        size: u32,
        completions: usize,
    ) -> Result<Self, MemoryError> {
        let entries = Window::new(&memory.snapshot(), GuestPhys(base), size as usize * ENTRY)?;
        Ok(Self { entries, size, head: 0, completions, in_flight: 0, deletion: None })
    }

    pub fn base(&self) -> u64 {
        self.entries.start().0
    }

    pub fn take(&mut self) -> Command {
        let command = Command::new(self.entries.read(self.head as usize * ENTRY));
        self.head = (self.head + 1) % self.size;
        command
    }
}

/// Where commands end.
pub struct Completions {
    entries: Window,
    pub size: u32,
    /// The entry that is written next.
    pub tail: u32,
    /// What marks an entry as new: it changes each time round.
    pub phase: bool,
    /// Commands that will end here: each has a place.
    pub in_flight: u32,
    /// The interrupt, unless the driver wants none.
    pub vector: Option<u16>,
}

impl Completions {
    pub fn new(
        memory: &GuestMemory,
        base: u64,
        size: u32,
        vector: Option<u16>,
    ) -> Result<Self, MemoryError> {
        let entries = Window::new(&memory.snapshot(), GuestPhys(base), size as usize * COMPLETION)?;
        Ok(Self { entries, size, tail: 0, phase: true, in_flight: 0, vector })
    }

    pub fn base(&self) -> u64 {
        self.entries.start().0
    }

    /// Whether there is a place for one more command, with the driver's head at `head`.
    pub fn has_room(&self, head: u32) -> bool {
        let used = (self.tail + self.size - head) % self.size;
        used + self.in_flight + 1 < self.size
    }

    /// Writes an entry, its phase last.
    pub fn push(&mut self, result: u32, queue: u16, head: u32, id: u16, status: Status) {
        let at = self.tail as usize * COMPLETION;
        self.entries.write(at, u64::from(result).to_le());
        self.entries.write(at + 8, (head | u32::from(queue) << 16).to_le());
        self.entries.write(at + 12, id.to_le());
        let status = status.bits() << 1 | u16::from(self.phase);
        self.entries.store_u16(at + 14, status, Ordering::Release);
        self.tail = (self.tail + 1) % self.size;
        self.phase ^= self.tail == 0;
    }
}
