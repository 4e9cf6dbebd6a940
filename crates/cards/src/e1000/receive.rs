//! Frames for the guest: into buffers of the ring, with what is known of them (manual, 3.2.3).

use smallvec::SmallVec;
use tetrarch_memory::{GuestPhys, ScatterList, Snapshot};

use super::ring::{DONE, Ring};

// Status and errors, in the fourth word.
const END: u32 = 1 << 1;
pub const IGNORE_SUMS: u32 = 1 << 2;
pub const TAGGED: u32 = 1 << 3;
pub const TRANSPORT_CHECKED: u32 = 1 << 5;
pub const IP_CHECKED: u32 = 1 << 6;
pub const INEXACT: u32 = 1 << 7;
pub const TRANSPORT_WRONG: u32 = 1 << 13;
pub const IP_WRONG: u32 = 1 << 14;
/// The data are not those of the frame.
const DATA_ERROR: u32 = 1 << 15;
pub const SPECIAL_SHIFT: u32 = 16;
/// In the third.
const SUM_SHIFT: u32 = 16;

/// A frame, and what its driver is told of it.
pub struct Arrival<'a> {
    /// Its bytes: a tag may have been taken out between them, padding and a check sequence follow.
    pub pieces: [&'a [u8]; 4],
    /// Status, errors and tag, as in the fourth word.
    pub known: u32,
    pub sum: u16,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Delivery {
    Done,
    /// Done, but for its bytes: a buffer is no RAM.
    Lost,
    /// The driver has no buffers for it now.
    Wait,
    /// The driver's buffers will never do.
    TooSmall,
}

pub struct RxQueue {
    pub ring: Ring,
}

impl RxQueue {
    /// Descriptors that are the card's.
    fn free(&self) -> u32 {
        let (size, tail, head) = (self.ring.size(), self.ring.tail(), self.ring.head);
        // A tail that is no place in the ring is never met: all are.
        if tail >= size { size } else { (tail + size - head) % size }
    }

    /// Whether no more than a part of them is left: 1/2, 1/4 or 1/8, by RCTL.RDMTS.
    pub fn is_low(&self, control: u32) -> bool {
        self.free() <= self.ring.size() >> ((control >> 8 & 3) + 1)
    }

    /// Puts a frame into buffers of so many bytes. The ring is open.
    pub fn deliver(&mut self, snapshot: &Snapshot, arrival: &Arrival<'_>, buffer: u32) -> Delivery {
        let size = self.ring.size();
        let total: usize = arrival.pieces.iter().map(|piece| piece.len()).sum();
        let mut left = total as u32;
        if left.div_ceil(buffer) >= size {
            return Delivery::TooSmall;
        }
        let mut free = self.free();
        // Those without an address are passed over (manual, 3.2.3).
        while free > 0 && self.ring.read(self.ring.head).address == 0 {
            self.ring.write(self.ring.head, Some(0), DONE);
            self.ring.head = self.ring.after(self.ring.head);
            free -= 1;
        }
        let mut list = ScatterList::new(snapshot.clone());
        let mut taken: SmallVec<[u32; 8]> = SmallVec::new();
        let mut behind = self.ring.head;
        let mut lost = false;
        while left > 0 {
            if free == 0 {
                return Delivery::Wait;
            }
            free -= 1;
            let address = self.ring.read(behind).address;
            behind = self.ring.after(behind);
            let here = if address == 0 { 0 } else { left.min(buffer) };
            lost |= list.push(GuestPhys(address), here.into()).is_err();
            taken.push(here);
            left -= here;
        }
        if !lost {
            let mut at = 0;
            for piece in arrival.pieces {
                at += list.write_at(at, piece) as u64;
            }
        }
        let known = arrival.known | if lost { DATA_ERROR } else { 0 };
        let last = taken.len() - 1;
        for (index, length) in taken.into_iter().enumerate() {
            let word2 = length | u32::from(arrival.sum) << SUM_SHIFT;
            let word3 = DONE | if index == last { END | known } else { 0 };
            self.ring.write(self.ring.head, Some(word2), word3);
            self.ring.head = self.ring.after(self.ring.head);
        }
        if lost { Delivery::Lost } else { Delivery::Done }
    }
}
