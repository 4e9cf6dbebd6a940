//! The card on its I/O thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use tetrarch_io::{Event, Handler};
use tetrarch_memory::GuestMemory;
use tetrarch_net::{
    Checksum, Contents, Counters, Direction, DropReason, Frame, Interest, NetBackend, Offloads,
    Packet, complete, verify,
};

use super::filter::{Filter, tag};
use super::interrupts::Interrupts;
use super::layout::{ActivateError, LRO, RSS, RX_CHECKSUM, STRIP_VLAN, Setup, Shared};
use super::receive::{Arrival, Delivery, ERRORS, NO_BUFFER, RxQueue};
use super::rss::Rss;
use super::transmit::{Turn, TxQueue};
use super::{MAX_TX, MacAddress};
use crate::announcement::announcement;

/// Sources of events: rings to send by their number, then buffers, and back ends.
pub const ROOM: u32 = MAX_TX as u32;
pub const BACKENDS: u32 = 16;

/// Frames for the guest in one turn on the I/O thread.
const TURN: usize = 256;
/// Frames of before a driver was there that are discarded at once.
const STALE: usize = 4096;

// Events (VMXNET3_ECR_...).
pub const RX_ERROR: u32 = 1 << 0;
pub const TX_ERROR: u32 = 1 << 1;
pub const LINK: u32 = 1 << 2;

/// A back end, and the frame that came from it last.
pub struct End {
    backend: Box<dyn NetBackend>,
    frame: Frame,
    /// `frame` waits for buffers of a queue: its number, and the hash that led there.
    held: Option<(usize, (u32, u32))>,
}

/// What there is while a driver has activated the card.
pub struct Active {
    pub setup: Setup,
    pub shared: Shared,
    pub tx: Vec<TxQueue>,
    pub rx: Vec<RxQueue>,
    pub rss: Option<Rss>,
}

pub struct Card {
    pub memory: Arc<GuestMemory>,
    ends: Vec<End>,
    counters: Arc<Counters>,
    pub interrupts: Arc<Interrupts>,
    /// Of this thread: buffers, and whatever may have changed.
    room: Arc<Event>,
    sent: Vec<Arc<Event>>,
    waiting: Arc<AtomicBool>,
    pub permanent: MacAddress,
    pub mac: MacAddress,
    pub filter: Filter,
    pub active: Option<Active>,
    pub events: u32,
    pub link: bool,
    /// The network is to learn where the guest is now.
    pub announce: bool,
    /// The machine is held.
    quiet: bool,
    /// The card has the bus.
    pub master: bool,
    /// For headers that are made anew.
    head: Vec<u8>,
}

impl Active {
    pub fn new(memory: &GuestMemory, setup: Setup) -> Result<Self, ActivateError> {
        let shared = Shared::new(memory, &setup)?;
        let tx =
            setup.tx.iter().map(|queue| TxQueue::new(memory, queue)).collect::<Result<_, _>>()?;
        let rx =
            setup.rx.iter().map(|queue| RxQueue::new(memory, queue)).collect::<Result<_, _>>()?;
        Ok(Self { setup, shared, tx, rx, rss: None })
    }

    fn has(&self, feature: u64) -> bool {
        self.setup.features & feature != 0
    }

    /// What the driver takes beside plain frames.
    fn accepted(&self) -> Offloads {
        let checksum = self.has(RX_CHECKSUM);
        let big = checksum && self.has(LRO);
        Offloads { checksum, tcp4: big, tcp6: big, ecn: big }
    }

    pub fn read_rss(&mut self, memory: &GuestMemory) {
        self.rss = if self.has(RSS) { self.shared.rss(memory) } else { None };
    }
}

impl Card {
    #[expect(clippy::too_many_arguments, reason = "the parts of one card, of one caller")]
    pub fn new(
        memory: Arc<GuestMemory>,
        backends: Vec<Box<dyn NetBackend>>,
        counters: Arc<Counters>,
        interrupts: Arc<Interrupts>,
        room: Arc<Event>,
        sent: Vec<Arc<Event>>,
        waiting: Arc<AtomicBool>,
        mac: MacAddress,
    ) -> Self {
        let link = backends.iter().all(|backend| backend.link());
        let end = |backend| End { backend, frame: Frame::default(), held: None };
        Self {
            memory,
            ends: backends.into_iter().map(end).collect(),
            counters,
            interrupts,
            room,
            sent,
            waiting,
            permanent: mac,
            mac,
            filter: Filter::default(),
            active: None,
            events: 0,
            link,
            announce: false,
            quiet: false,
            master: true,
            head: Vec::new(),
        }
    }

    pub fn backends(&self) -> impl Iterator<Item = &dyn NetBackend> {
        self.ends.iter().map(|end| &*end.backend)
    }

    fn works(&self) -> bool {
        self.master && !self.quiet
    }

    // Life

