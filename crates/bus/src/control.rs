//! How the vCPUs of a machine are stopped and held together, from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use tetrarch_engine::{Clock, Counters, DebugStop, EngineError, Exit, Kick, Reply, Vcpu};

use crate::{Debugger, EngineCounters, LoopCounters, access::Access};

/// Why the machine could not be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The caller is a device, on the thread that would have to come to rest.
    #[error("the thread of vCPU {vcpu} cannot hold its own machine")]
    OwnThread { vcpu: u32 },
    #[error("vCPU {vcpu} did not come to rest in {} ms", waited.as_millis())]
    Late { vcpu: u32, waited: Duration },
    /// As `Late`, and a device is what keeps it.
    #[error(
        "vCPU {vcpu} did not come to rest in {} ms: {access} does not return",
        waited.as_millis()
    )]
    Device { vcpu: u32, access: Access, waited: Duration },
    /// As `Late`, and what is in flight behind a device.
    #[error("{device} did not come to rest in {} ms", waited.as_millis())]
    BackEnd { device: String, waited: Duration },
    #[error("an I/O thread cannot hold its own machine")]
    OwnIoThread,
    #[error("the machine is not held")]
    NotHeld,
    #[error(transparent)]
    Clock(#[from] EngineError),
}

/// Where a vCPU is, as who holds the machine sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Not in [`crate::run_vcpu`].
    Outside,
    /// In the guest or in a device, on this thread.
    Inside(ThreadId),
    /// In [`crate::run_vcpu`], between two instructions, its lock free.
    Parked(ThreadId),
}

struct Parking {
    hold: Mutex<Hold>,
    /// Somebody's place or the number of holds has changed.
    changed: Condvar,
    /// The number of holds once more, for the run loops to look at.
    holds: AtomicU32,
}

#[derive(Default)]
struct Hold {
    /// By vCPU.
    places: Vec<Place>,
    /// By vCPU: its thread is wanted for something else.
    nudged: Vec<bool>,
    /// By vCPU: the debugger does not let it run.
    frozen: Vec<bool>,
}

/// The place of one vCPU in its machine's [`RunControl`].
pub struct VcpuControl {
    index: usize,
    stop: AtomicBool,
    kicker: Arc<dyn Kick>,
    parking: Arc<Parking>,
    /// The access that a device answers, see [`Access`]; 0: none.
    serving: AtomicU64,
    pub counters: LoopCounters,
    pub engine_counters: EngineCounters,
}

impl VcpuControl {
    /// The engine's counters of a vCPU that runs: those of now, or the last that it told where
    /// it does not look up in time, as on the caller's own thread.
    pub fn ask_engine_counters(&self, timeout: Duration) -> Counters {
        let place = self.parking.hold.lock().places[self.index];
        match place {
            Place::Inside(thread) if thread != std::thread::current().id() => {
                self.engine_counters.ask(|| self.kick(), timeout)
            }
            _ => self.engine_counters.last(),
        }
    }

    /// Makes this vCPU's run loop look up from the guest, or from its place
    /// where the machine is held.
    pub fn kick(&self) {
        self.kicker.kick();
        // Also where it is not parked yet: it may be on its way.
        self.parking.hold.lock().nudged[self.index] = true;
        self.parking.changed.notify_all();
    }

    /// The flag is set before the kick, and the loop looks at it before it
    /// runs the guest; a kick that comes before `Vcpu::run` makes that return
    /// at once. So there is no moment at which a request could be missed.
    fn request_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
    }

    pub(crate) fn take_stop(&self) -> bool {
        // Looked at on each exit: the locked swap only where there is a request.
        self.stop.load(Ordering::SeqCst) && self.stop.swap(false, Ordering::SeqCst)
    }

    /// Notes what is being answered, for who waits for the vCPU.
    #[inline]
    pub(crate) fn set_serving(&self, exit: Option<&Exit>) {
        self.serving.store(exit.map_or(0, Access::encode), Ordering::Relaxed);
    }

    fn set_place(&self, place: Place) {
        self.parking.hold.lock().places[self.index] = place;
        self.parking.changed.notify_all();
    }
}

/// A vCPU is inside its run loop while this lives.
pub(crate) struct Inside<'a>(&'a VcpuControl);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.set_serving(None);
        self.0.set_place(Place::Outside);
    }
}

/// Stops and holds vCPUs.
///
/// A stop request is taken by each vCPU once: it ends the `run_vcpu` that goes
/// on at the time, or else the next one at its start.
///
/// A hold brings every vCPU between two instructions and keeps it there until
/// [`RunControl::resume`]. The threads stay in `run_vcpu`; the vCPUs are free to
/// be locked and looked at meanwhile, and the machine's clock stands.
///
/// Locks: a vCPU's own, then `hold`. Who holds the machine takes a vCPU's lock
/// only after `hold` has returned.
pub struct RunControl {
    clock: Arc<Clock>,
    vcpus: RwLock<Vec<Arc<VcpuControl>>>,
    parking: Arc<Parking>,
    pub debugger: Debugger,
}

impl RunControl {
    /// The clock is the machine's: it stops and starts with the vCPUs.
    pub fn new(clock: Arc<Clock>) -> Self {
        let hold = Mutex::new(Hold::default());
        let parking = Parking { hold, changed: Condvar::new(), holds: AtomicU32::new(0) };
        Self {
            clock,
            vcpus: RwLock::default(),
            parking: Arc::new(parking),
            debugger: Debugger::default(),
        }
    }

