//! A device between its registers, which are above, and its data path.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tetrarch_bus::Interrupt;
use tetrarch_io::{Attachment, Event, Handler, IoThread, Trigger};
use tetrarch_memory::GuestMemory;

use crate::queue::{Queue, QueueConfig, QueueError, QueuePosition};
use crate::queues::{Active, Queues};

/// Descriptors of a data path's own have sources from here on; below are the queues.
pub const OWN_SOURCES: u32 = 1 << 16;

/// How long a driver that takes memory from a device waits for what is in flight.
const PATIENCE: Duration = Duration::from_secs(10);

/// A driver can break the rules and reset the device as often as it likes, and would fill the
/// host's log: that is told again after this time at the earliest.
const QUIET: Duration = Duration::from_secs(60);

/// What a kind of device does with its queues: on an I/O thread, one call at a time.
pub trait DataPath: Send {
    /// The driver is ready, with these features. `io` is where descriptors of the data
    /// path's own are added, once for the life of the device.
    fn start(&mut self, _features: u64, _io: &Attachment) -> io::Result<()> {
        Ok(())
    }

    /// There may be chains in a queue.
    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError>;

    /// A descriptor of the data path's own is ready.
    fn ready(&mut self, _queues: &mut Queues, _source: u32) -> Result<(), QueueError> {
        Ok(())
    }

    /// The machine is to come to rest: what would wait long is not to.
    fn hurry(&mut self) {}

    /// Whether nothing is in flight, so that the device can be held or saved.
    fn idle(&self) -> bool {
        true
    }

    /// Whether nothing in flight touches guest memory by itself, without the device's lock.
    fn settled(&self) -> bool {
        self.idle()
    }

    /// Memory, or the queue, is taken from the device: what another process has of it is taken
    /// back, and touches memory no more when this returns.
    fn withdraw(&mut self, _queues: &mut Queues, _index: usize) {}

    /// The driver has reset the device. When this returns, nothing in flight touches guest
    /// memory any more, and nothing of before is pushed.
    fn reset(&mut self) {}

    /// Why the back end is of no use any more. The driver is told that the device needs a reset;
    /// its queues are still served.
    fn trouble(&self) -> Option<&str> {
        None
    }
}

/// A queue as its driver has set it up.
pub struct QueueSetup {
    pub config: QueueConfig,
    pub position: Option<QueuePosition>,
    pub interrupt: Arc<dyn Interrupt>,
}

struct Inner<P> {
    path: P,
    queues: Queues,
    /// The device needs a reset.
    broken: Arc<AtomicBool>,
    /// Its driver breaks the rules.
    faulty: bool,
    /// When the log was last told of that.
    told: Option<Instant>,
    /// The machine is at rest, or comes to it.
    paused: bool,
    /// The device may access memory: the transport says so.
    master: bool,
    /// Signalled when something in flight may have ended.
    landed: Arc<Condvar>,
    name: String,
}

impl<P: DataPath> Inner<P> {
    fn hush(&mut self) {
        self.queues.quiet = self.paused || !self.master || self.faulty;
    }

    fn check(&mut self, result: Result<(), QueueError>) {
        let Err(error) = result else { return };
        self.queues.quiet = true;
        if !std::mem::replace(&mut self.faulty, true) {
            if self.told.is_none_or(|told| told.elapsed() >= QUIET) {
                self.told = Some(Instant::now());
                log::warn!(
                    "{}: its driver breaks the rules of virtio: {error}; it has to reset the \
                        device",
                    self.name
                );
            }
            self.need_reset();
        }
    }

    fn withdraw(&mut self, index: usize) {
        self.path.withdraw(&mut self.queues, index);
        self.look_after();
    }

    /// To be called after the data path was.
    fn look_after(&mut self) {
        if let Some(cause) = self.path.trouble()
            && !self.broken.load(Ordering::SeqCst)
        {
            log::warn!("{}: {cause}; the guest gets errors, its machine goes on", self.name);
            self.need_reset();
        }
    }

    fn need_reset(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            // 2.1.1: DEVICE_NEEDS_RESET comes with a change of the configuration.
            self.queues.config_changed();
        }
    }

    fn serve_all(&mut self) {
        for index in 0..self.queues.list.len() {
            if self.queues.is_enabled(index) {
                let result = self.path.serve(&mut self.queues, index);
                self.check(result);
            }
        }
        self.look_after();
    }
}

impl<P: DataPath> Handler for Inner<P> {
    fn ready(&mut self, source: u32) {
        let result = if source < OWN_SOURCES {
            self.path.serve(&mut self.queues, source as usize)
        } else {
            self.path.ready(&mut self.queues, source)
        };
        self.check(result);
        self.look_after();
        self.landed.notify_all();
    }

    fn settled(&mut self) -> bool {
        self.path.settled()
    }

    fn quiesce(&mut self) -> bool {
        self.paused = true;
        self.hush();
        self.path.hurry();
        self.path.idle()
    }

    fn resume(&mut self) {
        self.paused = false;
        self.hush();
        self.serve_all();
        self.landed.notify_all();
    }
}

/// What transports and life cycle do with any device.
pub trait Control: Send + Sync {
    fn queue_count(&self) -> usize;
    /// The driver is ready (DRIVER_OK), with these features and queues.
    fn start(
        &self,
        features: u64,
        queues: Vec<Option<QueueSetup>>,
        config: Arc<dyn Interrupt>,
    ) -> Result<(), StartError>;
    /// The device is reset; also one that was never started.
    fn reset(&self);
    /// Whether the device may access memory; at first it may. When it was taken from it, nothing
    /// is read from memory or written there any more, and it goes on when it is given back.
    fn set_master(&self, master: bool);
    /// The driver uses a queue no longer; when this returns, nothing of it is touched any more.
    fn stop_queue(&self, index: usize);
    /// Where the device is in its queues; exact while its machine is held.
    fn positions(&self) -> Vec<Option<QueuePosition>>;
    /// The driver has broken the rules since the device was started, or its back end is gone.
    fn needs_reset(&self) -> bool;
    /// What a driver signals for each queue.
    fn doorbells(&self) -> &[Arc<Event>];
    /// Tells the driver that the configuration has changed.
    fn config_changed(&self);
}

