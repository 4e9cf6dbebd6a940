//! The controller as its function has it: what a driver asks by commands, life, saved state.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::Interrupt;
use tetrarch_devices::Drive;
use tetrarch_io::{Attachment, Event, IoThread, Trigger};
use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError};

use super::MAX_TARGETS;
use super::config_page::{self, CONTROLLER_ADDRESS, CONTROLLER_PAGE};
use super::hba::{ADDED, Hba, News, REMOVED};
use super::registers::{Interrupts, RingRegisters};
use super::request::{REQUEST, Reply, Request};
use super::rings::{RingPages, Rings};
use super::saved::{DamagedState, Saved};
use super::target::Target;
use crate::landed::Landed;
use crate::requests::Requests;
use crate::scsi::Unit;

/// The source of the kicks' event; below are those of disks, by target.
const KICKS: u32 = MAX_TARGETS as u32;

/// Why a command of the controller's fails.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("what it names is not in RAM, or of no size: {0}")]
    Memory(#[from] MemoryError),
    #[error("there is no such page of configuration")]
    Page,
    #[error("there is no such target")]
    Target,
    #[error("there are no rings")]
    Rings,
    #[error("the controller has not the bus")]
    Bus,
    #[error("the target {0} has a drive already")]
    Taken(usize),
}

/// One controller of a machine.
///
/// Lock: `hba`, held while the I/O thread serves it; interrupts are raised under it.
pub struct Pvscsi {
    hba: Arc<Mutex<Hba>>,
    interrupts: Arc<Interrupts>,
    event: Arc<Event>,
    landed: Arc<Landed>,
    name: String,
    attachment: Attachment,
}