    /// Adds a vCPU, which [`crate::run_vcpu`] gets with what this returns.
    pub fn add(&self, kicker: Arc<dyn Kick>) -> Arc<VcpuControl> {
        let mut vcpus = self.vcpus.write();
        let mut hold = self.parking.hold.lock();
        hold.places.push(Place::Outside);
        hold.nudged.push(false);
        hold.frozen.push(false);
        let control = Arc::new(VcpuControl {
            index: vcpus.len(),
            stop: AtomicBool::new(false),
            kicker,
            parking: Arc::clone(&self.parking),
            serving: AtomicU64::new(0),
            engine_counters: EngineCounters::default(),
            counters: LoopCounters::default(),
        });
        vcpus.push(Arc::clone(&control));
        control
    }

    pub fn request_stop(&self) {
        for vcpu in self.vcpus.read().iter() {
            vcpu.request_stop();
        }
    }

    pub(crate) fn stop_others(&self, own: &Arc<VcpuControl>) {
        for vcpu in self.vcpus.read().iter() {
            if !Arc::ptr_eq(vcpu, own) {
                vcpu.request_stop();
            }
        }
    }

    /// Brings all vCPUs between two instructions and stops the clock. Returns
    /// when all are there; holds can be nested, each needs its `resume`. Where
    /// it fails nothing is held.
    pub fn hold(&self, timeout: Duration) -> Result<(), HoldError> {
        let deadline = Instant::now() + timeout;
        let vcpus = self.vcpus.read().clone();
        let own = std::thread::current().id();
        let mut hold = self.parking.hold.lock();
        let is_own = |place: &Place| matches!(place, Place::Inside(thread) | Place::Parked(thread) if *thread == own);
        if let Some(vcpu) = hold.places.iter().position(is_own) {
            return Err(HoldError::OwnThread { vcpu: vcpu as u32 });
        }
        self.parking.holds.fetch_add(1, Ordering::SeqCst);
        let is_inside = |place: &Place| matches!(place, Place::Inside(_));
        for (vcpu, _) in vcpus.iter().zip(&hold.places).filter(|(_, place)| is_inside(place)) {
            vcpu.kicker.kick();
        }
        let result = loop {
            let Some(vcpu) = hold.places.iter().position(is_inside) else {
                break self.clock.stop().map_err(HoldError::Clock);
            };
            if self.parking.changed.wait_until(&mut hold, deadline).timed_out()
                && is_inside(&hold.places[vcpu])
            {
                let serving = vcpus.get(vcpu).map_or(0, |s| s.serving.load(Ordering::Relaxed));
                let (vcpu, waited) = (vcpu as u32, timeout);
                break Err(match Access::decode(serving) {
                    Some(access) => HoldError::Device { vcpu, access, waited },
                    None => HoldError::Late { vcpu, waited },
                });
            }
        };
        if result.is_err() {
            // The clock's error is told already.
            let _ = self.release(hold);
        }
        result
    }

    /// Ends one hold; the last one starts the clock and lets the vCPUs go.
    pub fn resume(&self) -> Result<(), HoldError> {
        let hold = self.parking.hold.lock();
        if self.parking.holds.load(Ordering::SeqCst) == 0 {
            return Err(HoldError::NotHeld);
        }
        Ok(self.release(hold)?)
    }

    fn release(&self, hold: MutexGuard<'_, Hold>) -> Result<(), EngineError> {
        let last = self.parking.holds.fetch_sub(1, Ordering::SeqCst) == 1;
        let started = if last { self.clock.start() } else { Ok(()) };
        drop(hold);
        self.parking.changed.notify_all();
        started
    }

    pub fn is_held(&self) -> bool {
        self.parking.holds.load(Ordering::SeqCst) != 0
    }

    /// Keeps a vCPU where it is when the machine runs, or lets it run again; to be
    /// called while the machine is held.
    pub fn set_frozen(&self, vcpu: &VcpuControl, frozen: bool) {
        self.parking.hold.lock().frozen[vcpu.index] = frozen;
    }

    /// Freezes a vCPU that has stopped for the debugger, and tells that. Returns the
    /// answer to its exit; on the vCPU's thread, which parks next.
    pub(crate) fn debug_stop(
        &self,
        own: &VcpuControl,
        stop: DebugStop,
        vcpu: &mut dyn Vcpu,
    ) -> Reply {
        let foreign = self.debugger.is_foreign(stop, vcpu);
        if !foreign {
            self.set_frozen(own, true);
            self.debugger.tell(own.index, stop);
        }
        Debugger::answer(foreign)
    }

    /// The vCPU's thread comes into the run loop, where it parks at once if
    /// the machine is held: to be called before the guest runs.
    pub(crate) fn enter<'a>(&self, own: &'a VcpuControl) -> Inside<'a> {
        own.set_place(Place::Inside(std::thread::current().id()));
        Inside(own)
    }

    /// Parks a vCPU for as long as the machine is held or the debugger keeps it.
    /// Returns early, with true, where its thread is wanted for something else.
    pub(crate) fn park(&self, own: &VcpuControl, vcpu: &mut MutexGuard<'_, Box<dyn Vcpu>>) -> bool {
        let thread = std::thread::current().id();
        MutexGuard::unlocked(vcpu, || {
            let mut hold = self.parking.hold.lock();
            while self.is_held() || hold.frozen[own.index] {
                if hold.places[own.index] != Place::Parked(thread) {
                    hold.places[own.index] = Place::Parked(thread);
                    self.parking.changed.notify_all();
                }
                if std::mem::take(&mut hold.nudged[own.index]) || own.stop.load(Ordering::SeqCst) {
                    // Still parked: the guest does not run before the next look.
                    return true;
                }
                self.parking.changed.wait(&mut hold);
            }
            hold.places[own.index] = Place::Inside(thread);
            false
        })
    }
}
