//! Frames of the guest: out of a ring, with what the driver left of their making.

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList, Snapshot};
use tetrarch_net::{
    Checksum, Counters, Direction, DropReason, NetBackend, Offload, Packet, Payload, Sent,
    prepare_tcp,
};

use super::layout::{ActivateError, QueueSetup};
use super::rings::{Command, CommandRing, CompletionRing, Cursor};

const MAX_RING: u32 = 4096;
/// Which bit of the third word of a descriptor is the generation.
const GENERATION_BIT: u32 = 14;

// Third word: length of 14 bits, type, and where the checksum is or how long segments are.
const LENGTH: u32 = (1 << 14) - 1;
const TYPE: u32 = 1 << 16;
const POSITION_SHIFT: u32 = 18;
// Fourth word.
const HEADER: u32 = (1 << 10) - 1;
const MODE_SHIFT: u32 = 10;
const LAST: u32 = 1 << 12;
const COMPLETE: u32 = 1 << 13;
const INSERT_TAG: u32 = 1 << 15;
const TAG_SHIFT: u32 = 16;

// Kinds of offload.
const NONE: u32 = 0;
const CHECKSUM: u32 = 2;
const SEGMENTS: u32 = 3;

/// Why a queue stands, as its driver reads it (VMXNET3_ERR_...).
const NO_END: u32 = 0x8000_0000;
const NOT_SUPPORTED: u32 = 0x8000_0003;

/// Frames in one turn on the I/O thread.
const TURN: usize = 256;

// Statistics (struct UPT1_TxStats): pairs of frames and bytes of segments, to one, to a group and to
// all; then what was malformed, and what was dropped.
const UNICAST: usize = 2;
const GROUP: usize = 4;
const ALL: usize = 6;
const ERRORS: usize = 8;

pub struct TxQueue {
    frames: CommandRing,
    completions: CompletionRing,
    pub interrupt: usize,
    pub statistics: [u64; 10],
    /// Why it stands; 0 while it does not.
    pub error: u32,
    /// A frame waits for the back end.
    pub blocked: bool,
}

/// How a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    Empty,
    /// There may be more.
    More,
    Blocked,
    /// The queue stands from now on.
    Broken,
}

/// A frame in the ring.
struct Gathered {
    /// Its first descriptor, and its last.
    first: Command,
    last: Command,
    /// None where it names what is no RAM.
    list: Option<ScatterList>,
    behind: Cursor,
}

impl TxQueue {
    pub fn new(memory: &GuestMemory, setup: &QueueSetup) -> Result<Self, ActivateError> {
        let [frames, _, completions] = setup.places;
        Ok(Self {
            frames: CommandRing::new(memory, frames, MAX_RING, GENERATION_BIT)?,
            completions: CompletionRing::new(memory, completions, MAX_RING)?,
            interrupt: setup.interrupt.into(),
            statistics: [0; 10],
            error: 0,
            blocked: false,
        })
    }

    pub fn cursors(&mut self) -> [&mut Cursor; 2] {
        [&mut self.frames.cursor, &mut self.completions.cursor]
    }

    /// Sends what there is; whether there are completions.
    pub fn serve(
        &mut self,
        snapshot: &Snapshot,
        backend: &mut dyn NetBackend,
        counters: &Counters,
        head: &mut Vec<u8>,
    ) -> (Turn, bool) {
        let mut completed = false;
        self.blocked = false;
        for _ in 0..TURN {
            if self.error != 0 {
                return (Turn::Broken, completed);
            }
            let gathered = match self.gather(snapshot) {
                Ok(Some(gathered)) => gathered,
                Ok(None) => return (Turn::Empty, completed),
                Err(error) => {
                    self.error = error;
                    return (Turn::Broken, completed);
                }
            };
            if !self.send(&gathered, backend, counters, head) {
                self.blocked = true;
                return (Turn::Blocked, completed);
            }
            self.frames.cursor = gathered.behind;
            if gathered.last.word3 & COMPLETE != 0 {
                self.completions.post([gathered.last.index, 0, 0, 0]);
                completed = true;
            }
        }
        (Turn::More, completed)
    }

