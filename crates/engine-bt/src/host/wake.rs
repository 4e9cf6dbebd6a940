//! How other threads, and the vCPU's own timer, get its attention.
//!
//! The request flag lies in the vCPU's state block, where translated code polls
//! it. A vCPU that sleeps in HLT waits on a condition variable instead.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tetrarch_engine::Kick;

use crate::irqchip::Wake;
use crate::state::block::SharedFlags;

/// The bell of one vCPU.
pub struct Bell {
    flags: SharedFlags,
    kicked: AtomicBool,
    sleeping: AtomicBool,
    lock: Mutex<()>,
    wakeup: Condvar,
}

impl Bell {
    pub fn new(flags: SharedFlags) -> Self {
        Self {
            flags,
            kicked: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            lock: Mutex::new(()),
            wakeup: Condvar::new(),
        }
    }

    /// Makes the vCPU come to its run loop soon.
    pub fn ring(&self) {
        self.flags.raise();
        if self.sleeping.load(Ordering::SeqCst) {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wakeup.notify_all();
        }
    }

    /// Takes the request to leave the run loop.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until the bell rings or `timeout` is over.
    pub fn sleep(&self, timeout: Option<Duration>) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Announced before the flag is looked at: `ring` does it in the other
        // order, so one of the two sees the other.
        self.sleeping.store(true, Ordering::SeqCst);
        if self.flags.request.load(Ordering::SeqCst) == 0 {
            match timeout {
                Some(timeout) => drop(self.wakeup.wait_timeout(guard, timeout)),
                None => drop(self.wakeup.wait(guard)),
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

impl Kick for Bell {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.ring();
    }
}

/// The bells of a VM's vCPUs, for its interrupt controllers.
pub struct Bells(Vec<OnceLock<Arc<Bell>>>);

impl Bells {
    pub fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| OnceLock::new()).collect())
    }

    pub fn set(&self, vcpu: usize, bell: Arc<Bell>) {
        if let Some(cell) = self.0.get(vcpu) {
            let _ = cell.set(bell);
        }
    }
}

impl Wake for Bells {
    fn wake(&self, vcpu: usize) {
        if let Some(bell) = self.0.get(vcpu).and_then(OnceLock::get) {
            bell.ring();
        }
    }
}