/// Why a device cannot do what its driver asks.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("queue {index}: {error}")]
    Queue { index: usize, error: QueueError },
    #[error("the back end: {0}")]
    BackEnd(#[from] io::Error),
}

/// One device of a machine.
///
/// Lock: `inner`, held while the data path runs; interrupts are raised under it.
pub struct Device<P> {
    memory: Arc<GuestMemory>,
    doorbells: Vec<Arc<Event>>,
    broken: Arc<AtomicBool>,
    landed: Arc<Condvar>,
    inner: Arc<Mutex<Inner<P>>>,
    attachment: Attachment,
}

impl<P: DataPath + 'static> Device<P> {
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        queues: usize,
        path: P,
    ) -> io::Result<Self> {
        let doorbells =
            (0..queues).map(|_| Event::new().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let broken = Arc::new(AtomicBool::new(false));
        let landed = Arc::new(Condvar::new());
        let inner = Arc::new(Mutex::new(Inner {
            path,
            queues: Queues::default(),
            broken: Arc::clone(&broken),
            faulty: false,
            told: None,
            paused: false,
            master: true,
            landed: Arc::clone(&landed),
            name: name.into(),
        }));
        let attachment = io.attach(name, Arc::clone(&inner) as _);
        for (index, doorbell) in (0..).zip(&doorbells) {
            attachment.add(&**doorbell, index, Trigger::Edge)?;
        }
        Ok(Self { memory, doorbells, broken, landed, inner, attachment })
    }

    /// Waits until nothing in flight touches guest memory.
    fn settle(&self, inner: &mut MutexGuard<'_, Inner<P>>) {
        let deadline = Instant::now() + PATIENCE;
        while !inner.path.settled() {
            inner.path.hurry();
            if self.landed.wait_until(inner, deadline).timed_out() {
                log::warn!("{}: what is in flight goes on, though its driver ended it", inner.name);
                return;
            }
        }
    }

    /// Uses the data path between two of its calls.
    pub fn with_path<T>(&self, body: impl FnOnce(&mut P, &mut Queues) -> T) -> T {
        let inner = &mut *self.inner.lock();
        body(&mut inner.path, &mut inner.queues)
    }

    /// The same for what looks into queues, whose driver may break the rules: None then.
    pub fn apply<T>(
        &self,
        body: impl FnOnce(&mut P, &mut Queues) -> Result<T, QueueError>,
    ) -> Option<T> {
        let inner = &mut *self.inner.lock();
        match body(&mut inner.path, &mut inner.queues) {
            Ok(value) => Some(value),
            Err(error) => {
                inner.check(Err(error));
                None
            }
        }
    }
}

impl<P: DataPath + 'static> Control for Device<P> {
    fn queue_count(&self) -> usize {
        self.doorbells.len()
    }

    fn start(
        &self,
        features: u64,
        queues: Vec<Option<QueueSetup>>,
        config: Arc<dyn Interrupt>,
    ) -> Result<(), StartError> {
        let mut list = Vec::with_capacity(queues.len());
        for (index, (setup, doorbell)) in queues.into_iter().zip(&self.doorbells).enumerate() {
            let Some(QueueSetup { config, position, interrupt }) = setup else {
                list.push(None);
                continue;
            };
            let queue = Queue::new(Arc::clone(&self.memory), config, position)
                .map_err(|error| StartError::Queue { index, error })?;
            list.push(Some(Active { queue, interrupt, doorbell: Arc::clone(doorbell) }));
        }
        let inner = &mut *self.inner.lock();
        inner.path.start(features, &self.attachment)?;
        self.broken.store(false, Ordering::SeqCst);
        inner.faulty = false;
        let kept = (!inner.master).then(Vec::new);
        inner.queues = Queues { list, kept, quiet: false, config: Some(config) };
        inner.hush();
        inner.look_after();
        // A driver may have filled them before DRIVER_OK, and a saved device was in the
        // middle of its work.
        self.doorbells.iter().for_each(|doorbell| doorbell.signal());
        Ok(())
    }

    fn reset(&self) {
        let inner = &mut *self.inner.lock();
        inner.path.reset();
        inner.queues = Queues::default();
        self.broken.store(false, Ordering::SeqCst);
        inner.faulty = false;
    }

    fn set_master(&self, master: bool) {
        let mut inner = self.inner.lock();
        inner.master = master;
        inner.hush();
        if master {
            inner.queues.push_kept();
            drop(inner);
            self.doorbells.iter().for_each(|doorbell| doorbell.signal());
            return;
        }
        for index in 0..self.doorbells.len() {
            inner.withdraw(index);
        }
        self.settle(&mut inner);
        inner.queues.keep();
    }

    fn stop_queue(&self, index: usize) {
        let mut inner = self.inner.lock();
        if inner.queues.list.get(index).is_some() {
            inner.withdraw(index);
            inner.queues.list[index] = None;
            self.settle(&mut inner);
        }
    }

    fn positions(&self) -> Vec<Option<QueuePosition>> {
        self.inner.lock().queues.positions()
    }

    fn needs_reset(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    fn doorbells(&self) -> &[Arc<Event>] {
        &self.doorbells
    }

    fn config_changed(&self) {
        self.inner.lock().queues.config_changed();
    }
}
