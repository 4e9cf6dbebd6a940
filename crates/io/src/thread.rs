//! The thread: one loop over epoll(7).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};
use tetrarch_confine::{ThreadKind, enter};

use parking_lot::{Condvar, Mutex};
use rustix::event::epoll;

use crate::Event;

/// What runs on an I/O thread: one call at a time, under the lock that it is shared by.
///
/// It must not wait for the guest, for Python, or for whoever holds the thread.
pub trait Handler: Send {
    /// A descriptor is ready, the one that was added as `source`.
    fn ready(&mut self, source: u32);

    /// Whether nothing that it has begun touches guest memory by itself.
    fn settled(&mut self) -> bool {
        true
    }

    /// Takes up no more work; true when nothing is in flight any longer. Asked again after
    /// each event until then.
    fn quiesce(&mut self) -> bool {
        true
    }

    /// Goes on after `quiesce`, with all that has come meanwhile.
    fn resume(&mut self) {}
}

/// Who is told before handlers are called, and behind it, when nothing that they have begun
/// touches guest memory any more: for a machine that stands meanwhile.
pub trait Around: Send + Sync {
    fn before(&self);
    fn behind(&self);
}

/// When a descriptor's handler is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// As long as there is something to read.
    Readable,
    /// Once for each time that something came to be read, taken or not: an [`Event`] that
    /// nobody has to take.
    Edge,
}

impl Trigger {
    fn flags(self) -> epoll::EventFlags {
        match self {
            Self::Readable => epoll::EventFlags::IN,
            Self::Edge => epoll::EventFlags::IN | epoll::EventFlags::ET,
        }
    }
}

/// Why an I/O thread could not be brought to rest.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    #[error("{handler} did not come to rest in {} ms", waited.as_millis())]
    Late { handler: String, waited: Duration },
    #[error("the I/O thread cannot pause itself")]
    OwnThread,
}

/// Source of the thread's own event. A handler's is its number and the source it chose.
const WAKE: u64 = u64::MAX;

struct Attached {
    name: String,
    handler: Arc<Mutex<dyn Handler>>,
}

#[derive(Default)]
struct State {
    handlers: BTreeMap<u32, Attached>,
    next: u32,
    /// How many have asked for a pause.
    pauses: u32,
    /// The thread is at rest, and stays so until the last pause ends.
    resting: bool,
    /// Who was not idle when the thread last asked.
    busy: Option<String>,
    ended: bool,
}

struct Shared {
    epoll: OwnedFd,
    wake: Event,
    state: Mutex<State>,
    /// `resting`, `pauses` or `ended` has changed.
    changed: Condvar,
    around: OnceLock<Arc<dyn Around>>,
}

/// A thread and what is attached to it. It ends when this is dropped.
///
/// Locks: a handler's own before the thread's state; the state is never held while a
/// handler is called.
pub struct IoThread {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    id: ThreadId,
    /// Whose thread it is.
    process: u32,
}

impl IoThread {
    pub fn new(name: &str) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            wake: Event::new()?,
            state: Mutex::default(),
            changed: Condvar::new(),
            around: OnceLock::new(),
        });
        let data = epoll::EventData::new_u64(WAKE);
        epoll::add(&shared.epoll, &shared.wake, data, Trigger::Readable.flags())?;
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            enter(ThreadKind::Io);
            own.run();
        })?;
        let id = thread.thread().id();
        Ok(Self { shared, thread: Mutex::new(Some(thread)), id, process: std::process::id() })
    }

    /// To be called once, before handlers have anything to do.
    pub fn set_around(&self, around: Arc<dyn Around>) {
        let _ = self.shared.around.set(around);
    }

    /// Lets a handler be called for the descriptors that it is then given. `name` is for
    /// errors: "the disk /var/x.img".
    pub fn attach(&self, name: impl Into<String>, handler: Arc<Mutex<dyn Handler>>) -> Attachment {
        let mut state = self.shared.state.lock();
        let id = state.next;
        state.next += 1;
        state.handlers.insert(id, Attached { name: name.into(), handler });
        Attachment { shared: Arc::clone(&self.shared), id, thread: self.id }
    }

    /// Brings the thread to rest: no handler is called until [`IoThread::resume`], and nothing
    /// that one has begun is in flight. Can be nested. On an error it runs on.
    pub fn pause(&self, timeout: Duration) -> Result<(), PauseError> {
        if std::thread::current().id() == self.id {
            return Err(PauseError::OwnThread);
        }
        let start = Instant::now();
        let mut state = self.shared.state.lock();
        state.pauses += 1;
        self.shared.wake.signal();
        while !state.resting && !state.ended {
            let timed_out = self.shared.changed.wait_until(&mut state, start + timeout).timed_out();
            if timed_out && !state.resting {
                state.pauses -= 1;
                let handler = state.busy.clone().unwrap_or_else(|| "a device's back end".into());
                self.shared.wake.signal();
                self.shared.changed.notify_all();
                return Err(PauseError::Late { handler, waited: start.elapsed() });
            }
        }
        Ok(())
    }

    /// Ends one pause; the last one lets the thread go on.
    pub fn resume(&self) {
        let mut state = self.shared.state.lock();
        state.pauses = state.pauses.saturating_sub(1);
        if state.pauses == 0 {
            // A pause that comes before the thread has woken asks the handlers anew.
            state.resting = false;
        }
        self.shared.changed.notify_all();
    }
}