    pub fn activate(&mut self, active: Active) {
        self.interrupts.set_auto(active.setup.auto_mask);
        for index in 0..active.tx.len() {
            active.shared.set_threshold(index, 1);
        }
        for index in 0..active.rx.len() {
            active.shared.set_wants_room(index, false);
        }
        active.shared.set_events(self.events);
        self.active = Some(active);
        for at in 0..self.ends.len() {
            self.discard(at, STALE);
        }
        self.accept();
        self.ring_all();
    }

    /// As it was before a driver came, but for what it has written to registers.
    pub fn quiesce(&mut self) {
        self.active = None;
        self.events = 0;
        self.waiting.store(false, Ordering::SeqCst);
        self.ends.iter_mut().for_each(|end| end.held = None);
        self.interrupts.reset();
        self.accept();
        self.settle();
    }

    pub fn close(&mut self) {
        self.quiesce();
        self.ends.clear();
        self.link = false;
    }

    /// Features have changed.
    pub fn accept(&mut self) {
        let accepted = self.active.as_ref().map_or(Offloads::NONE, Active::accepted);
        for end in &mut self.ends {
            end.backend.accept(accepted);
        }
    }

    /// Has everything looked after.
    pub fn ring_all(&self) {
        self.sent.iter().for_each(|event| event.signal());
        self.room.signal();
    }

    pub fn set_event(&mut self, event: u32) {
        let Some(active) = &self.active else { return };
        self.events |= event;
        active.shared.set_events(self.events);
        self.interrupts.raise(active.setup.event_interrupt.into());
    }

    pub fn clear_events(&mut self, events: u32) {
        self.events &= !events;
        if let Some(active) = self.active.as_ref().filter(|_| self.master) {
            active.shared.set_events(self.events);
        }
    }

    fn check_link(&mut self) {
        let link = !self.ends.is_empty() && self.ends.iter().all(|end| end.backend.link());
        if std::mem::replace(&mut self.link, link) != link {
            self.set_event(LINK);
        }
    }

    /// Says what is waited for.
    fn settle(&mut self) {
        let works = self.works();
        let blocked = self.blocked();
        for (at, end) in self.ends.iter_mut().enumerate() {
            let inactive = self.active.is_none();
            let receive = inactive || works && end.held.is_none();
            let send = works && blocked >> at & 1 != 0;
            end.backend.watch(Interest { receive, send });
        }
    }

    /// Back ends that a frame waits for, as bits.
    fn blocked(&self) -> u64 {
        let ends = self.ends.len().max(1);
        let queues = self.active.iter().flat_map(|active| active.tx.iter().enumerate());
        queues.filter(|(_, queue)| queue.blocked).fold(0, |bits, (at, _)| bits | 1 << (at % ends))
    }

    // From the guest

    fn transmit(&mut self, at: usize) {
        if !self.works() {
            return;
        }
        if std::mem::take(&mut self.announce) {
            self.announce();
        }
        let count = self.ends.len().max(1);
        let Some(end) = self.ends.get_mut(at % count) else { return };
        let Some(queue) = self.active.as_mut().and_then(|active| active.tx.get_mut(at)) else {
            return;
        };
        if queue.error != 0 {
            return;
        }
        let snapshot = self.memory.snapshot();
        let (turn, completed) =
            queue.serve(&snapshot, &mut *end.backend, &self.counters, &mut self.head);
        end.backend.flush();
        if completed {
            self.interrupts.raise(queue.interrupt);
        }
        match turn {
            Turn::Empty | Turn::Blocked => {}
            Turn::More => self.sent[at].signal(),
            Turn::Broken => self.set_event(TX_ERROR),
        }
    }

    fn announce(&mut self) {
        let frame = announcement(self.mac);
        if let Some(end) = self.ends.first_mut().filter(|_| self.active.is_some()) {
            // Without room in the network it is lost, as any frame may be.
            let _ = end.backend.send(&Packet::plain(&frame));
            end.backend.flush();
        }
    }

    // To the guest

    fn receive_all(&mut self) {
        for at in 0..self.ends.len() {
            self.receive(at);
        }
        let waits = self.ends.iter().any(|end| end.held.is_some());
        self.waiting.store(waits, Ordering::SeqCst);
    }

