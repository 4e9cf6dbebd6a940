//! Network device (5.1): frames between a driver's queues and a network.
//!
//! Whatever a driver leaves to the device of a frame's making goes on to the back end as it
//! is; back ends complete what their network does not take.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tetrarch_io::{Attachment, Trigger};
use tetrarch_net::{
    Checksum, Counters, Direction, DropReason, Frame, HEADER, Interest, NetBackend, Offload,
    Offloads, Packet, Payload, Sent, verify,
};

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError, Used};
use crate::queues::Queues;

mod command;
mod rules;
#[cfg(test)]
mod tests;

use command::Command;
pub use rules::MacAddress;
use rules::{MAX_ADDRESSES, Rules, VLAN_BYTES};

/// Feature bits (5.1.3).
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;

const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

/// Status bits (5.1.4).
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// Answers to a command.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Frames for the guest in one turn on the I/O thread.
const TURN: usize = 256;
/// Frames of before a driver was there that are discarded at once; a network has no more waiting.
const STALE: usize = 4096;

/// More pairs of queues than a driver has CPUs are of no use to it.
pub const MAX_PAIRS: usize = 16;

/// What of the configuration space changes by itself, for who shows it.
#[derive(Debug)]
pub struct NetConfig {
    link: AtomicBool,
    announce: AtomicBool,
    mac: AtomicU64,
}

impl NetConfig {
    /// The field `status`.
    pub fn status(&self) -> u16 {
        let bit = |flag: &AtomicBool, bit| if flag.load(Ordering::Relaxed) { bit } else { 0 };
        bit(&self.link, LINK_UP) | bit(&self.announce, ANNOUNCE)
    }

    /// The field `mac`.
    pub fn mac(&self) -> MacAddress {
        let [_, _, mac @ ..] = self.mac.load(Ordering::Relaxed).to_be_bytes();
        mac
    }

    fn set_mac(&self, mac: MacAddress) {
        let [a, b, c, d, e, f] = mac;
        self.mac.store(u64::from_be_bytes([0, 0, a, b, c, d, e, f]), Ordering::Relaxed);
    }
}

/// What of a device a saved machine has beside its queues: what its driver has asked by commands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetState {
    /// The card's own, and the one that the driver has given it.
    pub permanent: MacAddress,
    pub mac: MacAddress,
    pub mode: u8,
    pub unicast: Vec<MacAddress>,
    pub multicast: Vec<MacAddress>,
    /// A bit for each.
    pub vlans: Vec<u8>,
    pub pairs: u16,
    /// Of the features, those that are not switched off again.
    pub guest_offloads: u64,
}

/// A receive queue, a transmit queue, and the back end behind them.
struct Pair {
    backend: Box<dyn NetBackend>,
    frame: Frame,
    /// `frame` waits for a buffer.
    held: bool,
    /// A packet waits for the back end.
    blocked: bool,
    /// The driver uses it.
    active: bool,
    /// The network may send to it; to one that is not active what comes is discarded.
    enabled: bool,
    /// Chains that a frame is to fill.
    chains: Vec<Chain>,
}

pub struct Net {
    pairs: Vec<Pair>,
    config: Arc<NetConfig>,
    counters: Arc<Counters>,
    permanent: MacAddress,
    rules: Rules,
    features: u64,
    /// Of the guest's offloads, those that its driver has not switched off by a command.
    guest_offloads: u64,
    /// Pairs that the driver uses.
    used_pairs: u16,
    running: bool,
    attached: bool,
    /// The driver is to be told of the configuration.
    changed: bool,
}

/// What became of a frame.
enum Delivery {
    Done,
    /// The driver has no buffers for it now.
    Wait,
    /// The driver's buffers will never do.
    TooSmall,
}

