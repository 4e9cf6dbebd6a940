//! The controller: its queues on the I/O thread, and what registers ask of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tetrarch_block::{BlockBackend, BlockError, BlockInfo, Failures, Request};
use tetrarch_bus::Interrupt;
use tetrarch_devices::Drive;
use tetrarch_io::{Attachment, Handler, IoThread, Trigger};
use tetrarch_memory::GuestMemory;

use super::admin::Admin;
use super::command::Command;
use super::doorbells::{DoorbellRegisters, Doorbells};
use super::events::{Event, Events};
use super::features::Features;
use super::identify::About;
use super::log_page::Log;
use super::queue::{Completions, Submissions};
use super::saved::{DamagedState, Saved};
use super::status::Status;
use super::{MAX_ADMIN_ENTRIES, MAX_PAIRS, PAGE, nvm};
use crate::landed::Landed;
use crate::requests::Requests;

/// Descriptors on the I/O thread.
const DOORBELLS: u32 = 0;
const DISK: u32 = 1;

/// The number of the admin queues.
const ADMIN: usize = 0;

/// Who waits for the disk.
enum Owner {
    Command {
        queue: u16,
        id: u16,
        writes: bool,
        address: u64,
    },
    /// The controller is shut down when what was written is on the disk.
    Shutdown,
}

/// What AQA, ASQ and ACQ say (3.1.8 to 3.1.10): addresses, and numbers of entries.
#[derive(Clone, Copy, Debug)]
pub struct AdminQueues {
    pub submissions: u64,
    pub submission_entries: u32,
    pub completions: u64,
    pub completion_entries: u32,
}

/// Why a controller cannot be enabled: it then says that it failed.
#[derive(Debug, thiserror::Error)]
pub enum EnableError {
    #[error("the admin queues are no queues in RAM: {0:x?}")]
    AdminQueues(AdminQueues),
    #[error("the disk: {0}")]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Saved(#[from] DamagedState),
}

pub struct Inner {
    pub(super) memory: Arc<GuestMemory>,
    /// `None` once the machine has ended.
    disk: Option<Arc<dyn BlockBackend>>,
    pub(super) about: About,
    name: String,
    pub(super) doorbells: Arc<Doorbells>,
    /// By the numbers of their vectors.
    pub(super) interrupts: Vec<Arc<dyn Interrupt>>,
    /// While the controller is enabled.
    requests: Option<Requests<Owner>>,
    pub(super) submissions: Vec<Option<Submissions>>,
    pub(super) completions: Vec<Option<Completions>>,
    pub(super) features: Features,
    pub(super) events: Events,
    pub(super) log: Log,
    /// Completion queues that have got something, as bits.
    answered: u64,
    /// The machine is held.
    quiet: bool,
    /// The controller has the bus: it takes commands.
    master: bool,
    /// It is without it: memory is left alone.
    away: bool,
    landed: Arc<Landed>,
    shut_down: Arc<AtomicBool>,
    ended: Vec<(Owner, Result<(), BlockError>)>,
    failures: Failures,
}

impl Inner {
    pub(super) fn info(&self) -> BlockInfo {
        self.disk.as_ref().map_or(BlockInfo::NONE, |disk| disk.info())
    }

    fn reset(&mut self) {
        // Waits for what is in flight.
        self.requests = None;
        self.submissions.fill_with(|| None);
        self.completions.fill_with(|| None);
        self.features = Features::new(self.submissions.len() - 1);
        self.events = Events::default();
        self.answered = 0;
        self.ended.clear();
        self.shut_down.store(false, Ordering::SeqCst);
        self.doorbells.reset();
    }

