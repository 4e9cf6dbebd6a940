//! The card on its I/O thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use tetrarch_io::{Event, Handler};
use tetrarch_memory::{GuestMemory, Snapshot};
use tetrarch_net::{
    Checksum, Contents, Counters, Direction, DropReason, Frame, Interest, NetBackend, Offloads,
    Packet, Sent, complete, internet_checksum, verify,
};

use super::file::{
    CHECK_IP, CHECK_TRANSPORT, File, LONG, LOOPBACK, RCTL, RDBAL, RX_ENABLE, RXCSUM, STRIP_CRC,
    TCTL, TDBAL, TX_ENABLE,
};
use super::filter::{Filter, Passed};
use super::interrupts::{
    Interrupts, LINK_CHANGED, RX_LOW, RX_OVERRUN, RX_SMALL, TX_LOW, TX_QUEUE_EMPTY,
};
use super::receive::{
    Arrival, Delivery, IGNORE_SUMS, INEXACT, IP_CHECKED, IP_WRONG, RxQueue, SPECIAL_SHIFT, TAGGED,
    TRANSPORT_CHECKED, TRANSPORT_WRONG,
};
use super::registers::{RDH, TDH};
use super::ring::Ring;
use super::statistics::{MPC, RNBC, ROC, Statistics};
use super::transmit::{COPIED_TURN, Counts, Settings, TURN, Turn, TxQueue};
use crate::MacAddress;
use crate::announcement::announcement;

/// Sources of events: frames to send, buffers, the timer of interrupts, the back end.
pub const SENT: u32 = 0;
pub const ROOM: u32 = 1;
pub const TIMER: u32 = 2;
pub const BACKEND: u32 = 3;

/// Frames of before a driver wanted any that are discarded at once.
const STALE: usize = 4096;
/// A frame without its check sequence is padded to so many bytes (IEEE 802.3, 3.2.8).
const SHORTEST: usize = 60;
const CHECK: usize = 4;
/// With the check sequence: of a frame that is not long, and of any (manual, 13.4.22).
const LONGEST: usize = 1522;
const LONGEST_OF_ALL: usize = 16_384;
/// The byte of a frame from which the sum in a descriptor is, in RXCSUM.
const SUM_START: u32 = 0xFF;

pub struct Card {
    pub memory: Arc<GuestMemory>,
    /// None when the network was left.
    backend: Option<Box<dyn NetBackend>>,
    /// Other queues of the network, which are not in use.
    others: Vec<Box<dyn NetBackend>>,
    /// The frame that came last, which may wait for buffers.
    frame: Frame,
    held: bool,
    counters: Arc<Counters>,
    pub interrupts: Arc<Interrupts>,
    /// Of this thread: frames to send; buffers, and whatever may have changed.
    sent: Arc<Event>,
    room: Arc<Event>,
    waiting: Arc<AtomicBool>,
    pub permanent: MacAddress,
    pub file: File,
    pub filter: Filter,
    pub statistics: Statistics,
    pub tx: TxQueue,
    pub rx: RxQueue,
    /// CTRL.VME: tags are inserted and taken off.
    pub tags: bool,
    /// The PHY gives back what it is given.
    pub loopback: bool,
    pub link: bool,
    /// The network is to learn where the guest is now.
    pub announce: bool,
    /// The machine is held.
    quiet: bool,
    /// The card has the bus.
    pub master: bool,
    /// For bytes of a frame that are made anew.
    head: Vec<u8>,
}

impl Card {
    #[expect(clippy::too_many_arguments, reason = "the parts of one card, of one caller")]
    pub fn new(
        memory: Arc<GuestMemory>,
        backends: Vec<Box<dyn NetBackend>>,
        counters: Arc<Counters>,
        interrupts: Arc<Interrupts>,
        [sent, room]: [Arc<Event>; 2],
        waiting: Arc<AtomicBool>,
        [tx, rx]: [Ring; 2],
        mac: MacAddress,
    ) -> Self {
        let mut backends = backends.into_iter();
        let backend = backends.next();
        let mut others: Vec<_> = backends.collect();
        others.iter_mut().for_each(|other| other.enable(false));
        let link = backend.as_ref().is_some_and(|backend| backend.link());
        Self {
            memory,
            backend,
            others,
            frame: Frame::default(),
            held: false,
            counters,
            interrupts,
            sent,
            room,
            waiting,
            permanent: mac,
            file: File::default(),
            filter: Filter::new(mac),
            statistics: Statistics::default(),
            tx: TxQueue::new(tx),
            rx: RxQueue { ring: rx },
            tags: false,
            loopback: false,
            link,
            announce: false,
            quiet: false,
            master: true,
            head: Vec::new(),
        }
    }