impl Pvscsi {
    /// Without targets. `line` and `messages` are its interrupt, whichever its driver takes.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        line: Drive,
        messages: Vec<Arc<dyn Interrupt>>,
    ) -> io::Result<Self> {
        let interrupts = Arc::new(Interrupts::new(line, messages));
        let (event, landed) = (Arc::new(Event::new()?), Arc::new(Landed::default()));
        let hba = Arc::new(Mutex::new(Hba {
            memory,
            targets: (0..MAX_TARGETS).map(|_| None).collect(),
            rings: None,
            interrupts: Arc::clone(&interrupts),
            event: Arc::clone(&event),
            in_flight: 0,
            answers: VecDeque::new(),
            issued: 0,
            news: VecDeque::new(),
            leaving: vec![None; MAX_TARGETS],
            quiet: false,
            master: true,
            away: false,
            landed: Arc::clone(&landed),
        }));
        let attachment = io.attach(name, Arc::clone(&hba) as _);
        attachment.add(&*event, KICKS, Trigger::Edge)?;
        Ok(Self { hba, interrupts, event, landed, name: name.into(), attachment })
    }

    // Targets

    /// Puts a drive at a target; its driver is told where it has asked for news.
    pub fn attach(&self, number: usize, name: &str, unit: Unit) -> Result<(), CommandError> {
        let mut hba = self.hba.lock();
        let place = hba.targets.get_mut(number).ok_or(CommandError::Target)?;
        if place.is_some() {
            return Err(CommandError::Taken(number));
        }
        let mut target = Target::new(name.into(), unit);
        target.open(number, &self.attachment);
        *place = Some(target);
        hba.leaving[number] = None;
        hba.news.push_back(News { kind: ADDED, target: number });
        drop(hba);
        self.event.signal();
        Ok(())
    }

    /// Tells the driver that a target is to go.
    pub fn ask_to_leave(&self, number: usize) {
        let mut hba = self.hba.lock();
        if number < MAX_TARGETS {
            hba.news.push_back(News { kind: REMOVED, target: number });
        }
        drop(hba);
        self.event.signal();
    }

    /// Whether nobody knows of a target any more that was told to go: the driver has dealt with
    /// the message, or asks for none.
    pub fn has_left(&self, number: usize) -> bool {
        let hba = self.hba.lock();
        let waits = hba.news.iter().any(|news| (news.kind, news.target) == (REMOVED, number));
        match (&hba.rings, hba.leaving.get(number)) {
            (Some(rings), Some(&Some(index))) => !waits && rings.has_heard(index),
            _ => !waits,
        }
    }

    /// Takes a target away; what is in flight ends.
    pub fn detach(&self, number: usize) {
        let hba = &mut *self.hba.lock();
        if number < MAX_TARGETS {
            hba.abandon(&self.attachment, |one| one == number);
            hba.targets[number] = None;
            hba.leaving[number] = None;
            hba.news.retain(|news| news.target != number);
            hba.answer();
        }
    }

    /// The disk of a target has another size.
    pub fn resized(&self, number: usize) {
        if let Some(Some(target)) = self.hba.lock().targets.get_mut(number) {
            target.unit.resized();
        }
    }

    // Commands

    /// SETUP_RINGS. On an error there are none.
    pub fn set_up_rings(&self, pages: &RingPages) -> Result<(), CommandError> {
        let hba = &mut *self.hba.lock();
        hba.reset(&self.attachment);
        if !hba.master {
            return Err(CommandError::Bus);
        }
        let rings = Rings::new(&hba.memory, pages)?;
        rings.begin();
        hba.rings = Some(rings);
        Ok(())
    }

    /// SETUP_MSG_RING. Which target is to go is told anew where it was not heard in a ring of
    /// before, whose indices say nothing here.
    pub fn set_up_messages(&self, pages: &[u64]) -> Result<(), CommandError> {
        let hba = &mut *self.hba.lock();
        let (memory, leaving) = (Arc::clone(&hba.memory), hba.leaving.clone());
        let rings = rings(hba)?;
        let unheard = |index: &Option<u32>| index.is_some_and(|index| !rings.has_heard(index));
        let unheard: Vec<_> = leaving.iter().map(unheard).collect();
        rings.set_messages(&memory, pages)?;
        for (target, unheard) in unheard.into_iter().enumerate() {
            hba.leaving[target] = None;
            if unheard {
                hba.news.push_back(News { kind: REMOVED, target });
            }
        }
        self.event.signal();
        Ok(())
    }

    /// SETUP_REQCALLTHRESHOLD.
    pub fn set_threshold(&self, enable: bool) -> Result<(), CommandError> {
        rings(&mut self.hba.lock())?.set_threshold(enable);
        Ok(())
    }

    /// CONFIG: writes a page to guest memory.
    pub fn configuration(&self, number: u32, address: u64, at: u64) -> Result<(), CommandError> {
        let hba = self.hba.lock();
        if !hba.master {
            return Err(CommandError::Bus);
        }
        let known = (CONTROLLER_PAGE, u64::from(CONTROLLER_ADDRESS) << 32);
        if (number, address) != known {
            return Err(CommandError::Page);
        }
        Ok(hba.memory.write(GuestPhys(at), &config_page::controller())?)
    }

    /// ISSUE_SCSI: a request that is in no ring, and its completion. It waits for the host.
    pub fn issue(&self, request: u64, completion: u64) -> Result<(), CommandError> {
        let mut hba = self.hba.lock();
        if !hba.master {
            return Err(CommandError::Bus);
        }
        let mut bytes = [0; REQUEST];
        hba.memory.read(GuestPhys(request), &mut bytes)?;
        hba.begin(&Request::new(bytes), Reply::At(completion));
        hba.kick();
        hba.finish();
        hba.answer();
        if !self.landed.comes(&mut hba, |hba| hba.issued == 0) {
            log::warn!("{}: a request outside of its rings goes on", self.name);
        }
        Ok(())
    }

    /// ABORT_CMD. What a disk has cannot be called back: it ends by itself.
    pub fn abort(&self) {
        self.hba.lock().serve_now();
    }

    /// RESET_BUS, or RESET_DEVICE with one target.
    pub fn reset_targets(&self, only: Option<usize>) -> Result<(), CommandError> {
        let hba = &mut *self.hba.lock();
        if let Some(number) = only
            && !matches!(hba.targets.get(number), Some(Some(_)))
        {
            return Err(CommandError::Target);
        }
        let which = |number| only.is_none_or(|only| only == number);
        // What the ring holds was given before.
        hba.serve_now();
        hba.abandon(&self.attachment, which);
        hba.reset_units(which);
        hba.answer();
        Ok(())
    }

    /// ADAPTER_RESET: when this returns, nothing in flight touches guest memory any more.
    pub fn reset_adapter(&self) {
        let hba = &mut *self.hba.lock();
        hba.reset(&self.attachment);
        hba.reset_units(|_| true);
    }

    // Life

    /// As it was made.
    pub fn reset(&self) {
        self.reset_adapter();
        self.interrupts.load((0, 0));
    }

    /// Whether the controller may access memory; at first it may. When it was taken from it,
    /// nothing is read or written there any more, and it goes on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut hba = self.hba.lock();
        (hba.master, hba.away) = (master, false);
        if master {
            return self.event.signal();
        }
        self.landed.wait(&self.name, &mut hba, Hba::settled);
        hba.answer();
        hba.away = true;
    }

    pub fn registers(&self) -> RingRegisters {
        let (interrupts, event) = (Arc::clone(&self.interrupts), Arc::clone(&self.event));
        RingRegisters { interrupts, event }
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        self.hba.lock().save()
    }

    /// Goes on as it was saved; where that cannot be it is reset.
    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        self.reset();
        let loaded = self.hba.lock().load(saved);
        if loaded.is_err() {
            self.reset();
        }
        // It was in the middle of its work.
        self.event.signal();
        loaded
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        let hba = self.hba.lock();
        let queues = hba.targets.iter().flatten().filter_map(|target| target.requests.as_ref());
        queues.map(Requests::stopped).sum()
    }

    /// Lets go of the disks.
    pub fn close(&self) {
        for target in self.hba.lock().targets.iter_mut().flatten() {
            target.requests = None;
            target.unit.close();
        }
    }
}

/// Those that are set up, where the controller may touch them.
fn rings(hba: &mut Hba) -> Result<&mut Rings, CommandError> {
    if !hba.master {
        return Err(CommandError::Bus);
    }
    hba.rings.as_mut().ok_or(CommandError::Rings)
}
