//! Frames of the guest: out of a ring, with what the driver left of their making (manual, 3.3).

use tetrarch_memory::{GuestPhys, ScatterList, Snapshot};
use tetrarch_net::{
    Checksum, Counters, Direction, DropReason, MAX_FRAME, Offload, Packet, Payload, Sent, complete,
    prepare_tcp,
};

use super::ring::{DONE, Descriptor, Ring};
use super::statistics::{Statistics, TSCTC, TSCTFC};

// Commands, in the third word.
const END: u32 = 1 << 24;
const INSERT_CHECK: u32 = 1 << 25;
/// Of an extended descriptor, which is to be divided; of another a checksum is to be inserted.
const SEGMENT: u32 = 1 << 26;
const INSERT_SUM: u32 = 1 << 26;
const REPORT: u32 = 3 << 27;
const EXTENDED: u32 = 1 << 29;
const INSERT_TAG: u32 = 1 << 30;
const DELAY: u32 = 1 << 31;
/// A context for TCP, of what is to be divided.
const CONTEXT_TCP: u32 = 1 << 24;

// What is to be inserted, in the fourth word of the first descriptor of data.
const IP_SUM: u32 = 1 << 8;
const TRANSPORT_SUM: u32 = 1 << 9;
const SPECIAL_SHIFT: u32 = 16;
/// EC, LC and TU, which are the 82544's.
const OTHER_STATUS: u32 = 0xE;

/// Bytes of the check sequence of a frame.
const CHECK: usize = 4;

/// Frames in one turn on the I/O thread; fewer where each is copied.
pub const TURN: usize = 256;
pub const COPIED_TURN: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Legacy,
    Context,
    Data,
    /// There is none.
    Unknown,
}

fn kind(descriptor: &Descriptor) -> Kind {
    match (descriptor.word2 & EXTENDED != 0, descriptor.word2 >> 20 & 0xF) {
        (false, _) => Kind::Legacy,
        (true, 0) => Kind::Context,
        (true, 1) => Kind::Data,
        (true, _) => Kind::Unknown,
    }
}

/// Where a checksum is made: of bytes from `start` to `end` (0: all), at `offset`.
#[derive(Clone, Copy)]
struct Sum {
    start: usize,
    offset: usize,
    end: usize,
}

/// A context descriptor (manual, 3.3.6) as it was given: four words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context(pub [u32; 4]);

impl Context {
    fn of(descriptor: &Descriptor) -> Self {
        let address = descriptor.address;
        Self([address as u32, (address >> 32) as u32, descriptor.word2, descriptor.word3])
    }

    fn sum(&self, word: usize) -> Sum {
        let [start, offset, low, high] = self.0[word].to_le_bytes();
        let end = u16::from_le_bytes([low, high]).into();
        Sum { start: start.into(), offset: offset.into(), end }
    }

    /// Bytes of all headers, and of data in each segment.
    fn segments(&self) -> (usize, u16) {
        ((self.0[3] >> 8 & 0xFF) as usize, (self.0[3] >> 16) as u16)
    }
}

/// How a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    Empty,
    /// There may be more.
    More,
    Blocked,
}

/// What a turn has to say.
#[derive(Debug, PartialEq, Eq)]
pub struct Report {
    pub turn: Turn,
    /// Descriptors were taken, or written back; the driver lets its interrupt wait.
    pub took: bool,
    pub wrote: bool,
    pub delayed: bool,
    /// The descriptors that are left became as few as the driver has said.
    pub low: bool,
}

/// What holds for all frames.
pub struct Settings {
    /// The Ethernet type of tags that are inserted.
    pub tag_type: Option<[u8; 2]>,
    pub low_threshold: u32,
    pub most: usize,
}

/// Counters of the network, and registers of the card.
pub struct Counts<'a> {
    pub counters: &'a Counters,
    pub statistics: &'a mut Statistics,
}

pub struct TxQueue {
    pub ring: Ring,
    /// Of what is not to be divided, and of what is.
    pub contexts: [Context; 2],
    /// A frame waits for the back end.
    pub blocked: bool,
}

/// A frame in the ring.
struct Gathered {
    /// Its first descriptor, and its last.
    first: Descriptor,
    last: Descriptor,
    /// None where it names what is no RAM.
    list: Option<ScatterList>,
    behind: u32,
}

impl TxQueue {
    pub fn new(ring: Ring) -> Self {
        Self { ring, contexts: [Context::default(); 2], blocked: false }
    }

