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
/// VMXNET3_CDTYPE_RXCOMP, and VMXNET3_CDTYPE_RXCOMP_LRO, whose second word has a count of segments
/// and whose fourth ends with the size of their data.
const KIND: u32 = 3 << 24;
const KIND_BIG: u32 = 4 << 24;
const MAX_SEGMENTS: usize = 0xFF;

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
    /// It is of several segments, of so many bytes of data.
    pub segments: Option<u16>,
    /// The driver hears how many (revision 2).
    pub tells_segments: bool,
    /// Kind and value.
    pub hash: (u32, u32),
}

impl Arrival<'_> {
    /// How many segments it is of, and the size of each but the last, where the driver hears of it.
    fn segments(&self) -> Option<(u32, u32)> {
        const TCP_LENGTH: usize = 12;
        let size = self.segments.filter(|&size| size > 0 && self.tells_segments)?;
        let layers = self.contents?.layers;
        let at = layers.transport + TCP_LENGTH;
        let [first, second] = self.pieces;
        let words = first.get(at).or_else(|| second.get(at.checked_sub(first.len())?))? >> 4;
        let data = layers.end.checked_sub(layers.transport + 4 * usize::from(words))?;
        let count = data.div_ceil(size.into()).clamp(1, MAX_SEGMENTS);
        Some((count as u32, size.into()))
    }
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
        let big = arrival.segments().filter(|_| known & TCP != 0);
        for (index, &(ring, descriptor, length)) in buffers.iter().enumerate() {
            let mut first = descriptor | (number as u32 + ring * queues as u32) << QUEUE_SHIFT;
            // Where segments are told there is no place for a hash.
            let (second, fourth) = match big.filter(|_| index == 0) {
                Some((count, size)) => (count, known & !KIND | KIND_BIG | size),
                None => {
                    first |= kind << HASH_SHIFT;
                    (hash, known)
                }
            };
            for (bit, is) in [
                (FIRST, index == 0),
                (LAST, index + 1 == buffers.len()),
                (NOT_CALCULATED, !calculated),
            ] {
                first |= if is { bit } else { 0 };
            }
            self.completions.post([first, second, length | tag, fourth]);
        }
    }

    fn count(&mut self, arrival: &Arrival<'_>, bytes: u64) {
        let kind = match arrival.pieces[0] {
            [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, ..] => ALL,
            [first, ..] if first & 1 != 0 => GROUP,
            _ => UNICAST,
        };
        for at in [Some(kind), arrival.segments.map(|_| BIG)].into_iter().flatten() {
            self.statistics[at] += 1;
            self.statistics[at + 1] += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rings::Place;
    use super::*;

    const HEADS: u64 = 0x1000;
    const BODIES: u64 = 0x2000;
    const COMPLETIONS: u64 = 0x3000;
    const BUFFERS: u64 = 0x1_0000;
    const HEADERS: usize = 54;

    /// A queue with buffers of 2 KiB, the first of each frame in the first ring.
    fn queue(memory: &GuestMemory) -> RxQueue {
        for (ring, kind) in [(HEADS, 0), (BODIES, BODY)] {
            for index in 0..31 {
                let address = BUFFERS + (ring - HEADS) * 0x10 + 2048 * index;
                let word = 2048 | kind | 1 << GENERATION_BIT;
                let at = ring + 16 * index;
                memory.write(GuestPhys(at), &address.to_le_bytes()).unwrap();
                memory.write(GuestPhys(at + 8), &word.to_le_bytes()).unwrap();
            }
        }
        let places = [HEADS, BODIES, COMPLETIONS].map(|base| Place { base, size: 32 });
        RxQueue::new(memory, &QueueSetup { places, interrupt: 0 }).unwrap()
    }

    /// A TCP segment by IPv4 with so many bytes of data.
    fn tcp(data: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + data as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0; 12]);
        frame.extend([0x50, 0x10]);
        frame.resize(HEADERS + data, 0);
        frame
    }

    fn completion(memory: &GuestMemory, index: u64) -> [u32; 4] {
        let mut bytes = [0; 16];
        memory.read(GuestPhys(COMPLETIONS + 16 * index), &mut bytes).unwrap();
        let mut words = bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word));
        [(); 4].map(|()| words.next().unwrap())
    }

    #[test]
    fn revision_2_tells_how_many_segments_a_frame_is_of() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut queue = queue(&memory);
        let mut next = 0;
        for (data, size, tells, expected) in [
            (5000, Some(1448), true, Some((4, 1448))),
            (4344, Some(1448), true, Some((3, 1448))),
            (10, Some(1448), true, Some((1, 1448))),
            // As many as there is room for in the completion.
            (5000, Some(1), true, Some((0xFF, 1))),
            (5000, Some(0), true, None),
            (5000, Some(1448), false, None),
            (1000, None, true, None),
        ] {
            let frame = tcp(data);
            let arrival = Arrival {
                pieces: [&frame, &[]],
                tag: None,
                contents: Contents::of(&frame),
                verified: true,
                segments: size,
                tells_segments: tells,
                hash: (2, 0xABCD),
            };
            let delivery = queue.deliver(&memory.snapshot(), &arrival, 18, (0, 1));
            assert_eq!(delivery, Delivery::Done);
            let [first, second, _, fourth] = completion(&memory, next);
            let kind = fourth >> 24 & 0x7F;
            match expected {
                Some((count, size)) => {
                    assert_eq!((kind, second & 0xFF, fourth & 0xFFFF), (4, count, size));
                    assert_eq!(first >> HASH_SHIFT & 0xF, 0, "no hash");
                }
                None => assert_eq!((kind, second, fourth & 0xFFFF), (3, 0xABCD, 0)),
            }
            let parts = frame.len().div_ceil(2048) as u64;
            next += parts;
            let [last, hash, _, flags] = completion(&memory, next - 1);
            assert_ne!(last & LAST, 0);
            assert_ne!(flags & TCP, 0);
            if parts > 1 {
                assert_eq!((flags >> 24 & 0x7F, hash), (3, 0xABCD), "the first alone tells");
            }
        }
    }
}