    pub fn backend(&self) -> Option<&dyn NetBackend> {
        self.backend.as_deref()
    }

    fn works(&self) -> bool {
        self.master && !self.quiet
    }

    /// The driver wants frames.
    fn receives(&self) -> bool {
        self.file.rx_control() & RX_ENABLE != 0
    }

    pub fn sends(&self) -> bool {
        self.file.tx_control() & TX_ENABLE != 0
    }

    fn loops(&self) -> bool {
        self.loopback || self.file.rx_control() & LOOPBACK != 0
    }

    // Registers

    /// One that is not of interrupts, and no tail.
    pub fn read(&mut self, offset: u32) -> u32 {
        match offset {
            TDH => self.tx.ring.head,
            RDH => self.rx.ring.head,
            _ if Statistics::has(offset) => self.statistics.read(offset),
            _ => self.file.read(offset).or_else(|| self.filter.read(offset)).unwrap_or(0),
        }
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        let received = self.receives();
        match offset {
            TDH => self.tx.ring.head = value & 0xFFFF,
            RDH => self.rx.ring.head = value & 0xFFFF,
            _ if self.filter.write(offset, value) => {}
            _ => self.file.write(offset, value),
        }
        match offset {
            TDBAL..=TDH => {
                self.tx.ring.put(self.file.ring(TDBAL));
                self.sent.signal();
            }
            RDBAL..=RDH => {
                self.rx.ring.put(self.file.ring(RDBAL));
                self.room.signal();
            }
            TCTL => self.sent.signal(),
            RXCSUM => self.accept(),
            RCTL => {
                if !received && self.receives() {
                    self.discard(STALE);
                } else if !self.receives() {
                    self.let_go();
                }
                self.accept();
                self.room.signal();
            }
            _ => {}
        }
    }

    // Life

    /// As it was made, but for what the network and the function have said.
    pub fn reset(&mut self) {
        self.file = File::default();
        self.filter = Filter::new(self.permanent);
        self.statistics = Statistics::default();
        self.tx.ring.reset();
        self.tx.contexts = Default::default();
        self.tx.blocked = false;
        self.rx.ring.reset();
        self.tags = false;
        self.announce = false;
        self.interrupts.reset();
        self.let_go();
        self.accept();
        self.settle();
    }

    pub fn close(&mut self) {
        self.reset();
        self.backend = None;
        self.others.clear();
        self.link = false;
    }

    /// A frame that waits for buffers does so no more.
    fn let_go(&mut self) {
        self.held = false;
        self.waiting.store(false, Ordering::SeqCst);
    }

    /// Sums that are to be checked need not be made before.
    pub fn accept(&mut self) {
        let checksum = self.receives() && self.file.checks() & CHECK_TRANSPORT != 0;
        if let Some(backend) = &mut self.backend {
            backend.accept(Offloads { checksum, ..Offloads::NONE });
        }
    }

    /// Has everything looked after.
    pub fn ring_all(&self) {
        self.sent.signal();
        self.room.signal();
    }

    fn check_link(&mut self) {
        let link = self.backend.as_ref().is_some_and(|backend| backend.link());
        if std::mem::replace(&mut self.link, link) != link {
            self.interrupts.raise(LINK_CHANGED);
        }
    }

    /// Says what is waited for.
    fn settle(&mut self) {
        let room = self.works() && !self.held && self.rx.ring.open(&self.memory);
        let receive = room || !self.receives();
        if let Some(backend) = &mut self.backend {
            backend.watch(Interest { receive, send: self.tx.blocked });
        }
    }

    // From the guest

