//! Rings in guest memory, and the page that says how far each side is in them.

use std::sync::atomic::Ordering::{Acquire, Release};

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, Window};

use super::request::{COMPLETION, REQUEST, Request};
use super::{MAX_MESSAGE_PAGES, MAX_RING_PAGES, PAGE};

/// Bytes of a message.
const MESSAGE: usize = 128;
/// Entries of a page.
const REQUESTS: u32 = PAGE as u32 / REQUEST as u32;
const COMPLETIONS: u32 = PAGE as u32 / COMPLETION as u32;
const MESSAGES: u32 = PAGE as u32 / MESSAGE as u32;

// Places in the page of their state. Indices count on; where an entry is, their low bits say.
const REQUEST_PRODUCER: usize = 0;
const REQUEST_CONSUMER: usize = 4;
const REQUEST_ENTRIES: usize = 8;
const COMPLETION_PRODUCER: usize = 12;
const COMPLETION_CONSUMER: usize = 16;
const COMPLETION_ENTRIES: usize = 20;
const CALL_THRESHOLD: usize = 24;
const MESSAGE_PRODUCER: usize = 128;
const MESSAGE_CONSUMER: usize = 132;
const MESSAGE_ENTRIES: usize = 136;

/// Numbers of pages, as the driver gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RingPages {
    pub state: u64,
    pub requests: Vec<u64>,
    pub completions: Vec<u64>,
}

/// A ring, as pages of guest memory.
struct Ring {
    pages: Vec<Window>,
    /// Its size, a power of 2.
    entries: u32,
}

impl Ring {
    fn new(
        memory: &GuestMemory,
        numbers: &[u64],
        most: usize,
        per_page: u32,
    ) -> Result<Self, MemoryError> {
        if !numbers.len().is_power_of_two() || numbers.len() > most {
            return Err(MemoryError::TooManyPieces);
        }
        let pages = numbers.iter().map(|&number| page(memory, number));
        let pages = pages.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { entries: per_page * pages.len() as u32, pages })
    }

    /// The page of an entry, and where in it.
    fn place(&self, index: u32, bytes: usize) -> (&Window, usize) {
        let at = (index & (self.entries - 1)) as usize * bytes;
        (&self.pages[at / PAGE as usize], at % PAGE as usize)
    }

    fn numbers(&self) -> impl Iterator<Item = u64> {
        self.pages.iter().map(|page| page.start().0 / PAGE)
    }
}

fn page(memory: &GuestMemory, number: u64) -> Result<Window, MemoryError> {
    let start = GuestPhys(number.saturating_mul(PAGE));
    Window::new(&memory.snapshot(), start, PAGE as usize)
}

struct MessageRing {
    ring: Ring,
    /// The index of the message that is written next.
    posted: u32,
}

/// The rings of a controller whose driver has set them up.
pub struct Rings {
    state: Window,
    requests: Ring,
    completions: Ring,
    /// The index of the request that is taken next,
    taken: u32,
    /// and of the completion that is written next.
    posted: u32,
    messages: Option<MessageRing>,
}

impl Rings {
    pub fn new(memory: &GuestMemory, pages: &RingPages) -> Result<Self, MemoryError> {
        Ok(Self {
            state: page(memory, pages.state)?,
            requests: Ring::new(memory, &pages.requests, MAX_RING_PAGES, REQUESTS)?,
            completions: Ring::new(memory, &pages.completions, MAX_RING_PAGES, COMPLETIONS)?,
            taken: 0,
            posted: 0,
            messages: None,
        })
    }

    fn set(&self, at: usize, value: u32) {
        self.state.store_u32(at, value, Release);
    }

    /// As they are at first: what the driver reads of them.
    pub fn begin(&self) {
        for at in [REQUEST_PRODUCER, REQUEST_CONSUMER, COMPLETION_PRODUCER, COMPLETION_CONSUMER] {
            self.set(at, 0);
        }
        self.set(REQUEST_ENTRIES, self.requests.entries.ilog2());
        self.set(COMPLETION_ENTRIES, self.completions.entries.ilog2());
        self.set(CALL_THRESHOLD, 0);
    }

    /// A driver kicks where so many requests wait. With one it leaves that out for those which
    /// were taken already.
    pub fn set_threshold(&self, enable: bool) {
        self.set(CALL_THRESHOLD, enable.into());
    }

