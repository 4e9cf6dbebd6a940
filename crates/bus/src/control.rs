//! How the vCPUs of a machine are stopped together, from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use tetrarch_engine::Kick;

use crate::LoopCounters;

/// The place of one vCPU in its machine's [`RunControl`].
pub struct Seat {
    stop: AtomicBool,
    kicker: Arc<dyn Kick>,
    pub counters: LoopCounters,
}

impl Seat {
    /// Makes this vCPU's run loop look up from the guest.
    pub fn kick(&self) {
        self.kicker.kick();
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
}

/// Stops vCPUs. A request is taken by each vCPU once: it ends the `run_vcpu`
/// that goes on at the time, or else the next one at its start.
#[derive(Default)]
pub struct RunControl {
    seats: RwLock<Vec<Arc<Seat>>>,
}

impl RunControl {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a vCPU; the seat goes with it into `run_vcpu`.
    pub fn add(&self, kicker: Arc<dyn Kick>) -> Arc<Seat> {
        let counters = LoopCounters::default();
        let seat = Arc::new(Seat { stop: AtomicBool::new(false), kicker, counters });
        self.seats.write().push(Arc::clone(&seat));
        seat
    }

    pub fn request_stop(&self) {
        for seat in self.seats.read().iter() {
            seat.request_stop();
        }
    }

    pub(crate) fn stop_others(&self, own: &Arc<Seat>) {
        for seat in self.seats.read().iter() {
            if !Arc::ptr_eq(seat, own) {
                seat.request_stop();
            }
        }
    }
}
