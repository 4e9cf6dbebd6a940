//! Events that raise interrupts: a thread waits for all of a VM's.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use tetrarch_confine::{ThreadKind, enter};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, epoll, eventfd};
use tetrarch_engine::{EngineError, GSI_COUNT, Irqfd, IrqfdId, Irqfds, Unusable};

use crate::lines::Lines;

/// What [`epoll`] tells of the thread's end; no irqfd has it.
const END: u64 = 0;
/// Events that are taken from the kernel at once.
const BATCH: usize = 64;

/// The irqfds of one VM.
///
/// Locks: `watch`; `list`, held while an interrupt is raised, so that none is after a
/// removal; then `resamplers`, then the interrupt controllers' own.
pub struct IrqfdTable {
    shared: Arc<Shared>,
    /// Starts with the first irqfd.
    watch: Mutex<Option<Watch>>,
}

struct Shared {
    lines: Arc<Lines>,
    list: Mutex<Irqfds>,
    resamplers: Arc<Mutex<Vec<Arc<Irqfd>>>>,
}

impl IrqfdTable {
    pub fn new(lines: Arc<Lines>) -> Self {
        let resamplers = Arc::<Mutex<Vec<Arc<Irqfd>>>>::default();
        let ended = Arc::clone(&resamplers);
        lines.irqchip.set_resampler(Box::new(move |gsis| {
            let resamplers = ended.lock();
            resamplers.iter().filter(|irqfd| gsis >> irqfd.gsi & 1 != 0).for_each(|irqfd| {
                irqfd.signal_resample();
            });
        }));
        let shared = Shared { lines, list: Mutex::default(), resamplers };
        Self { shared: Arc::new(shared), watch: Mutex::default() }
    }

    pub fn add(&self, irqfd: Irqfd) -> Result<IrqfdId, EngineError> {
        let mut watch = self.watch.lock();
        let watch = match &mut *watch {
            Some(watch) => watch,
            none => none.insert(Watch::start(&self.shared).map_err(no_thread)?),
        };
        let (id, irqfd) = self.shared.list.lock().add(irqfd)?;
        if irqfd.resample().is_some() {
            self.shared.resamplers.lock().push(Arc::clone(&irqfd));
            self.shared.lines.irqchip.watch_ends(irqfd.gsi, true);
        }
        // From here on the thread knows of it; what was signalled before comes now.
        let data = epoll::EventData::new_u64(id.0);
        if let Err(error) = epoll::add(&watch.epoll, irqfd.event(), data, epoll::EventFlags::IN) {
            self.forget(id)?;
            return Err(no_thread(error.into()));
        }
        Ok(id)
    }

    pub fn remove(&self, id: IrqfdId) -> Result<(), EngineError> {
        let watch = self.watch.lock();
        let irqfd = self.forget(id)?;
        if let Some(watch) = &*watch {
            // Another descriptor of the event may stay open, and would go on to be
            // waited for (epoll(7), "Questions and answers" 6).
            let _ = epoll::delete(&watch.epoll, irqfd.event());
        }
        Ok(())
    }

    fn forget(&self, id: IrqfdId) -> Result<Arc<Irqfd>, EngineError> {
        let irqfd = self.shared.list.lock().remove(id)?;
        if irqfd.resample().is_some() {
            let mut resamplers = self.shared.resamplers.lock();
            resamplers.retain(|other| !Arc::ptr_eq(other, &irqfd));
            if resamplers.iter().all(|other| other.gsi != irqfd.gsi) {
                self.shared.lines.irqchip.watch_ends(irqfd.gsi, false);
            }
        }
        Ok(irqfd)
    }

    /// Raises what was signalled until now.
    pub fn settle(&self) {
        self.shared.list.lock().iter().for_each(|irqfd| self.shared.raise(irqfd));
    }
}

impl Shared {
    fn raise(&self, irqfd: &Irqfd) {
        if !irqfd.take() {
            return;
        }
        if irqfd.resample().is_some() {
            self.lines.irqchip.raise_until_end(irqfd.gsi);
            return;
        }
        self.lines.drive(irqfd.gsi, true);
        if irqfd.gsi < GSI_COUNT {
            self.lines.drive(irqfd.gsi, false);
        }
    }

    fn serve(&self, id: IrqfdId) {
        let list = self.list.lock();
        // One that was just taken away may still be in a batch.
        if let Some(irqfd) = list.get(id) {
            self.raise(irqfd);
        }
    }
}

/// The thread, which ends with this.
struct Watch {
    epoll: Arc<OwnedFd>,
    end: OwnedFd,
    thread: Option<JoinHandle<()>>,
    /// Whose thread it is: a child of fork(2) has none to end.
    process: u32,
}

impl Watch {
    fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, end.as_fd(), epoll::EventData::new_u64(END), epoll::EventFlags::IN)?;
        let (shared, watched) = (Arc::clone(shared), Arc::clone(&epoll));
        let thread = std::thread::Builder::new().name("bt-irqfd".into()).spawn(move || {
            enter(ThreadKind::Worker);
            watch(&shared, &watched);
        })?;
        Ok(Self { epoll, end, thread: Some(thread), process: std::process::id() })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if std::process::id() != self.process {
            return std::mem::forget(thread);
        }
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        let _ = thread.join();
    }
}

fn watch(shared: &Shared, epoll: &OwnedFd) {
    let mut room = [const { MaybeUninit::uninit() }; BATCH];
    loop {
        // Fails for a signal alone.
        let Ok((events, _)) = epoll::wait(epoll, &mut room, None) else { continue };
        for event in &*events {
            match event.data.u64() {
                END => return,
                id => shared.serve(IrqfdId(id)),
            }
        }
    }
}

fn no_thread(error: io::Error) -> EngineError {
    let otherwise = "look at the host's limits";
    Unusable::refused("no thread that waits for interrupts' events", &error, otherwise).into()
}
