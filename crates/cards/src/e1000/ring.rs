//! Rings of descriptors in guest memory (manual, 3.2.6 and 3.4): the card's are those from the head,
//! which it moves, to the tail, which its driver does.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};

use tetrarch_memory::{GuestMemory, GuestPhys, Window};

pub const DESCRIPTOR: u32 = 16;
/// Descriptor done, in the fourth word of either kind.
pub const DONE: u32 = 1;

/// A descriptor as the driver left it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub address: u64,
    pub word2: u32,
    pub word3: u32,
}

pub struct Ring {
    place: (u64, u32),
    pub head: u32,
    /// Written on vCPUs' threads.
    tail: Arc<AtomicU32>,
    window: Option<Window>,
}

impl Ring {
    pub fn new(tail: Arc<AtomicU32>) -> Self {
        Self { place: (0, 0), head: 0, tail, window: None }
    }

    /// Puts it at an address, with so many bytes.
    pub fn put(&mut self, place: (u64, u32)) {
        if self.place != place {
            self.place = place;
            self.window = None;
        }
    }

    pub fn reset(&mut self) {
        self.put((0, 0));
        self.head = 0;
        self.tail.store(0, SeqCst);
    }

    pub fn size(&self) -> u32 {
        self.place.1 / DESCRIPTOR
    }

    pub fn tail(&self) -> u32 {
        self.tail.load(SeqCst)
    }

    pub fn set_tail(&self, tail: u32) {
        self.tail.store(tail, SeqCst);
    }

    /// Whether there is a ring: RAM, and a head in it.
    pub fn open(&mut self, memory: &GuestMemory) -> bool {
        let (base, bytes) = self.place;
        if self.window.is_none() && bytes > 0 {
            let window = Window::new(&memory.snapshot(), GuestPhys(base), bytes as usize);
            self.window = window.ok();
        }
        self.window.is_some() && self.head < self.size()
    }

    pub fn read(&self, index: u32) -> Descriptor {
        let Some(window) = &self.window else { return Descriptor::default() };
        let at = (index * DESCRIPTOR) as usize;
        let word2 = window.load_u32(at + 8, Acquire);
        let word3 = window.load_u32(at + 12, Acquire);
        Descriptor { address: u64::from_le(window.read::<u64>(at)), word2, word3 }
    }

    /// Writes the third word, and then the fourth, which tells the driver.
    pub fn write(&self, index: u32, word2: Option<u32>, word3: u32) {
        let Some(window) = &self.window else { return };
        let at = (index * DESCRIPTOR) as usize;
        if let Some(word2) = word2 {
            window.store_u32(at + 8, word2, Release);
        }
        window.store_u32(at + 12, word3, Release);
    }

    /// The place behind one.
    pub fn after(&self, index: u32) -> u32 {
        if index + 1 < self.size() { index + 1 } else { 0 }
    }
}
