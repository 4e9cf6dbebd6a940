//! Rings in guest memory. A bit of each descriptor, the generation, says whose it is; its meaning
//! turns with each round.

use std::sync::atomic::Ordering::{Acquire, Release};

use tetrarch_memory::{GuestMemory, GuestPhys, Window};

use super::layout::ActivateError;

/// Descriptors of all rings.
pub const DESCRIPTOR: usize = 16;
const ALIGNMENT: u64 = 512;
const SIZE_MULTIPLE: u32 = 32;

/// Where a ring is, and of how many descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub base: u64,
    pub size: u32,
}

/// How far one side is in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub next: u32,
    pub generation: bool,
}

impl Cursor {
    pub const FIRST: Self = Self { next: 0, generation: true };

    fn step(&mut self, size: u32) {
        self.next += 1;
        if self.next >= size {
            *self = Self { next: 0, generation: !self.generation };
        }
    }
}

/// Takes a ring of at most `most` descriptors.
fn window(memory: &GuestMemory, place: Place, most: u32) -> Result<Window, ActivateError> {
    let Place { base, size } = place;
    if size == 0 || size > most || !size.is_multiple_of(SIZE_MULTIPLE) {
        return Err(ActivateError::Size(size));
    }
    if !base.is_multiple_of(ALIGNMENT) {
        return Err(ActivateError::Alignment(base));
    }
    Ok(Window::new(&memory.snapshot(), GuestPhys(base), size as usize * DESCRIPTOR)?)
}

/// A ring of what the driver gives: frames, or buffers for them.
pub struct CommandRing {
    window: Window,
    pub place: Place,
    pub cursor: Cursor,
    /// Where in the words the generation is: which of them, and which bit.
    generation: (usize, u32),
}

/// A descriptor of one, as the driver left it.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    pub index: u32,
    pub address: u64,
    pub word2: u32,
    pub word3: u32,
}

impl CommandRing {
    pub fn new(
        memory: &GuestMemory,
        place: Place,
        most: u32,
        generation_bit: u32,
    ) -> Result<Self, ActivateError> {
        let window = window(memory, place, most)?;
        Ok(Self { window, place, cursor: Cursor::FIRST, generation: (8, 1 << generation_bit) })
    }

    /// The descriptor at a cursor, if it is the card's.
    pub fn peek(&self, cursor: Cursor) -> Option<Command> {
        let at = cursor.next as usize * DESCRIPTOR;
        let (word, bit) = self.generation;
        let word2 = self.window.load_u32(at + word, Acquire);
        if (word2 & bit != 0) != cursor.generation {
            return None;
        }
        let address = u64::from_le(self.window.read::<u64>(at));
        let word3 = self.window.load_u32(at + 12, Acquire);
        Some(Command { index: cursor.next, address, word2, word3 })
    }

    pub fn step(&self, cursor: &mut Cursor) {
        cursor.step(self.place.size);
    }
}

/// A ring of what the card says.
pub struct CompletionRing {
    window: Window,
    pub place: Place,
    pub cursor: Cursor,
}

impl CompletionRing {
    pub fn new(memory: &GuestMemory, place: Place, most: u32) -> Result<Self, ActivateError> {
        let window = window(memory, place, most)?;
        Ok(Self { window, place, cursor: Cursor::FIRST })
    }

    /// Writes one; of its last word the highest bit is the generation.
    pub fn post(&mut self, [first, second, third, last]: [u32; 4]) {
        let at = self.cursor.next as usize * DESCRIPTOR;
        let word = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le();
        self.window.write(at, word(first, second));
        self.window.store_u32(at + 8, third, Release);
        let generation = u32::from(self.cursor.generation) << 31;
        self.window.store_u32(at + 12, last & !(1 << 31) | generation, Release);
        self.cursor.step(self.place.size);
    }
}

/// Of a saved state.
pub fn cursor(place: Place, next: u64, generation: u64) -> Option<Cursor> {
    let next = u32::try_from(next).ok().filter(|&next| next < place.size)?;
    Some(Cursor { next, generation: generation != 0 })
}