impl IoThread {
    /// Ends the thread, and waits for it: who calls this holds nothing that a handler waits
    /// for. Dropping it does the same.
    pub fn end(&self) {
        let Some(thread) = self.thread.lock().take() else { return };
        if std::process::id() != self.process {
            // A child of fork(2) has the object and not the thread: there is nothing to wait
            // for, and the handle names nothing.
            return std::mem::forget(thread);
        }
        self.shared.state.lock().ended = true;
        self.shared.changed.notify_all();
        self.shared.wake.signal();
        if std::thread::current().id() != self.id {
            // It has caught what handlers raise.
            let _ = thread.join();
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.end();
    }
}

/// A handler's place on its thread. When it is dropped the handler is called no more; that
/// waits for a call that goes on, except on the thread itself.
pub struct Attachment {
    shared: Arc<Shared>,
    id: u32,
    thread: ThreadId,
}

impl Attachment {
    fn data(&self, source: u32) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.id) << 32 | u64::from(source))
    }

    /// Calls the handler with `source` when the descriptor is ready, until it is closed.
    pub fn add(&self, descriptor: impl AsFd, source: u32, trigger: Trigger) -> io::Result<()> {
        epoll::add(&self.shared.epoll, descriptor, self.data(source), trigger.flags())?;
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let removed = self.shared.state.lock().handlers.remove(&self.id);
        if let Some(attached) = removed
            && std::thread::current().id() != self.thread
        {
            drop(attached.handler.lock());
        }
    }
}

/// Told that handlers work, and to be told when they do no longer.
struct AtWork(Option<Arc<dyn Around>>);

impl AtWork {
    fn begin(&mut self, around: Option<&Arc<dyn Around>>) {
        if let (None, Some(around)) = (&self.0, around) {
            around.before();
            self.0 = Some(Arc::clone(around));
        }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if let Some(around) = &self.0 {
            around.behind();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        // Handlers were told to take up no more work.
        let mut quiesced = false;
        let mut at_work = AtWork(None);
        loop {
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, room, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    // Bad arguments alone: ours.
                    log::error!("an I/O thread cannot wait: {error}");
                    return;
                }
            }
            if events.iter().any(|event| event.data.u64() != WAKE) {
                at_work.begin(self.around.get());
            }
            for event in &events {
                let data = event.data.u64();
                if data == WAKE {
                    self.wake.take();
                } else {
                    self.call((data >> 32) as u32, |handler| handler.ready(data as u32));
                }
            }
            let state = self.state.lock();
            if state.ended {
                return;
            }
            let wanted = state.pauses > 0;
            drop(state);
            if wanted {
                quiesced = true;
                self.rest();
            }
            if quiesced && self.state.lock().pauses == 0 {
                quiesced = false;
                at_work.begin(self.around.get());
                self.each(|handler| {
                    handler.resume();
                    true
                });
            }
            if at_work.0.is_some() && self.each(|handler| handler.settled()).is_none() {
                at_work = AtWork(None);
            }
        }
    }

    /// Calls a handler if it is still there. One that panics is called no more: its device
    /// stands, the machine and its other devices go on.
    fn call<T>(&self, id: u32, body: impl FnOnce(&mut dyn Handler) -> T) -> Option<T> {
        let (name, handler) = {
            let state = self.state.lock();
            let attached = state.handlers.get(&id)?;
            (attached.name.clone(), Arc::clone(&attached.handler))
        };
        let result = catch_unwind(AssertUnwindSafe(|| body(&mut *handler.lock())));
        if result.is_err() {
            log::error!("{name} stands: its back end has failed; please report it");
            self.state.lock().handlers.remove(&id);
        }
        result.ok()
    }

    /// Calls `body` with each handler; one for which it gives false.
    fn each(&self, body: impl Fn(&mut dyn Handler) -> bool) -> Option<u32> {
        let ids: Vec<u32> = self.state.lock().handlers.keys().copied().collect();
        ids.into_iter().filter(|&id| self.call(id, &body) == Some(false)).last()
    }

    /// Rests until nobody wants a pause, if all handlers are idle.
    fn rest(&self) {
        let busy = self.each(|handler| handler.quiesce());
        let mut state = self.state.lock();
        let name = busy.and_then(|id| state.handlers.get(&id)).map(|busy| busy.name.clone());
        state.busy = name;
        if state.busy.is_some() || state.pauses == 0 {
            return;
        }
        state.resting = true;
        self.changed.notify_all();
        while state.resting && !state.ended {
            self.changed.wait(&mut state);
        }
        state.resting = false;
    }
}

#[cfg(test)]
mod tests;