    fn receive(&mut self, at: usize) {
        if !self.works() {
            return;
        }
        let Some(active) = &mut self.active else { return };
        let end = &mut self.ends[at];
        let snapshot = self.memory.snapshot();
        let accepted = active.accepted();
        let strip = active.has(STRIP_VLAN);
        let (mut raised, mut broken, mut left) = (0_u32, false, TURN);
        loop {
            let came = end.held.is_none();
            if came {
                if left == 0 {
                    // The back end may have more, and not say so again.
                    self.room.signal();
                    break;
                }
                left -= 1;
                if !end.backend.receive(&mut end.frame) {
                    break;
                }
                let bytes = end.frame.bytes();
                self.counters.frame(Direction::Received, bytes.len() as u64);
                // What was on its way when the driver gave up an offload is lost with it.
                if !accepted.takes(&end.frame.offload) || !self.filter.wants(bytes, self.mac) {
                    self.counters.dropped(Direction::Received, DropReason::Unwanted);
                    continue;
                }
            }
            // Headers say nothing new of what waits, but where it goes stays.
            let contents = Contents::of(end.frame.bytes());
            let bytes = end.frame.bytes();
            let (queue, hash) = end.held.unwrap_or_else(|| match &active.rss {
                Some(rss) => {
                    let (queue, kind, hash) = rss.queue(contents.as_ref(), bytes, active.rx.len());
                    (queue, (kind, hash))
                }
                None => (0, (0, 0)),
            });
            let tag = tag(bytes).filter(|_| strip);
            let big = end.frame.offload.segments.is_some();
            let told = contents.is_some_and(|contents| tag.is_some() || !contents.is_tagged());
            let verified = match end.frame.offload.checksum {
                Checksum::Partial { start, offset } => {
                    // Of what the driver hears nothing of, or would pass on, it is made whole.
                    if !big || !told {
                        complete(end.frame.bytes_mut(), start.into(), offset.into());
                        end.frame.offload.checksum = Checksum::Verified;
                    }
                    true
                }
                Checksum::Verified => true,
                Checksum::Unknown => came && accepted.checksum && verify(bytes),
            };
            if verified && end.frame.offload.checksum == Checksum::Unknown {
                end.frame.offload.checksum = Checksum::Verified;
            }
            let bytes = end.frame.bytes();
            let pieces = if tag.is_some() { [&bytes[..12], &bytes[16..]] } else { [bytes, &[]] };
            // Where the tag was taken off, layers are those behind it.
            let contents = contents.map(|mut contents| {
                if tag.is_some() {
                    contents.layers.network -= 4;
                    contents.layers.transport -= 4;
                    contents.layers.end -= 4;
                }
                contents
            });
            let arrival = Arrival {
                pieces,
                tag,
                contents,
                verified: verified && accepted.checksum,
                segments: end.frame.offload.segments.map(|segments| segments.size),
                tells_segments: active.setup.tells_segments,
                hash,
            };
            let place = (queue, active.rx.len());
            let Some(rx) = active.rx.get_mut(queue) else { break };
            let most = active.setup.scatter;
            if rx.error != 0 {
                end.held = None;
                self.counters.dropped(Direction::Received, DropReason::NoRoom);
                continue;
            }
            let mut delivery = rx.deliver(&snapshot, &arrival, most, place);
            if delivery == Delivery::Wait && came {
                // The driver gives buffers and then looks whether to ring: one of both sees the other.
                rx.waits = true;
                active.shared.set_wants_room(queue, true);
                self.waiting.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                delivery = rx.deliver(&snapshot, &arrival, most, place);
            }
            match delivery {
                Delivery::Done => {
                    end.held = None;
                    raised |= 1 << queue;
                    if std::mem::take(&mut rx.waits) {
                        active.shared.set_wants_room(queue, false);
                    }
                }
                Delivery::Wait => {
                    if came {
                        rx.statistics[NO_BUFFER] += 1;
                    }
                    end.held = Some((queue, hash));
                    break;
                }
                Delivery::TooSmall | Delivery::Broken => {
                    end.held = None;
                    rx.statistics[ERRORS] += 1;
                    self.counters.dropped(Direction::Received, DropReason::NoRoom);
                    broken |= delivery == Delivery::Broken;
                }
            }
        }
        for (index, queue) in active.rx.iter().enumerate() {
            if raised >> index & 1 != 0 {
                self.interrupts.raise(queue.interrupt);
            }
        }
        if broken {
            self.set_event(RX_ERROR);
        }
    }

    /// Discards what has come for nobody.
    fn discard(&mut self, at: usize, most: usize) {
        let Some(end) = self.ends.get_mut(at) else { return };
        for _ in 0..most {
            if !end.backend.receive(&mut end.frame) {
                return;
            }
            self.counters.frame(Direction::Received, end.frame.bytes().len() as u64);
            self.counters.dropped(Direction::Received, DropReason::Unwanted);
        }
    }
}

impl Handler for Card {
    fn ready(&mut self, source: u32) {
        match source {
            ..ROOM => self.transmit(source as usize),
            ROOM..BACKENDS => self.receive_all(),
            _ => {
                let at = (source - BACKENDS) as usize;
                if let Some(end) = self.ends.get_mut(at) {
                    end.backend.work();
                }
                if self.active.is_none() {
                    self.discard(at, TURN);
                } else {
                    let count = self.ends.len().max(1);
                    let blocked = self.blocked() >> at & 1 != 0;
                    for queue in (at..MAX_TX).step_by(count).filter(|_| blocked) {
                        self.transmit(queue);
                    }
                    if at < self.ends.len() {
                        self.receive(at);
                    }
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
        for queue in 0..MAX_TX {
            self.transmit(queue);
        }
        self.receive_all();
        self.settle();
        self.check_link();
    }
}
