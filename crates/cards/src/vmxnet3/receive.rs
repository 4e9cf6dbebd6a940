//! Frames for the guest: into buffers of its rings, with what is known of them.

use smallvec::SmallVec;
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList, Snapshot};
use tetrarch_net::{Contents, Family};

use super::layout::{ActivateError, QueueSetup};
use super::rings::{Command, CommandRing, CompletionRing, Cursor};

const MAX_RING: u32 = 4096;
const MAX_COMPLETIONS: u32 = 8192;
/// Which bit of the third word of a descriptor is the generation.
const GENERATION_BIT: u32 = 31;

// Third word of a descriptor: length, and whether it is for what is behind a frame's first buffer.
const LENGTH: u32 = (1 << 14) - 1;
const BODY: u32 = 1 << 14;
const TYPE: u32 = 1 << 15;
/// VMXNET3_MIN_T0_BUF_SIZE: of a first buffer.
const MIN_HEAD: u32 = 128;

// First word of a completion.
const LAST: u32 = 1 << 14;
const FIRST: u32 = 1 << 15;
const QUEUE_SHIFT: u32 = 16;
const HASH_SHIFT: u32 = 26;
const NOT_CALCULATED: u32 = 1 << 30;
// Third word: length, and the tag that was taken off.
const TAG_TAKEN: u32 = 1 << 15;
const TAG_SHIFT: u32 = 16;
// Fourth word.
const TRANSPORT_RIGHT: u32 = 1 << 16;
const UDP: u32 = 1 << 17;
const TCP: u32 = 1 << 18;
const IP_RIGHT: u32 = 1 << 19;
const IPV6: u32 = 1 << 20;
const IPV4: u32 = 1 << 21;
const FRAGMENT: u32 = 1 << 22;
const FRAME_CHECK_RIGHT: u32 = 1 << 23;
/// VMXNET3_CDTYPE_RXCOMP.
const KIND: u32 = 3 << 24;

/// Why a queue stands (VMXNET3_ERR_...).
const NOT_SUPPORTED: u32 = 0x8000_0003;
const SMALL_BUFFER: u32 = 0x8000_0004;

// Statistics (struct UPT1_RxStats).
const BIG: usize = 0;
const UNICAST: usize = 2;
const GROUP: usize = 4;
const ALL: usize = 6;
pub const NO_BUFFER: usize = 8;
pub const ERRORS: usize = 9;

pub struct RxQueue {
    heads: CommandRing,
    /// None where the driver has none.
    bodies: Option<CommandRing>,
    completions: CompletionRing,
    pub interrupt: usize,
    pub statistics: [u64; 10],
    /// Why it stands; 0 while it does not.
    pub error: u32,
    /// The driver was asked to ring for buffers.
    pub waits: bool,
}