impl Net {
    /// With a back end for each pair of queues, of which there are 1 to [`MAX_PAIRS`].
    pub fn new(
        mac: MacAddress,
        backends: Vec<Box<dyn NetBackend>>,
        counters: Arc<Counters>,
    ) -> Self {
        let pair = |backend| Pair {
            backend,
            frame: Frame::default(),
            held: false,
            blocked: false,
            active: false,
            enabled: true,
            chains: Vec::new(),
        };
        let link = backends.iter().all(|backend| backend.link());
        let config = Arc::new(NetConfig {
            link: AtomicBool::new(link),
            announce: AtomicBool::new(false),
            mac: AtomicU64::new(0),
        });
        config.set_mac(mac);
        Self {
            pairs: backends.into_iter().map(pair).collect(),
            config,
            counters,
            permanent: mac,
            rules: Rules::new(mac),
            features: 0,
            guest_offloads: GUEST_OFFLOADS,
            used_pairs: 1,
            running: false,
            attached: false,
            changed: false,
        }
    }

    pub fn config(&self) -> Arc<NetConfig> {
        Arc::clone(&self.config)
    }

    /// What all back ends can leave to the driver.
    pub fn offloads(&self) -> Offloads {
        self.pairs.first().map_or(Offloads::NONE, |pair| pair.backend.offloads())
    }

    pub fn state(&self) -> NetState {
        NetState {
            permanent: self.permanent,
            mac: self.rules.mac,
            mode: self.rules.mode,
            unicast: self.rules.unicast.clone(),
            multicast: self.rules.multicast.clone(),
            vlans: self.rules.vlans.into(),
            pairs: self.used_pairs,
            guest_offloads: self.guest_offloads,
        }
    }

    /// Takes a saved state up, before the driver's next start. The network is to learn where
    /// the guest is now.
    pub fn restore(&mut self, state: NetState) {
        self.permanent = state.permanent;
        self.rules = Rules::new(state.mac);
        self.rules.mode = state.mode;
        for (own, saved) in
            [(&mut self.rules.unicast, state.unicast), (&mut self.rules.multicast, state.multicast)]
        {
            own.extend(saved.into_iter().take(MAX_ADDRESSES));
        }
        for (own, saved) in self.rules.vlans.iter_mut().zip(state.vlans) {
            *own = saved;
        }
        self.config.set_mac(state.mac);
        self.used_pairs = state.pairs.clamp(1, self.pairs.len().max(1) as u16);
        self.guest_offloads = state.guest_offloads & GUEST_OFFLOADS;
        self.config.announce.store(true, Ordering::Relaxed);
        self.changed = true;
    }