    /// The next request, where there is one.
    pub fn take(&mut self) -> Option<Request> {
        let waiting = self.state.load_u32(REQUEST_PRODUCER, Acquire).wrapping_sub(self.taken);
        // More than there can be: it is no index.
        if waiting == 0 || waiting > self.requests.entries {
            return None;
        }
        let (page, at) = self.requests.place(self.taken, REQUEST);
        let request = Request::of_words(page.read(at));
        self.taken = self.taken.wrapping_add(1);
        self.set(REQUEST_CONSUMER, self.taken);
        Some(request)
    }

    /// How many requests the ring can hold.
    pub fn entries(&self) -> u32 {
        self.requests.entries
    }

    /// Whether there is a place for one more completion behind `others`.
    pub fn has_room(&self, others: u32) -> bool {
        let consumer = self.state.load_u32(COMPLETION_CONSUMER, Acquire);
        let used = self.posted.wrapping_sub(consumer);
        used.checked_add(others).is_some_and(|used| used < self.completions.entries)
    }

    /// Of who has found room.
    pub fn post(&mut self, completion: [u64; COMPLETION / 8]) {
        let (page, at) = self.completions.place(self.posted, COMPLETION);
        page.write(at, completion);
        self.posted = self.posted.wrapping_add(1);
        self.set(COMPLETION_PRODUCER, self.posted);
    }

    pub fn set_messages(
        &mut self,
        memory: &GuestMemory,
        numbers: &[u64],
    ) -> Result<(), MemoryError> {
        let ring = Ring::new(memory, numbers, MAX_MESSAGE_PAGES, MESSAGES)?;
        self.set(MESSAGE_PRODUCER, 0);
        self.set(MESSAGE_CONSUMER, 0);
        self.set(MESSAGE_ENTRIES, ring.entries.ilog2());
        self.messages = Some(MessageRing { ring, posted: 0 });
        Ok(())
    }

    pub fn tells(&self) -> bool {
        self.messages.is_some()
    }

    /// Tells of a target; gives the message's index, `None` where there is no room.
    pub fn tell(&mut self, kind: u32, target: u32) -> Option<u32> {
        let messages = self.messages.as_mut()?;
        let consumer = self.state.load_u32(MESSAGE_CONSUMER, Acquire);
        if messages.posted.wrapping_sub(consumer) >= messages.ring.entries {
            return None;
        }
        let mut words = [0_u64; MESSAGE / 8];
        // Kind, bus, target; the unit's number is 0.
        words[0] = u64::from(kind).to_le();
        words[1] = u64::from(target).to_le();
        let (page, at) = messages.ring.place(messages.posted, MESSAGE);
        page.write(at, words);
        let index = messages.posted;
        messages.posted = messages.posted.wrapping_add(1);
        self.state.store_u32(MESSAGE_PRODUCER, messages.posted, Release);
        Some(index)
    }

    /// Whether the driver is done with a message.
    pub fn has_heard(&self, index: u32) -> bool {
        let consumer = self.state.load_u32(MESSAGE_CONSUMER, Acquire);
        consumer.wrapping_sub(index).wrapping_sub(1) < u32::MAX / 2
    }

    /// Pages, those of messages, and how far each ring is.
    pub fn save(&self) -> (RingPages, Vec<u64>, [u32; 3]) {
        let pages = RingPages {
            state: self.state.start().0 / PAGE,
            requests: self.requests.numbers().collect(),
            completions: self.completions.numbers().collect(),
        };
        let told = self.messages.as_ref().map_or(0, |messages| messages.posted);
        let messages = self.messages.iter().flat_map(|messages| messages.ring.numbers());
        (pages, messages.collect(), [self.taken, self.posted, told])
    }

    pub fn load(
        memory: &GuestMemory,
        pages: &RingPages,
        messages: &[u64],
        [taken, posted, told]: [u32; 3],
    ) -> Result<Self, MemoryError> {
        let mut rings = Self { taken, posted, ..Self::new(memory, pages)? };
        if !messages.is_empty() {
            let ring = Ring::new(memory, messages, MAX_MESSAGE_PAGES, MESSAGES)?;
            rings.messages = Some(MessageRing { ring, posted: told });
        }
        Ok(rings)
    }
}