    fn open(&mut self, io: &Attachment) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Err(io::ErrorKind::NotConnected.into()) };
        self.requests = Some(Requests::open(&**disk, io, DISK)?);
        Ok(())
    }

    fn add_admin_queues(&mut self, queues: AdminQueues) -> Result<(), EnableError> {
        let refused = |_| EnableError::AdminQueues(queues);
        let AdminQueues { submissions, submission_entries, completions, completion_entries } =
            queues;
        let sizes = 2..=MAX_ADMIN_ENTRIES;
        if !sizes.contains(&submission_entries)
            || !sizes.contains(&completion_entries)
            || !submissions.is_multiple_of(PAGE)
            || !completions.is_multiple_of(PAGE)
        {
            return Err(EnableError::AdminQueues(queues));
        }
        let memory = &self.memory;
        let answers = Completions::new(memory, completions, completion_entries, Some(0));
        let commands = Submissions::new(memory, submissions, submission_entries, ADMIN);
        self.completions[ADMIN] = Some(answers.map_err(refused)?);
        self.submissions[ADMIN] = Some(commands.map_err(refused)?);
        self.doorbells.set_completions(ADMIN, (0, 0), true);
        Ok(())
    }

    /// Whether commands are taken, and events told.
    fn works(&self) -> bool {
        self.master && !self.quiet
    }

    fn event(&mut self, event: Event) {
        self.events.add(event);
    }

    /// Takes what queues hold and the disk has done, and says so to the driver.
    fn serve(&mut self) {
        self.finish();
        if self.works() && self.submissions[ADMIN].is_some() {
            if self.doorbells.take_stray() {
                self.event(Event::InvalidDoorbell);
            }
            for queue in self.doorbells.take_rung() {
                self.serve_queue(queue);
            }
            for freed in self.doorbells.take_freed() {
                for queue in 0..self.submissions.len() {
                    let ends_there = |one: &Submissions| one.completions == freed;
                    if self.submissions[queue].as_ref().is_some_and(ends_there) {
                        self.serve_queue(queue);
                    }
                }
            }
            if let Some(requests) = &mut self.requests {
                requests.kick();
            }
            self.finish();
        }
        self.tell_events();
        self.interrupt();
    }

    /// After a queue full of commands it is the turn of others on the thread.
    fn serve_queue(&mut self, queue: usize) {
        let Some(size) = self.submissions.get(queue).and_then(|slot| Some(slot.as_ref()?.size))
        else {
            return self.event(Event::InvalidDoorbell);
        };
        for _ in 0..size {
            // A command may delete the queue, its own too.
            let Some(Some(submissions)) = self.submissions.get(queue) else { return };
            let (tail, target) = (self.doorbells.tail(queue), submissions.completions);
            if tail >= size {
                return self.event(Event::InvalidDoorbellValue);
            }
            if submissions.head == tail || submissions.deletion.is_some() {
                return;
            }
            if !self.has_room(target) {
                return;
            }
            self.remember(queue);
            let Some(Some(submissions)) = self.submissions.get_mut(queue) else { return };
            let command = submissions.take();
            self.begin(queue, &command);
        }
        self.doorbells.ring(queue);
    }

    /// Whether a completion queue takes one more; where not, its doorbell is waited for.
    fn has_room(&mut self, queue: usize) -> bool {
        for waits in [false, true] {
            if waits {
                self.doorbells.wait_for(queue);
            }
            let Some(Some(completions)) = self.completions.get(queue) else { return false };
            let head = self.doorbells.head(queue);
            if head >= completions.size {
                self.event(Event::InvalidDoorbellValue);
            } else if completions.has_room(head) {
                return true;
            }
        }
        false
    }

    fn begin(&mut self, queue: usize, command: &Command) {
        let id = command.id();
        if queue == ADMIN {
            match self.admin(command) {
                Ok(Admin::Done(result)) => self.complete(queue, id, result, Status::SUCCESS),
                Ok(Admin::Later) => {}
                Ok(Admin::Waits) => self.forget(queue),
                Err(status) => {
                    self.log.failed(queue as u16, id, status, 0);
                    self.complete(queue, id, 0, status);
                }
            }
            return;
        }
        match nvm::work(&self.memory, &self.info(), command) {
            Ok(Some(work)) => {
                let Some(requests) = &mut self.requests else { return };
                let (queue, address) = (queue as u16, nvm::start(command));
                let owner = Owner::Command { queue, id, writes: work.writes, address };
                for request in &work.requests {
                    match request {
                        Request::Read { data, .. } => self.log.read(data.len()),
                        Request::Write { data, .. } => self.log.wrote(data.len()),
                        _ => {}
                    }
                }
                let changes = work.requests.iter().any(Request::writes);
                let durable = changes && (work.durable || self.features.write_through());
                requests.submit(owner, work.requests.into_iter(), durable);
            }
            Ok(None) => self.complete(queue, id, 0, Status::SUCCESS),
            Err(status) => {
                self.log.failed(queue as u16, id, status, nvm::start(command));
                self.complete(queue, id, 0, status);
            }
        }
    }

    /// A command is in flight, and has a place in its completion queue.
    fn remember(&mut self, queue: usize) {
        let Some(Some(submissions)) = self.submissions.get_mut(queue) else { return };
        submissions.in_flight += 1;
        if let Some(Some(completions)) = self.completions.get_mut(submissions.completions) {
            completions.in_flight += 1;
        }
    }

    /// A command is in flight no more, and has its place in a completion queue no more.
    fn forget(&mut self, queue: usize) {
        let Some(Some(submissions)) = self.submissions.get_mut(queue) else { return };
        submissions.in_flight -= 1;
        if let Some(Some(completions)) = self.completions.get_mut(submissions.completions) {
            completions.in_flight -= 1;
        }
    }

    fn complete(&mut self, queue: usize, id: u16, result: u32, status: Status) {
        let Some(Some(submissions)) = self.submissions.get_mut(queue) else { return };
        submissions.in_flight -= 1;
        let deletion = submissions.deletion.filter(|_| submissions.in_flight == 0);
        let (head, target) = (submissions.head, submissions.completions);
        if let Some(Some(completions)) = self.completions.get_mut(target) {
            completions.in_flight -= 1;
            completions.push(result, queue as u16, head, id, status);
            self.doorbells.post(target, completions.tail);
            self.answered |= 1 << target;
        }
        if let Some(deletion) = deletion {
            self.submissions[queue] = None;
            self.complete(ADMIN, deletion, 0, Status::SUCCESS);
        }
    }

    /// Answers what the disk has done; without the bus, when it is there again.
    fn finish(&mut self) {
        let Some(requests) = &mut self.requests else { return };
        let mut ended = std::mem::take(&mut self.ended);
        requests.take(&mut ended);
        let mut kept = Vec::new();
        for (owner, result) in ended.drain(..) {
            if self.away && matches!(owner, Owner::Command { .. }) {
                kept.push((owner, result));
                continue;
            }
            if let Err(error) = result {
                self.failures.tell(&self.name, error);
            }
            match owner {
                Owner::Command { queue, id, writes, address } => {
                    let status = Status::of(result, writes);
                    if status != Status::SUCCESS {
                        self.log.failed(queue, id, status, address);
                    }
                    self.complete(queue.into(), id, 0, status);
                }
                Owner::Shutdown => self.shut_down.store(true, Ordering::SeqCst),
            }
        }
        ended.append(&mut kept);
        self.ended = ended;
    }

    /// Whether nothing is in flight.
    fn settled(&mut self) -> bool {
        self.requests.as_mut().is_none_or(|requests| {
            requests.hurry();
            requests.idle()
        })
    }

    /// Answers requests for events while there is room for the answers.
    fn tell_events(&mut self) {
        while self.works() && self.events.is_due() && self.has_room(ADMIN) {
            let Some((id, result)) = self.events.answer() else { return };
            self.remember(ADMIN);
            self.complete(ADMIN, id, result, Status::SUCCESS);
        }
    }

    fn interrupt(&mut self) {
        let answered = std::mem::take(&mut self.answered);
        if answered == 0 {
            return;
        }
        self.doorbells.drive();
        for (queue, completions) in self.completions.iter().enumerate() {
            let Some(vector) = completions.as_ref().and_then(|queue| queue.vector) else {
                continue;
            };
            if answered & 1 << queue != 0
                && let Some(interrupt) = self.interrupts.get(usize::from(vector))
            {
                interrupt.raise();
            }
        }
    }
}