    fn transmit(&mut self) {
        // Whatever keeps it from sending has it called when it ends.
        self.tx.blocked = false;
        if !self.works() || !self.sends() {
            return;
        }
        if std::mem::take(&mut self.announce)
            && let Some(backend) = &mut self.backend
        {
            // Without room in the network it is lost, as any frame may be.
            let mac = self.filter.mac().unwrap_or(self.permanent);
            let _ = backend.send(&Packet::plain(&announcement(mac)));
            backend.flush();
        }
        let loops = self.loops();
        let Some(backend) = self.backend.as_mut().filter(|_| self.tx.ring.open(&self.memory))
        else {
            return;
        };
        let snapshot = self.memory.snapshot();
        let settings = Settings {
            tag_type: self.tags.then(|| self.file.tag_type()),
            low_threshold: self.file.low_threshold(),
            most: if loops { COPIED_TURN } else { TURN },
        };
        let mut looped = Vec::new();
        let counts = Counts { counters: &self.counters, statistics: &mut self.statistics };
        let mut send = |packet: &Packet<'_>| {
            if !loops {
                return backend.send(packet);
            }
            let mut bytes = Vec::new();
            packet.copy_to(&mut bytes);
            let mut frame = Frame::default();
            frame.set(packet.offload, &bytes);
            looped.push(frame);
            Sent::Taken
        };
        let report = self.tx.serve(&snapshot, &settings, &mut send, counts, &mut self.head);
        backend.flush();
        let mut causes = if report.low { TX_LOW } else { 0 };
        if report.took && report.turn == Turn::Empty {
            causes |= TX_QUEUE_EMPTY;
        }
        if report.wrote {
            self.interrupts.sent(causes, report.delayed);
        } else {
            self.interrupts.raise(causes);
        }
        if report.turn == Turn::More {
            self.sent.signal();
        }
        self.take_back(&snapshot, looped);
    }

    /// Frames that come back at once. Without buffers they are lost.
    fn take_back(&mut self, snapshot: &Snapshot, frames: Vec<Frame>) {
        let mut causes = None;
        for mut frame in frames {
            let wanted = self.receives() && self.rx.ring.open(&self.memory);
            if !wanted || frame.offload.segments.is_some() {
                self.counters.dropped(Direction::Sent, DropReason::NoPeer);
                continue;
            }
            match self.store(snapshot, &mut frame) {
                Stored::Done(more) => causes = Some(causes.unwrap_or(0) | more),
                Stored::Waits => self.statistics.add(MPC, 1),
                Stored::Dropped => {}
            }
        }
        if let Some(causes) = causes {
            self.interrupts.received(causes);
        }
    }

    // To the guest

    fn receive(&mut self) {
        if !self.works() || !self.receives() || !self.rx.ring.open(&self.memory) {
            return;
        }
        let snapshot = self.memory.snapshot();
        let loops = self.loops();
        let mut left = TURN;
        let mut causes = None;
        let mut frame = std::mem::take(&mut self.frame);
        while let Some(backend) = &mut self.backend {
            let came = !self.held;
            if came {
                if left == 0 {
                    // The back end may have more, and not say so again.
                    self.room.signal();
                    break;
                }
                left -= 1;
                if !backend.receive(&mut frame) {
                    break;
                }
                self.counters.frame(Direction::Received, frame.bytes().len() as u64);
                // What was on its way when the driver gave up an offload is lost with it.
                if loops || frame.offload.segments.is_some() {
                    self.counters.dropped(Direction::Received, DropReason::Unwanted);
                    continue;
                }
            }
            let mut stored = self.store(&snapshot, &mut frame);
            if matches!(stored, Stored::Waits) && came {
                // The driver moves the tail and then looks for nobody: this side looks again.
                self.waiting.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                stored = self.store(&snapshot, &mut frame);
            }
            match stored {
                Stored::Done(more) => {
                    self.held = false;
                    causes = Some(causes.unwrap_or(0) | more);
                }
                Stored::Waits => {
                    if came {
                        self.statistics.add(RNBC, 1);
                    }
                    self.held = true;
                    break;
                }
                Stored::Dropped => self.held = false,
            }
        }
        self.frame = frame;
        self.waiting.store(self.held, Ordering::SeqCst);
        if let Some(causes) = causes {
            self.interrupts.received(causes);
        }
    }

    /// Puts a frame into the ring, which is open.
    fn store(&mut self, snapshot: &Snapshot, frame: &mut Frame) -> Stored {
        let control = self.file.rx_control();
        let refuse = |reason| {
            self.counters.dropped(Direction::Received, reason);
            Stored::Dropped
        };
        let length = frame.bytes().len();
        let longest = if control & LONG == 0 { LONGEST } else { LONGEST_OF_ALL };
        if length + CHECK > longest {
            self.statistics.add(ROC, 1);
            return refuse(DropReason::NoRoom);
        }
        let tag = tag(frame.bytes(), self.file.tag_type());
        let passed = self.filter.passes(frame.bytes(), tag, &self.file);
        if passed == Passed::Not {
            return refuse(DropReason::Unwanted);
        }
        if let Checksum::Partial { start, offset } = frame.offload.checksum {
            complete(frame.bytes_mut(), start.into(), offset.into());
            frame.offload.checksum = Checksum::Verified;
        }
        let checks = self.file.checks();
        let mut known = sums(frame, checks);
        if passed == Passed::Perhaps {
            known |= INEXACT;
        }
        let tag = tag.filter(|_| self.tags);
        if let Some(tag) = tag {
            known |= TAGGED | u32::from(tag) << SPECIAL_SHIFT;
        }
        let bytes = frame.bytes();
        let (first, rest) = match tag {
            Some(_) => (&bytes[..12], &bytes[16..]),
            None => (bytes, &[][..]),
        };
        const PADDING: [u8; SHORTEST] = [0; SHORTEST];
        let padding = &PADDING[..SHORTEST.saturating_sub(first.len() + rest.len())];
        let mut check = [0; CHECK];
        let checked = if control & STRIP_CRC == 0 { CHECK } else { 0 };
        if checked > 0 {
            let mut hasher = crc32fast::Hasher::new();
            [first, rest, padding].into_iter().for_each(|piece| hasher.update(piece));
            check = hasher.finalize().to_le_bytes();
        }
        let start = (checks & SUM_START) as usize;
        let behind = if tag.is_some() { start.max(12) + 4 } else { start };
        let arrival = Arrival {
            pieces: [first, rest, padding, &check[..checked]],
            known,
            sum: internet_checksum(bytes.get(behind..).unwrap_or_default()),
        };
        match self.rx.deliver(snapshot, &arrival, self.file.buffer()) {
            Delivery::Wait => Stored::Waits,
            Delivery::TooSmall => {
                self.statistics.add(MPC, 1);
                self.interrupts.raise(RX_OVERRUN);
                refuse(DropReason::NoRoom)
            }
            delivery => {
                if delivery == Delivery::Lost {
                    self.counters.dropped(Direction::Received, DropReason::NoRoom);
                }
                let to = bytes.first_chunk::<6>().copied().unwrap_or_default();
                let stored = length.max(SHORTEST);
                self.statistics.received(to, stored as u64);
                let low = self.rx.is_low(control);
                let small = (stored + CHECK) as u32 <= self.file.small();
                let causes = [(RX_LOW, low), (RX_SMALL, small)];
                Stored::Done(causes.iter().filter(|(_, is)| *is).fold(0, |all, (bit, _)| all | bit))
            }
        }
    }

    /// Discards what has come for nobody.
    fn discard(&mut self, most: usize) {
        let Some(backend) = &mut self.backend else { return };
        for _ in 0..most {
            if !backend.receive(&mut self.frame) {
                return;
            }
            self.counters.frame(Direction::Received, self.frame.bytes().len() as u64);
            self.counters.dropped(Direction::Received, DropReason::Unwanted);
        }
    }
}