    /// Takes the descriptors of the next frame together.
    fn gather(&self, snapshot: &Snapshot) -> Result<Option<Gathered>, u32> {
        let mut behind = self.frames.cursor;
        let Some(first) = self.frames.peek(behind) else { return Ok(None) };
        let mut list = Some(ScatterList::new(snapshot.clone()));
        let mut command = first;
        loop {
            if command.word2 & TYPE != 0 {
                return Err(NOT_SUPPORTED);
            }
            let length = match command.word2 & LENGTH {
                0 => LENGTH + 1,
                length => length,
            };
            let pushed =
                list.as_mut().map(|list| list.push(GuestPhys(command.address), length.into()));
            if pushed.is_some_and(|pushed| pushed.is_err()) {
                list = None;
            }
            self.frames.step(&mut behind);
            if command.word3 & LAST != 0 {
                return Ok(Some(Gathered { first, last: command, list, behind }));
            }
            if behind.next == self.frames.cursor.next {
                return Err(NO_END);
            }
            match self.frames.peek(behind) {
                Some(next) => command = next,
                // The first is given last: a driver that does otherwise is waited for.
                None => return Ok(None),
            }
        }
    }

    /// Whether the back end has taken it, or nobody will.
    fn send(
        &mut self,
        gathered: &Gathered,
        backend: &mut dyn NetBackend,
        counters: &Counters,
        head: &mut Vec<u8>,
    ) -> bool {
        let Some(list) = &gathered.list else { return self.refuse(counters, 0) };
        let Some((offload, rest)) = make(&gathered.first, list, head) else {
            return self.refuse(counters, list.len());
        };
        let payload = match &rest {
            Some(rest) => Payload::Headed(head, rest),
            None => Payload::Guest(list),
        };
        let packet = Packet { offload, payload };
        if !packet.is_sound() {
            return self.refuse(counters, list.len());
        }
        if backend.send(&packet) == Sent::Busy {
            return false;
        }
        let mut to = [0; 6];
        list.read_at(0, &mut to);
        let bytes = packet.len() as u64;
        let frames = offload.segments.map_or(1, |segments| {
            let data = packet.len().saturating_sub(segments.header.into());
            data.div_ceil(usize::from(segments.size).max(1)).max(1) as u64
        });
        counters.frame(Direction::Sent, bytes);
        let kind = if to == [0xFF; 6] {
            ALL
        } else if to[0] & 1 != 0 {
            GROUP
        } else {
            UNICAST
        };
        for at in [Some(kind), offload.segments.map(|_| 0)].into_iter().flatten() {
            self.statistics[at] += frames;
            self.statistics[at + 1] += bytes;
        }
        true
    }

    fn refuse(&mut self, counters: &Counters, length: u64) -> bool {
        counters.frame(Direction::Sent, length);
        counters.dropped(Direction::Sent, DropReason::Malformed);
        self.statistics[ERRORS] += 1;
        true
    }
}

/// What is left of a frame's making; and where headers are made anew, in `head`, what is behind
/// them. None for what no driver may ask.
fn make(
    first: &Command,
    list: &ScatterList,
    head: &mut Vec<u8>,
) -> Option<(Offload, Option<ScatterList>)> {
    let header = (first.word3 & HEADER) as usize;
    let position = (first.word2 >> POSITION_SHIFT) as usize;
    let mode = first.word3 >> MODE_SHIFT & 3;
    let tag = (first.word3 & INSERT_TAG != 0).then_some((first.word3 >> TAG_SHIFT) as u16);
    let inserted = if tag.is_some() { 4 } else { 0 };
    // Two addresses are before the tag.
    let own = match (mode, tag) {
        (SEGMENTS, _) => header.max(12),
        (_, Some(_)) => 12,
        _ => 0,
    };
    head.clear();
    head.resize(own, 0);
    if list.read_at(0, head) < own {
        return None;
    }
    if let Some(tag) = tag {
        let [high, low] = tag.to_be_bytes();
        head.splice(12..12, [0x81, 0, high, low]);
    }
    let offload = match mode {
        NONE => Offload::default(),
        CHECKSUM => {
            let start = u16::try_from(header + inserted).ok()?;
            let offset = u16::try_from(position.checked_sub(header)?).ok()?;
            Offload { checksum: Checksum::Partial { start, offset }, segments: None }
        }
        SEGMENTS => {
            let size = u16::try_from(position).ok()?;
            prepare_tcp(head, list.len() as usize + inserted, size).ok()?
        }
        _ => return None,
    };
    let rest = (own > 0).then(|| list.split_at(own as u64).1);
    Some((offload, rest))
}