    /// Sends what there is. The ring is open.
    pub fn serve(
        &mut self,
        snapshot: &Snapshot,
        settings: &Settings,
        send: &mut dyn FnMut(&Packet<'_>) -> Sent,
        mut counts: Counts<'_>,
        head: &mut Vec<u8>,
    ) -> Report {
        let mut report =
            Report { turn: Turn::More, took: false, wrote: false, delayed: true, low: false };
        for _ in 0..settings.most {
            let Some(first) = self.next() else {
                report.turn = Turn::Empty;
                break;
            };
            let behind = if kind(&first) == Kind::Context {
                self.ring.after(self.ring.head)
            } else {
                let Some(gathered) = self.gather(snapshot, first) else {
                    report.turn = Turn::Empty;
                    break;
                };
                if !self.send(&gathered, settings, send, &mut counts, head) {
                    self.blocked = true;
                    report.turn = Turn::Blocked;
                    break;
                }
                gathered.behind
            };
            self.pass(behind, settings, &mut report);
        }
        report
    }

    /// The descriptor at the head, if it is the card's. A tail that is no place in the ring gives
    /// none.
    fn next(&self) -> Option<Descriptor> {
        let tail = self.ring.tail();
        (tail < self.ring.size() && tail != self.ring.head).then(|| self.ring.read(self.ring.head))
    }

    fn left(&self) -> u32 {
        let size = self.ring.size();
        (self.ring.tail() + size - self.ring.head) % size.max(1)
    }

    /// Ends the descriptors before a place.
    fn pass(&mut self, behind: u32, settings: &Settings, report: &mut Report) {
        report.took = true;
        let before = self.left();
        loop {
            let head = self.ring.head;
            let descriptor = self.ring.read(head);
            if kind(&descriptor) == Kind::Context {
                let which = usize::from(descriptor.word2 & SEGMENT != 0);
                self.contexts[which] = Context::of(&descriptor);
            }
            if descriptor.word2 & REPORT != 0 {
                self.ring.write(head, None, descriptor.word3 & !OTHER_STATUS | DONE);
                report.wrote = true;
                report.delayed &= descriptor.word2 & DELAY != 0;
            }
            self.ring.head = self.ring.after(head);
            if self.ring.head == behind {
                break;
            }
        }
        report.low |= before > settings.low_threshold && self.left() <= settings.low_threshold;
    }

    /// Takes the descriptors of the next frame together; a driver that has not given its last is
    /// waited for.
    fn gather(&self, snapshot: &Snapshot, first: Descriptor) -> Option<Gathered> {
        let tail = self.ring.tail();
        let mut list = Some(ScatterList::new(snapshot.clone()));
        let (mut at, mut last) = (self.ring.head, first);
        loop {
            let length = match kind(&last) {
                // Those without an address carry nothing (manual, 3.3.3).
                _ if last.address == 0 => 0,
                Kind::Legacy => last.word2 & 0xFFFF,
                Kind::Data => last.word2 & 0xF_FFFF,
                Kind::Context | Kind::Unknown => 0,
            };
            let pushed =
                list.as_mut().map(|list| list.push(GuestPhys(last.address), length.into()));
            if pushed.is_some_and(|pushed| pushed.is_err()) {
                list = None;
            }
            at = self.ring.after(at);
            if last.word2 & END != 0 && kind(&last) != Kind::Context {
                return Some(Gathered { first, last, list, behind: at });
            }
            if at == tail || at == self.ring.head {
                return None;
            }
            last = self.ring.read(at);
        }
    }

    /// Whether the back end has taken it, or nobody will.
    fn send(
        &self,
        gathered: &Gathered,
        settings: &Settings,
        send: &mut dyn FnMut(&Packet<'_>) -> Sent,
        counts: &mut Counts<'_>,
        head: &mut Vec<u8>,
    ) -> bool {
        let segment = kind(&gathered.first) == Kind::Data && gathered.first.word2 & SEGMENT != 0;
        let mut refuse = |length| {
            counts.counters.frame(Direction::Sent, length);
            counts.counters.dropped(Direction::Sent, DropReason::Malformed);
            if segment {
                counts.statistics.add(TSCTFC, 1);
            }
            true
        };
        let Some(list) = &gathered.list else { return refuse(0) };
        if list.is_empty() {
            // Nothing was sent, and nothing was meant to be.
            return true;
        }
        let Some((offload, rest)) = self.make(gathered, list, settings, head) else {
            return refuse(list.len());
        };
        let payload = match &rest {
            Some(rest) => Payload::Headed(head, rest),
            None => Payload::Guest(list),
        };
        let packet = Packet { offload, payload };
        if !packet.is_sound() {
            return refuse(list.len());
        }
        if send(&packet) == Sent::Busy {
            return false;
        }
        let mut to = [0; 6];
        list.read_at(0, &mut to);
        let bytes = packet.len() as u64;
        counts.counters.frame(Direction::Sent, bytes);
        match offload.segments {
            Some(segments) => {
                let (header, size) = (u64::from(segments.header), u64::from(segments.size));
                let data = bytes.saturating_sub(header);
                let full = data.saturating_sub(1) / size.max(1);
                if full > 0 {
                    counts.statistics.sent(to, full, header + size);
                }
                counts.statistics.sent(to, 1, header + data - full * size);
                counts.statistics.add(TSCTC, 1);
            }
            None => counts.statistics.sent(to, 1, bytes),
        }
        true
    }

    /// What is left of a frame's making; and where bytes are made anew, in `head`, what is behind
    /// them. None for what no driver may ask.
    fn make(
        &self,
        Gathered { first, last, .. }: &Gathered,
        list: &ScatterList,
        settings: &Settings,
        head: &mut Vec<u8>,
    ) -> Option<(Offload, Option<ScatterList>)> {
        let total = usize::try_from(list.len()).ok().filter(|&total| total <= MAX_FRAME)?;
        let segment = kind(first) == Kind::Data && first.word2 & SEGMENT != 0;
        // Which descriptor says it depends on what it is (manual, 3.3.3.1 and 3.3.7.1).
        let says = if segment { first } else { last };
        let tag = settings.tag_type.filter(|_| says.word2 & INSERT_TAG != 0).map(|kind| {
            let tag = ((says.word3 >> SPECIAL_SHIFT) as u16).to_be_bytes();
            [kind[0], kind[1], tag[0], tag[1]]
        });
        let inserted = tag.map_or(0, |tag| tag.len());
        if segment {
            let context = &self.contexts[1];
            let (header, size) = context.segments();
            if context.0[2] & CONTEXT_TCP == 0 {
                return None;
            }
            let own = header.max(12);
            take(list, own, head)?;
            insert(head, tag);
            let offload = prepare_tcp(head, total + inserted, size).ok()?;
            return Some((offload, Some(list.split_at(own as u64).1)));
        }
        let [network, transport] = match kind(first) {
            Kind::Data => {
                let context = &self.contexts[0];
                [(IP_SUM, 0), (TRANSPORT_SUM, 1)]
                    .map(|(bit, word)| (first.word3 & bit != 0).then(|| context.sum(word)))
            }
            _ => {
                let [_, _, offset, _] = last.word2.to_le_bytes();
                let [_, start, ..] = last.word3.to_le_bytes();
                let sum = Sum { start: start.into(), offset: offset.into(), end: 0 };
                [None, (last.word2 & INSERT_SUM != 0).then_some(sum)]
            }
        };
        // What lies outside of the frame is left alone (manual, 3.3.3.1).
        let fits = |sum: &Sum| sum.start <= sum.offset && sum.offset + 2 <= total;
        let (network, transport) = (network.filter(fits), transport.filter(fits));
        let whole = |sum: &Sum| sum.end == 0 || sum.end + 1 >= total;
        let own_check = last.word2 & INSERT_CHECK == 0;
        let own = if own_check || transport.is_some_and(|sum| !whole(&sum)) {
            total
        } else {
            let sum = network.map_or(0, |sum| if whole(&sum) { total } else { sum.end + 1 });
            sum.max(if tag.is_some() { 12 } else { 0 })
        };
        if own == 0 {
            let offload = transport.map_or_else(Offload::default, |sum| partial(sum, 0));
            return Some((offload, None));
        }
        take(list, own, head)?;
        if own_check {
            take_check_off(head);
        }
        let left = transport.filter(whole);
        for sum in [network, transport.filter(|sum| !whole(sum))].into_iter().flatten() {
            let end = if whole(&sum) { head.len() } else { sum.end + 1 };
            if let Some(bytes) = head.get_mut(..end) {
                complete(bytes, sum.start, sum.offset - sum.start);
            }
        }
        insert(head, tag);
        let offload = left.map_or_else(Offload::default, |sum| partial(sum, inserted));
        Some((offload, Some(list.split_at(own as u64).1)))
    }
}

fn partial(sum: Sum, inserted: usize) -> Offload {
    // Both are of 8 bits.
    let start = (sum.start + inserted) as u16;
    let offset = (sum.offset - sum.start) as u16;
    Offload { checksum: Checksum::Partial { start, offset }, segments: None }
}

/// Sets `head` to the first bytes of a frame that has so many.
fn take(list: &ScatterList, own: usize, head: &mut Vec<u8>) -> Option<()> {
    head.clear();
    head.resize(own, 0);
    (list.read_at(0, head) == own).then_some(())
}

/// Two addresses are before the tag.
fn insert(head: &mut Vec<u8>, tag: Option<[u8; 4]>) {
    if let Some(tag) = tag
        && head.len() >= 12
    {
        head.splice(12..12, tag);
    }
}

/// Frames here have no check sequence: one that the driver has made is taken off. Without a right
/// one it is a frame of a driver that has forgotten it.
fn take_check_off(frame: &mut Vec<u8>) {
    if let Some((bytes, check)) = frame.split_last_chunk::<CHECK>()
        && crc32fast::hash(bytes).to_le_bytes() == *check
    {
        frame.truncate(frame.len() - CHECK);
    }
}
