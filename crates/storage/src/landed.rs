//! Waiting for what is in flight: where a driver takes the bus from its device (PCI Local Bus 3.0,
//! 6.2.2), or waits at a register.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, MutexGuard};

/// How long the register's write waits for the host.
const PATIENCE: Duration = Duration::from_secs(10);

/// Signalled when something in flight may have ended.
#[derive(Default)]
pub struct Landed(Condvar);

impl Landed {
    pub fn signal(&self) {
        self.0.notify_all();
    }

    /// Until `settled` says that nothing in flight touches guest memory any more.
    pub fn wait<T>(
        &self,
        name: &str,
        device: &mut MutexGuard<'_, T>,
        settled: impl FnMut(&mut T) -> bool,
    ) {
        if !self.comes(device, settled) {
            log::warn!("{name}: what is in flight goes on without the bus");
        }
    }

    /// Whether `done` says yes in time.
    pub fn comes<T>(
        &self,
        device: &mut MutexGuard<'_, T>,
        mut done: impl FnMut(&mut T) -> bool,
    ) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !done(device) {
            if self.0.wait_until(device, deadline).timed_out() {
                return false;
            }
        }
        true
    }
}
