//! The card as its function has it: what a driver asks seldom, life, saved state.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use parking_lot::Mutex;
use tetrarch_io::{Attachment, Event, IoThread, Trigger};
use tetrarch_memory::GuestMemory;
use tetrarch_net::{Counters, NetBackend};

use super::card::{BACKEND, Card, ROOM, SENT, TIMER};
use super::interrupts::Interrupts;
use super::registers::CardRegisters;
use super::ring::Ring;
use super::saved::{DamagedState, Saved};
use crate::{Drive, MacAddress};

/// One card of a machine.
///
/// Lock: `card`, held while the I/O thread serves it; interrupts are raised under it.
pub struct E1000 {
    card: Arc<Mutex<Card>>,
    interrupts: Arc<Interrupts>,
    tails: [Arc<AtomicU32>; 2],
    sent: Arc<Event>,
    room: Arc<Event>,
    waiting: Arc<AtomicBool>,
    /// Keeps the card on its thread.
    _attachment: Attachment,
}

impl E1000 {
    /// Of a network with several queues the first is used.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        mac: MacAddress,
        (backends, counters): (Vec<Box<dyn NetBackend>>, Arc<Counters>),
        line: Drive,
    ) -> io::Result<Self> {
        let interrupts = Arc::new(Interrupts::new(line)?);
        let [sent, room] = [Event::new()?, Event::new()?].map(Arc::new);
        let waiting = Arc::new(AtomicBool::new(false));
        let tails: [Arc<AtomicU32>; 2] = Default::default();
        let card = Arc::new(Mutex::new(Card::new(
            memory,
            backends,
            counters,
            Arc::clone(&interrupts),
            [Arc::clone(&sent), Arc::clone(&room)],
            Arc::clone(&waiting),
            tails.clone().map(Ring::new),
            mac,
        )));
        let attachment = io.attach(name, Arc::clone(&card) as _);
        attachment.add(&*sent, SENT, Trigger::Edge)?;
        attachment.add(&*room, ROOM, Trigger::Edge)?;
        attachment.add(interrupts.timer(), TIMER, Trigger::Readable)?;
        if let Some(backend) = card.lock().backend() {
            attachment.add(backend.event(), BACKEND, Trigger::Readable)?;
        }
        Ok(Self { card, interrupts, tails, sent, room, waiting, _attachment: attachment })
    }

    pub fn registers(&self) -> CardRegisters {
        CardRegisters {
            card: Arc::clone(&self.card),
            interrupts: Arc::clone(&self.interrupts),
            tails: self.tails.clone(),
            sent: Arc::clone(&self.sent),
            room: Arc::clone(&self.room),
            waiting: Arc::clone(&self.waiting),
        }
    }

    /// The address that the driver has given it, or its own.
    pub fn mac(&self) -> MacAddress {
        let card = self.card.lock();
        card.filter.mac().unwrap_or(card.permanent)
    }

    /// The address in the EEPROM.
    pub fn permanent(&self) -> MacAddress {
        self.card.lock().permanent
    }

    /// Whether there is a network at the other end.
    pub fn link(&self) -> bool {
        self.card.lock().link
    }

    /// CTRL.VME: tags are inserted and taken off.
    pub fn set_tags(&self, on: bool) {
        self.card.lock().tags = on;
    }

    /// The PHY gives back what it is given.
    pub fn set_loopback(&self, on: bool) {
        self.card.lock().loopback = on;
    }

    /// Causes of an interrupt.
    pub fn raise(&self, causes: u32) {
        self.interrupts.raise(causes);
    }

    // Life

    /// CTRL.RST, and a reset of the function. When this returns, nothing touches guest memory any
    /// more.
    pub fn reset(&self) {
        self.card.lock().reset();
    }

    /// Whether the card may access memory; at first it may. When it was taken from it, nothing is
    /// read or written there any more, and it goes on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut card = self.card.lock();
        card.master = master;
        card.ring_all();
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        self.card.lock().save()
    }

    /// Goes on as it was saved; where that cannot be it is reset.
    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        let mut card = self.card.lock();
        card.reset();
        let loaded = card.load(saved);
        if loaded.is_err() {
            card.reset();
        }
        card.ring_all();
        loaded
    }

    /// Lets go of the network.
    pub fn close(&self) {
        self.card.lock().close();
    }
}