/// A frame, and what its driver is told of it.
pub struct Arrival<'a> {
    /// Its bytes, between which a tag was taken out.
    pub pieces: [&'a [u8]; 2],
    pub tag: Option<u16>,
    pub contents: Option<Contents>,
    /// The checksum of TCP or UDP is right.
    pub verified: bool,
    /// It is of several segments.
    pub big: bool,
    /// Kind and value.
    pub hash: (u32, u32),
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Delivery {
    Done,
    /// The driver has no buffers for it now.
    Wait,
    /// The driver's buffers will never do.
    TooSmall,
    /// The queue stands from now on.
    Broken,
}

/// A buffer of a frame: its ring, its descriptor, and how many bytes go there.
type Buffer = (u32, u32, u32);

impl RxQueue {
    pub fn new(memory: &GuestMemory, setup: &QueueSetup) -> Result<Self, ActivateError> {
        let [heads, bodies, completions] = setup.places;
        let ring = |place| CommandRing::new(memory, place, MAX_RING, GENERATION_BIT);
        Ok(Self {
            heads: ring(heads)?,
            bodies: if bodies.size == 0 { None } else { Some(ring(bodies)?) },
            completions: CompletionRing::new(memory, completions, MAX_COMPLETIONS)?,
            interrupt: setup.interrupt.into(),
            statistics: [0; 10],
            error: 0,
            waits: false,
        })
    }

    pub fn cursors(&mut self) -> impl Iterator<Item = &mut Cursor> {
        let bodies = self.bodies.as_mut().map(|ring| &mut ring.cursor);
        [&mut self.heads.cursor, &mut self.completions.cursor].into_iter().chain(bodies)
    }

    /// Puts a frame into buffers, `most` of them. `number` is the queue's, of `queues`.
    pub fn deliver(
        &mut self,
        snapshot: &Snapshot,
        arrival: &Arrival<'_>,
        most: u32,
        (number, queues): (usize, usize),
    ) -> Delivery {
        let total: usize = arrival.pieces.iter().map(|piece| piece.len()).sum();
        let mut left = total as u32;
        let mut list = ScatterList::new(snapshot.clone());
        let mut buffers: SmallVec<[Buffer; 20]> = SmallVec::new();
        let mut cursors =
            [self.heads.cursor, self.bodies.as_ref().map_or(Cursor::FIRST, |ring| ring.cursor)];
        while left > 0 {
            if buffers.len() as u32 >= most {
                return Delivery::TooSmall;
            }
            let found = if buffers.is_empty() {
                self.head(&mut cursors[0])
            } else {
                self.body(&mut cursors, &buffers)
            };
            let (ring, command) = match found {
                Ok(found) => found,
                Err(delivery) => return delivery,
            };
            let room = command.word2 & LENGTH;
            let least = if buffers.is_empty() { MIN_HEAD } else { 1 };
            let here = room.min(left);
            if command.word2 & TYPE != 0 {
                self.error = NOT_SUPPORTED;
            } else if room < least || list.push(GuestPhys(command.address), here.into()).is_err() {
                self.error = SMALL_BUFFER;
            }
            if self.error != 0 {
                return Delivery::Broken;
            }
            buffers.push((ring, command.index, here));
            left -= here;
        }
        let mut at = 0;
        for piece in arrival.pieces {
            at += list.write_at(at, piece) as u64;
        }
        self.heads.cursor = cursors[0];
        if let Some(bodies) = &mut self.bodies {
            bodies.cursor = cursors[1];
        }
        self.complete(&buffers, arrival, number, queues);
        self.count(arrival, total as u64);
        Delivery::Done
    }

    /// The next first buffer; others before it are left out.
    fn head(&self, cursor: &mut Cursor) -> Result<(u32, Command), Delivery> {
        for _ in 0..self.heads.place.size {
            let command = self.heads.peek(*cursor).ok_or(Delivery::Wait)?;
            self.heads.step(cursor);
            if command.word2 & BODY == 0 {
                return Ok((0, command));
            }
        }
        Err(Delivery::TooSmall)
    }

    /// The next buffer for what is behind the first: of the first ring where it goes on so, else of
    /// the second.
    fn body(
        &self,
        [heads, bodies]: &mut [Cursor; 2],
        taken: &[Buffer],
    ) -> Result<(u32, Command), Delivery> {
        let next = self.heads.peek(*heads);
        if let Some(command) = next.filter(|command| command.word2 & BODY != 0) {
            self.heads.step(heads);
            return Ok((0, command));
        }
        let Some(ring) = &self.bodies else {
            // Its buffers may be on their way to the first.
            return Err(if next.is_none() { Delivery::Wait } else { Delivery::TooSmall });
        };
        for _ in 0..ring.place.size {
            let Some(command) = ring.peek(*bodies) else {
                // A driver leaves one descriptor free.
                let taken = taken.iter().filter(|&&(ring, ..)| ring == 1).count() as u32;
                let all = taken + 1 >= ring.place.size;
                return Err(if all { Delivery::TooSmall } else { Delivery::Wait });
            };
            ring.step(bodies);
            if command.word2 & BODY != 0 {
                return Ok((1, command));
            }
        }
        Err(Delivery::TooSmall)
    }

    fn complete(
        &mut self,
        buffers: &[Buffer],
        arrival: &Arrival<'_>,
        number: usize,
        queues: usize,
    ) {
        let mut known = KIND | FRAME_CHECK_RIGHT;
        let mut calculated = false;
        // Of what is behind a tag that it has left, drivers expect no more than of any frame.
        if let Some(contents) = arrival.contents.filter(|contents| !contents.is_tagged()) {
            known |= match contents.layers.family {
                Family::V4 => IPV4,
                Family::V6 => IPV6,
            };
            let fragment = contents.layers.fragment.is_some();
            calculated = arrival.verified && contents.ip_right && !fragment;
            for (bit, is) in [
                (FRAGMENT, fragment),
                (TCP, contents.is_tcp()),
                (UDP, contents.is_udp()),
                (IP_RIGHT, contents.ip_right && contents.layers.family == Family::V4),
                (TRANSPORT_RIGHT, calculated),
            ] {
                known |= if is { bit } else { 0 };
            }
        }
        let (kind, hash) = arrival.hash;
        let tag = arrival.tag.map_or(0, |tag| TAG_TAKEN | u32::from(tag) << TAG_SHIFT);
        for (index, &(ring, descriptor, length)) in buffers.iter().enumerate() {
            let mut first = descriptor | (number as u32 + ring * queues as u32) << QUEUE_SHIFT;
            first |= kind << HASH_SHIFT;
            for (bit, is) in [
                (FIRST, index == 0),
                (LAST, index + 1 == buffers.len()),
                (NOT_CALCULATED, !calculated),
            ] {
                first |= if is { bit } else { 0 };
            }
            self.completions.post([first, hash, length | tag, known]);
        }
    }

    fn count(&mut self, arrival: &Arrival<'_>, bytes: u64) {
        let kind = match arrival.pieces[0] {
            [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, ..] => ALL,
            [first, ..] if first & 1 != 0 => GROUP,
            _ => UNICAST,
        };
        for at in [Some(kind), arrival.big.then_some(BIG)].into_iter().flatten() {
            self.statistics[at] += 1;
            self.statistics[at + 1] += bytes;
        }
    }
}
