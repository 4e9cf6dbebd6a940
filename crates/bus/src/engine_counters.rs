//! The engine's counters of a vCPU, as others read them while it runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tetrarch_engine::Counters;

/// The counters belong to the vCPU, which is its thread's: who wants them asks, and the run loop
/// tells them when it next looks up.
#[derive(Default)]
pub struct EngineCounters {
    wanted: AtomicBool,
    /// How often they were told, and what was.
    told: Mutex<(u64, Counters)>,
    changed: Condvar,
}

impl EngineCounters {
    pub fn tell(&self, counters: Counters) {
        let mut told = self.told.lock();
        *told = (told.0 + 1, counters);
        self.changed.notify_all();
    }

    pub(crate) fn tell_if_wanted(&self, counters: impl FnOnce() -> Counters) {
        // Looked at on each kick.
        if self.wanted.swap(false, Ordering::SeqCst) {
            self.tell(counters());
        }
    }

    /// Those that were told last.
    pub fn last(&self) -> Counters {
        self.told.lock().1.clone()
    }

    /// Those of now, or the last ones where the run loop does not look up in time.
    pub(crate) fn ask(&self, kick: impl FnOnce(), timeout: Duration) -> Counters {
        let before = self.told.lock().0;
        self.wanted.store(true, Ordering::SeqCst);
        kick();
        let end = Instant::now() + timeout;
        let mut told = self.told.lock();
        while told.0 == before && !self.changed.wait_until(&mut told, end).timed_out() {}
        told.1.clone()
    }
}