impl Handler for Inner {
    fn ready(&mut self, _source: u32) {
        self.serve();
        self.landed.signal();
    }

    fn settled(&mut self) -> bool {
        Self::settled(self)
    }

    fn quiesce(&mut self) -> bool {
        self.quiet = true;
        self.settled()
    }

    fn resume(&mut self) {
        self.quiet = false;
        self.serve();
        self.landed.signal();
    }
}

/// One controller of a machine.
///
/// Lock: `inner`, held while the I/O thread serves it; interrupts are raised under it.
pub struct Nvme {
    inner: Arc<Mutex<Inner>>,
    doorbells: Arc<Doorbells>,
    shut_down: Arc<AtomicBool>,
    landed: Arc<Landed>,
    attachment: Attachment,
}

impl Nvme {
    /// With as many I/O queue pairs as there are interrupts beside the admin queues'.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        disk: Arc<dyn BlockBackend>,
        about: About,
        interrupts: Vec<Arc<dyn Interrupt>>,
        line: Drive,
    ) -> io::Result<Self> {
        let pairs = interrupts.len().clamp(2, MAX_PAIRS + 1);
        let doorbells = Arc::new(Doorbells::new(pairs, line)?);
        let shut_down = Arc::new(AtomicBool::new(false));
        let landed = Arc::new(Landed::default());
        let inner = Arc::new(Mutex::new(Inner {
            memory,
            disk: Some(disk),
            about,
            name: name.into(),
            doorbells: Arc::clone(&doorbells),
            interrupts,
            requests: None,
            submissions: (0..pairs).map(|_| None).collect(),
            completions: (0..pairs).map(|_| None).collect(),
            features: Features::new(pairs - 1),
            events: Events::default(),
            log: Log::default(),
            answered: 0,
            quiet: false,
            master: true,
            away: false,
            landed: Arc::clone(&landed),
            shut_down: Arc::clone(&shut_down),
            ended: Vec::new(),
            failures: Failures::default(),
        }));
        let attachment = io.attach(name, Arc::clone(&inner) as _);
        attachment.add(doorbells.event(), DOORBELLS, Trigger::Edge)?;
        Ok(Self { inner, doorbells, shut_down, landed, attachment })
    }

    /// CC.EN was set. On an error the controller is as it was after a reset.
    pub fn enable(&self, queues: AdminQueues) -> Result<(), EnableError> {
        self.start(|inner| inner.add_admin_queues(queues))
    }

    /// The same as it was when it was saved.
    pub fn load(&self, saved: &Saved) -> Result<(), EnableError> {
        self.start(|inner| Ok(inner.load(saved)?))?;
        // It was in the middle of its work.
        self.ring_all();
        Ok(())
    }

    fn ring_all(&self) {
        let inner = self.inner.lock();
        for (queue, _) in inner.submissions.iter().enumerate().filter(|(_, slot)| slot.is_some()) {
            self.doorbells.ring(queue);
        }
    }

    /// Whether the controller may access memory; at first it may. When it was taken from it,
    /// nothing is read or written there any more, and it goes on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut inner = self.inner.lock();
        (inner.master, inner.away) = (master, false);
        if master {
            drop(inner);
            return self.ring_all();
        }
        let name = inner.name.clone();
        self.landed.wait(&name, &mut inner, Inner::settled);
        inner.away = true;
    }

    fn start(
        &self,
        set_up: impl FnOnce(&mut Inner) -> Result<(), EnableError>,
    ) -> Result<(), EnableError> {
        let inner = &mut *self.inner.lock();
        inner.reset();
        let started = set_up(inner).and_then(|()| Ok(inner.open(&self.attachment)?));
        if started.is_err() {
            inner.reset();
        }
        started
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        self.inner.lock().save()
    }

    /// CC.EN was cleared: when this returns, nothing in flight touches guest memory any more.
    pub fn reset(&self) {
        self.inner.lock().reset();
    }

    /// CC.SHN asks for it (7.6.2): what was written goes to the disk.
    pub fn shut_down(&self) {
        let inner = &mut *self.inner.lock();
        match &mut inner.requests {
            Some(requests) => {
                requests.submit(Owner::Shutdown, [Request::Flush].into_iter(), false);
                requests.kick();
            }
            None => self.shut_down.store(true, Ordering::SeqCst),
        }
    }

    /// Whether it has come about.
    pub fn is_shut_down(&self) -> bool {
        self.shut_down.load(Ordering::SeqCst)
    }

    pub fn set_shut_down(&self, shut_down: bool) {
        self.shut_down.store(shut_down, Ordering::SeqCst);
    }

    /// What INTMS and INTMC have come to.
    pub fn set_mask(&self, mask: u32) {
        self.doorbells.set_mask(mask);
    }

    pub fn doorbells(&self) -> DoorbellRegisters {
        DoorbellRegisters(Arc::clone(&self.doorbells))
    }

    /// The disk has another size: the driver is told where it wants to be.
    pub fn resized(&self) {
        let inner = &mut *self.inner.lock();
        inner.log.namespace_changed = true;
        if inner.features.tells_namespaces() {
            inner.event(Event::NamespaceChanged);
        }
        self.doorbells.event().signal();
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        self.inner.lock().requests.as_ref().map_or(0, Requests::stopped)
    }

    /// Lets go of the disk.
    pub fn close(&self) {
        let inner = &mut *self.inner.lock();
        inner.reset();
        inner.disk = None;
    }
}
