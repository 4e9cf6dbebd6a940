//! The card as its function has it: what a driver asks by registers and commands, life, saved state.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use tetrarch_bus::Interrupt;
use tetrarch_io::{Attachment, Event, IoThread, Trigger};
use tetrarch_memory::GuestMemory;
use tetrarch_net::{Counters, NetBackend};

use super::card::{Active, BACKENDS, Card, ROOM};
use super::interrupts::{Causes, Interrupts};
use super::layout::{ActivateError, Setup};
use super::registers::CardRegisters;
use super::saved::{DamagedState, Saved};
use super::{MAX_TX, MacAddress};

/// One card of a machine.
///
/// Lock: `card`, held while the I/O thread serves it; interrupts are raised under it.
pub struct Vmxnet3 {
    card: Arc<Mutex<Card>>,
    interrupts: Arc<Interrupts>,
    room: Arc<Event>,
    sent: Vec<Arc<Event>>,
    waiting: Arc<AtomicBool>,
    memory: Arc<GuestMemory>,
    /// Keeps the card on its thread.
    _attachment: Attachment,
}

impl Vmxnet3 {
    /// With one back end, or one for each queue of a network that has several. `vectors` are its
    /// interrupts, by number.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        mac: MacAddress,
        (backends, counters): (Vec<Box<dyn NetBackend>>, Arc<Counters>),
        causes: Arc<Causes>,
        vectors: Vec<Arc<dyn Interrupt>>,
    ) -> io::Result<Self> {
        let interrupts = Arc::new(Interrupts::new(causes, vectors));
        let event = || Event::new().map(Arc::new);
        let room = event()?;
        let sent = (0..MAX_TX).map(|_| event()).collect::<io::Result<Vec<_>>>()?;
        let waiting = Arc::new(AtomicBool::new(false));
        let card = Arc::new(Mutex::new(Card::new(
            Arc::clone(&memory),
            backends,
            counters,
            Arc::clone(&interrupts),
            Arc::clone(&room),
            sent.clone(),
            Arc::clone(&waiting),
            mac,
        )));
        let attachment = io.attach(name, Arc::clone(&card) as _);
        for (source, event) in (0..).zip(&sent) {
            attachment.add(&**event, source, Trigger::Edge)?;
        }
        attachment.add(&*room, ROOM, Trigger::Edge)?;
        for (source, backend) in (BACKENDS..).zip(card.lock().backends()) {
            attachment.add(backend.event(), source, Trigger::Readable)?;
        }
        Ok(Self { card, interrupts, room, sent, waiting, memory, _attachment: attachment })
    }

    pub fn registers(&self) -> CardRegisters {
        CardRegisters {
            interrupts: Arc::clone(&self.interrupts),
            sent: self.sent.clone(),
            room: Arc::clone(&self.room),
            waiting: Arc::clone(&self.waiting),
        }
    }

    // Registers

    /// The address that the driver has given it, or its own.
    pub fn mac(&self) -> MacAddress {
        self.card.lock().mac
    }

    pub fn set_mac(&self, mac: MacAddress) {
        self.card.lock().mac = mac;
    }

    pub fn permanent(&self) -> MacAddress {
        self.card.lock().permanent
    }

    pub fn set_permanent(&self, mac: MacAddress) {
        self.card.lock().permanent = mac;
    }

    pub fn link(&self) -> bool {
        self.card.lock().link
    }

    /// Reads the interrupt cause register.
    pub fn take_causes(&self) -> u32 {
        self.interrupts.causes().take()
    }

    pub fn events(&self) -> u32 {
        self.card.lock().events
    }

    pub fn clear_events(&self, events: u32) {
        self.card.lock().clear_events(events);
    }

    // Commands

    /// ACTIVATE_DEV with what the driver shares; a card that is active begins anew with it. On an
    /// error it is not active. `second`: the driver has chosen revision 2.
    pub fn activate(&self, shared: u64, second: bool) -> Result<(), ActivateError> {
        let mut card = self.card.lock();
        card.quiesce();
        if !card.master {
            return Err(ActivateError::Bus);
        }
        let active = Active::new(&self.memory, Setup::read(&self.memory, shared, second)?)?;
        card.activate(active);
        self.update(&mut card, |card, active| {
            card.filter.mode = active.shared.rx_mode();
            active.shared.vlans(&mut card.filter.vlans);
            card.filter.set_multicast(&active.shared.multicast(&card.memory));
            active.read_rss(&card.memory);
        });
        Ok(())
    }

    /// QUIESCE_DEV: when this returns, nothing touches guest memory any more.
    pub fn quiesce(&self) {
        self.card.lock().quiesce();
    }

    fn update(&self, card: &mut Card, body: impl FnOnce(&mut Card, &mut Active)) {
        if !card.master {
            return;
        }
        if let Some(mut active) = card.active.take() {
            body(card, &mut active);
            card.active = Some(active);
        }
    }

    /// The same for a command of a driver; without one that has activated the card it is none.
    fn updated(&self, body: impl FnOnce(&mut Card, &mut Active)) {
        self.update(&mut self.card.lock(), body);
    }

    pub fn update_rx_mode(&self) {
        self.updated(|card, active| card.filter.mode = active.shared.rx_mode());
    }

    pub fn update_mac_filters(&self) {
        self.updated(|card, active| {
            card.filter.set_multicast(&active.shared.multicast(&card.memory));
        });
    }

    pub fn update_vlan_filters(&self) {
        self.updated(|card, active| active.shared.vlans(&mut card.filter.vlans));
    }

    pub fn update_rss(&self) {
        self.updated(|card, active| active.read_rss(&card.memory));
    }

    pub fn update_features(&self) {
        self.updated(|card, active| {
            active.setup.features = active.shared.features();
            active.read_rss(&card.memory);
        });
        self.card.lock().accept();
        self.room.signal();
    }

    /// GET_QUEUE_STATUS: writes to the table of queues which of them stand, and why.
    pub fn put_status(&self) {
        self.updated(|_, active| {
            let errors = active.tx.iter().map(|queue| queue.error);
            let errors = errors.chain(active.rx.iter().map(|queue| queue.error));
            errors.enumerate().for_each(|(at, error)| active.shared.set_status(at, error));
        });
    }

    /// GET_STATS: the same of statistics.
    pub fn put_statistics(&self) {
        self.updated(|_, active| {
            let tx = active.tx.iter().map(|queue| &queue.statistics);
            let all = tx.chain(active.rx.iter().map(|queue| &queue.statistics));
            all.enumerate().for_each(|(at, values)| active.shared.set_statistics(at, values));
        });
    }

    // Life

    /// RESET_DEV, and a reset of the function: as it was made.
    pub fn reset(&self) {
        let mut card = self.card.lock();
        card.quiesce();
        card.mac = card.permanent;
        card.filter = super::filter::Filter::default();
        card.announce = false;
    }

    /// Whether the card may access memory; at first it may. When it was taken from it, nothing is
    /// read or written there any more, and it goes on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut card = self.card.lock();
        card.master = master;
        card.ring_all();
    }

    pub fn is_active(&self) -> bool {
        self.card.lock().active.is_some()
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        self.card.lock().save()
    }

    /// Goes on as it was saved; where that cannot be it is reset.
    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        self.reset();
        let loaded = self.card.lock().load(saved);
        if loaded.is_err() {
            self.reset();
        }
        self.card.lock().ring_all();
        loaded
    }

    /// Lets go of the network.
    pub fn close(&self) {
        self.card.lock().close();
    }
}