    /// Lets go of the network.
    pub fn close(&mut self) {
        self.reset();
        self.pairs.clear();
        self.config.link.store(false, Ordering::Relaxed);
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// How many pairs this driver may use; the queue of commands is behind them (5.1.2).
    fn usable_pairs(&self) -> usize {
        if self.has(MQ) { self.pairs.len() } else { 1 }
    }

    /// What the driver takes beside plain frames.
    fn accepted(&self) -> Offloads {
        let features = self.features & (self.guest_offloads | !GUEST_OFFLOADS);
        offloads(features, [GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN])
    }

    fn accept(&mut self) {
        let accepted = self.accepted();
        for pair in &mut self.pairs {
            pair.backend.accept(accepted);
        }
    }

    /// Lets the network use the first so many pairs.
    fn use_pairs(&mut self, count: u16) {
        self.used_pairs = count;
        for (pair, index) in self.pairs.iter_mut().zip(0..) {
            pair.active = self.running && index < count;
            pair.enabled = index < count;
            (pair.held, pair.blocked) = (pair.held && pair.active, pair.blocked && self.running);
            if !pair.enabled {
                // Before: one that is not enabled may be nothing but an error to wait for.
                pair.settle();
            }
            pair.backend.enable(pair.enabled);
            pair.settle();
        }
    }

    // From the guest

    fn transmit(&mut self, queues: &mut Queues, at: usize) -> Result<(), QueueError> {
        let left = offloads(self.features, [CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN]);
        let counters = &self.counters;
        let Some(pair) = self.pairs.get_mut(at) else { return Ok(()) };
        if pair.active {
            let stopped = queues.serve_until(2 * at + 1, |chain| pair.send(chain, left, counters));
            pair.backend.flush();
            pair.blocked = stopped?;
            return Ok(());
        }
        // A driver that gives a pair up may have put packets there before, and rings no more
        // for them: they go by the first.
        pair.blocked = false;
        let Some(first) = self.pairs.first_mut().filter(|pair| pair.active) else { return Ok(()) };
        let sent = queues.serve(2 * at + 1, |chain| {
            let length = chain.readable.len();
            match first.send(chain, left, counters) {
                ControlFlow::Continue(answer) => answer,
                ControlFlow::Break(used) => {
                    counters.frame(Direction::Sent, length.saturating_sub(HEADER as u64));
                    counters.dropped(Direction::Sent, DropReason::QueueFull);
                    Some((used, 0))
                }
            }
        });
        first.backend.flush();
        sent
    }

    // To the guest

    fn receive(&mut self, queues: &mut Queues, at: usize) -> Result<(), QueueError> {
        let (mergeable, by_vlan) = (self.has(MRG_RXBUF), self.has(CTRL_VLAN));
        let accepted = self.accepted();
        let Some(pair) = self.pairs.get_mut(at).filter(|pair| pair.active) else { return Ok(()) };
        let mut delivered = false;
        let mut result = Ok(());
        let mut left = TURN;
        loop {
            if !pair.held {
                if left == 0 {
                    // The back end may have more, and not say so again.
                    queues.serve_again(2 * at);
                    break;
                }
                left -= 1;
                if !pair.backend.receive(&mut pair.frame) {
                    break;
                }
                let bytes = pair.frame.bytes();
                self.counters.frame(Direction::Received, bytes.len() as u64);
                // What was on its way when the driver gave up an offload is lost with it.
                if !accepted.takes(&pair.frame.offload) || !self.rules.want(bytes, by_vlan) {
                    self.counters.dropped(Direction::Received, DropReason::Unwanted);
                    continue;
                }
                let checksum = match pair.frame.offload.checksum {
                    Checksum::Unknown if accepted.checksum && verify(bytes) => Checksum::Verified,
                    // A driver that did not ask for it does not hear of it (5.1.6.4.1).
                    Checksum::Verified if !accepted.checksum => Checksum::Unknown,
                    other => other,
                };
                pair.frame.offload.checksum = checksum;
                pair.held = true;
            }
            match pair.deliver(queues, 2 * at, mergeable) {
                Ok(Delivery::Done) => (pair.held, delivered) = (false, true),
                Ok(Delivery::Wait) => break,
                Ok(Delivery::TooSmall) => {
                    self.counters.dropped(Direction::Received, DropReason::NoRoom);
                    pair.held = false;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if delivered {
            queues.interrupt(2 * at);
        }
        result
    }

    // Commands

    fn control(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let result = queues.serve(index, |chain| {
            let done = Command::read(&chain.readable).is_some_and(|command| self.obey(command));
            let written = chain.writable.write_at(0, &[if done { OK } else { ERR }]);
            Some((chain.used, written as u32))
        });
        for (pair, at) in self.pairs.iter().zip(0..) {
            // What waits for a back end that is not used any more waits no longer.
            if pair.blocked && !pair.active {
                queues.serve_again(2 * at + 1);
            }
        }
        result
    }

    /// Whether it was done.
    fn obey(&mut self, command: Command) -> bool {
        let needed = match command {
            Command::Mode(0 | 1, _) | Command::Tables(..) => CTRL_RX,
            Command::Mode(..) => CTRL_RX_EXTRA,
            Command::Address(_) => CTRL_MAC_ADDR,
            Command::Vlan(..) => CTRL_VLAN,
            Command::Announced => GUEST_ANNOUNCE,
            Command::Pairs(_) => MQ,
            Command::GuestOffloads(_) => CTRL_GUEST_OFFLOADS,
        };
        if !self.has(needed) {
            return false;
        }
        match command {
            Command::Mode(number, on) => self.rules.switch(number, on),
            Command::Tables(unicast, multicast) => {
                self.rules.set_tables(unicast, multicast);
                true
            }
            Command::Address(mac) => {
                self.rules.mac = mac;
                self.config.set_mac(mac);
                true
            }
            Command::Vlan(vlan, on) => self.rules.set_vlan(vlan, on),
            Command::Announced => {
                self.config.announce.store(false, Ordering::Relaxed);
                true
            }
            Command::Pairs(count) => {
                let some = (1..=self.pairs.len()).contains(&usize::from(count));
                if some {
                    self.use_pairs(count);
                }
                some
            }
            Command::GuestOffloads(offloads) => {
                let some = offloads & !(self.features & GUEST_OFFLOADS) == 0;
                if some {
                    self.guest_offloads = offloads;
                    self.accept();
                }
                some
            }
        }
    }

    /// Tells the driver where the link has come or gone.
    fn check_link(&mut self, queues: &Queues) {
        let link = !self.pairs.is_empty() && self.pairs.iter().all(|pair| pair.backend.link());
        if self.config.link.swap(link, Ordering::Relaxed) != link {
            queues.config_changed();
        }
    }
}

impl Pair {
    /// Sends the frame of a chain; breaks off where the back end takes none now.
    fn send(
        &mut self,
        chain: Chain,
        left: Offloads,
        counters: &Counters,
    ) -> ControlFlow<Used, Option<(Used, u32)>> {
        let Chain { readable, used, .. } = chain;
        let mut header = [0; HEADER];
        let whole = readable.read_at(0, &mut header) == HEADER;
        let payload = readable.part(HEADER as u64, u64::MAX);
        let length = payload.len();
        let mut offload = Offload::decode(&header).ok().filter(|offload| left.takes(offload));
        if let Some(Offload { checksum: checksum @ Checksum::Verified, .. }) = &mut offload {
            // Of what a driver sends the device knows nothing (5.1.6.2.2).
            *checksum = Checksum::Unknown;
        }
        let packet = offload
            .map(|offload| Packet { offload, payload: Payload::Guest(&payload) })
            .filter(|packet| whole && packet.is_sound());
        match packet {
            Some(packet) if self.backend.send(&packet) == Sent::Busy => {
                return ControlFlow::Break(used);
            }
            Some(_) => {}
            None => counters.dropped(Direction::Sent, DropReason::Malformed),
        }
        counters.frame(Direction::Sent, length);
        ControlFlow::Continue(Some((used, 0)))
    }

    /// Puts the frame into buffers of the driver: one, or as many as it needs where they are
    /// mergeable (5.1.6.4).
    fn deliver(
        &mut self,
        queues: &mut Queues,
        index: usize,
        mergeable: bool,
    ) -> Result<Delivery, QueueError> {
        let frame = self.frame.bytes();
        let total = (HEADER + frame.len()) as u64;
        let most = if mergeable { usize::from(queues.size(index)) } else { 1 };
        let mut room = 0;
        let mut result = Ok(Delivery::TooSmall);
        while room < total && self.chains.len() < most {
            match queues.take(index) {
                Ok(Some(chain)) => {
                    room += chain.writable.len();
                    self.chains.push(chain);
                }
                Ok(None) => {
                    result = Ok(Delivery::Wait);
                    break;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if room < total {
            for chain in self.chains.drain(..).rev() {
                queues.put_back(index, chain.used);
            }
            // Where none is enabled, none will come.
            return if most == 0 { Ok(Delivery::TooSmall) } else { result };
        }
        let header = self.frame.offload.encode(self.chains.len() as u16);
        let mut done = 0;
        let answers = self.chains.drain(..).map(|chain| {
            let before = done;
            let mut at = 0;
            if done < HEADER {
                at = chain.writable.write_at(0, &header[done..]);
                done += at;
            }
            if done >= HEADER {
                done += chain.writable.write_at(at as u64, &frame[done - HEADER..]);
            }
            (chain.used, (done - before) as u32)
        });
        queues.push_all(index, answers);
        Ok(Delivery::Done)
    }

    /// Says what is waited for.
    fn settle(&mut self) {
        let (receive, send) = (!self.held, self.blocked);
        self.backend
            .watch(Interest { receive: self.enabled && receive, send: self.enabled && send });
    }

    /// Discards what has come for nobody.
    fn discard(&mut self, most: usize, counters: &Counters) {
        for _ in 0..most {
            if !self.backend.receive(&mut self.frame) {
                return;
            }
            counters.frame(Direction::Received, self.frame.bytes().len() as u64);
            counters.dropped(Direction::Received, DropReason::Unwanted);
        }
    }
}

fn offloads(features: u64, [checksum, tcp4, tcp6, ecn]: [u64; 4]) -> Offloads {
    let has = |bit: u64| features & bit != 0;
    // Segments are left with their checksum, or not at all (5.1.3.1).
    let checksum = has(checksum);
    Offloads {
        checksum,
        tcp4: checksum && has(tcp4),
        tcp6: checksum && has(tcp6),
        ecn: checksum && has(ecn),
    }
}

impl DataPath for Net {
    fn start(&mut self, features: u64, io: &Attachment) -> io::Result<()> {
        for (pair, source) in self.pairs.iter_mut().zip(OWN_SOURCES..) {
            if !self.attached {
                io.add(pair.backend.event(), source, Trigger::Readable)?;
            }
            if pair.enabled {
                pair.discard(STALE, &self.counters);
            }
        }
        self.attached = true;
        self.features = features;
        self.running = true;
        self.accept();
        let usable = self.usable_pairs() as u16;
        self.use_pairs(self.used_pairs.min(usable));
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        // A doorbell of before a reset may ring where there is no driver to be told.
        if self.running && std::mem::take(&mut self.changed) {
            queues.config_changed();
        }
        let pairs = self.usable_pairs();
        if index == 2 * pairs {
            return self.control(queues, index);
        }
        let at = index / 2;
        if index > 2 * pairs {
            return Ok(());
        }
        let result = match index % 2 {
            0 => self.receive(queues, at),
            _ => self.transmit(queues, at),
        };
        if let Some(pair) = self.pairs.get_mut(at) {
            pair.settle();
        }
        self.check_link(queues);
        result
    }

    fn ready(&mut self, queues: &mut Queues, source: u32) -> Result<(), QueueError> {
        let at = (source - OWN_SOURCES) as usize;
        let Some(pair) = self.pairs.get_mut(at) else { return Ok(()) };
        pair.backend.work();
        let mut result = Ok(());
        if pair.active {
            if pair.blocked {
                result = self.transmit(queues, at);
            }
            result = result.and(self.receive(queues, at));
        } else {
            pair.discard(TURN, &self.counters);
        }
        if let Some(pair) = self.pairs.get_mut(at) {
            pair.settle();
        }
        self.check_link(queues);
        result
    }

    fn reset(&mut self) {
        self.running = false;
        self.features = 0;
        self.guest_offloads = GUEST_OFFLOADS;
        self.changed = false;
        self.rules = Rules::new(self.permanent);
        self.config.set_mac(self.permanent);
        self.config.announce.store(false, Ordering::Relaxed);
        self.accept();
        self.use_pairs(1);
    }
}

const _: () = assert!(VLAN_BYTES * 8 == 1 << 12);