enum Stored {
    /// With causes of an interrupt.
    Done(u32),
    Waits,
    Dropped,
}

/// The tag of a frame that has one: priority and number.
fn tag(frame: &[u8], kind: [u8; 2]) -> Option<u16> {
    if frame.get(12..14) != Some(&kind) {
        return None;
    }
    frame.get(14..16).map(|tag| u16::from_be_bytes([tag[0], tag[1]]))
}

/// What a descriptor says of the sums of a frame (manual, 3.2.9).
fn sums(frame: &mut Frame, checks: u32) -> u32 {
    let is = |bit: u32| checks & bit != 0;
    let Some(contents) = Contents::of(frame.bytes()) else { return IGNORE_SUMS };
    let mut known = 0;
    if is(CHECK_IP) && contents.layers.family == tetrarch_net::Family::V4 {
        known |= IP_CHECKED | if contents.ip_right { 0 } else { IP_WRONG };
    }
    let bytes = frame.bytes();
    let field = contents.layers.transport + 6;
    // UDP may have none (RFC 768).
    let has =
        contents.is_tcp() || contents.is_udp() && bytes.get(field..field + 2) != Some(&[0, 0]);
    if is(CHECK_TRANSPORT) && has {
        if frame.offload.checksum == Checksum::Unknown && verify(bytes) {
            frame.offload.checksum = Checksum::Verified;
        }
        let right = frame.offload.checksum == Checksum::Verified;
        known |= TRANSPORT_CHECKED | if right { 0 } else { TRANSPORT_WRONG };
    }
    if known == 0 { IGNORE_SUMS } else { known }
}

impl Handler for Card {
    fn ready(&mut self, source: u32) {
        match source {
            SENT => self.transmit(),
            ROOM => self.receive(),
            TIMER => self.interrupts.expire(),
            _ => {
                if let Some(backend) = &mut self.backend {
                    backend.work();
                }
                if self.receives() {
                    self.receive();
                } else {
                    self.discard(TURN);
                }
                if self.tx.blocked {
                    self.transmit();
                }
            }
        }
        self.settle();
        self.check_link();
    }

    fn quiesce(&mut self) -> bool {
        self.quiet = true;
        true
    }

    fn resume(&mut self) {
        self.quiet = false;
        self.transmit();
        self.receive();
        self.settle();
        self.check_link();
    }
}
