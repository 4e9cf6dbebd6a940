//! Seeing that a machine is halted for good.
//!
//! With interrupt controllers in the kernel, HLT never leaves KVM_RUN: the
//! thread sleeps until an interrupt comes, and where interrupts are off that is
//! for ever. So somebody has to look. A vCPU that used no processor time for a
//! while is made to look at itself, in the rounds of [`Halts`]. An idle guest is
//! asked ever more rarely.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tetrarch_confine::{ThreadKind, enter};

use parking_lot::{Condvar, Mutex};
use tetrarch_engine::{EngineError, Halted, Halts};

use crate::kick::Kicker;

const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_millis(1600);
/// A vCPU that used more of a period than one part in so many is at work.
const BUSY_PART: u32 = 8;

/// What a vCPU shows of itself.
pub struct Progress {
    kicker: Arc<Kicker>,
    inside: AtomicBool,
    present: AtomicBool,
    /// The vCPU's number in [`Halts`].
    number: usize,
}

#[derive(Default)]
struct Shared {
    vcpus: Mutex<Vec<Arc<Progress>>>,
    halts: Halts,
    ended: Mutex<bool>,
    end: Condvar,
}

/// The watch of one VM; it ends with it.
#[derive(Default)]
pub struct HaltWatch {
    shared: Arc<Shared>,
}

impl HaltWatch {
    /// Adds a vCPU; the first one starts the watch.
    pub fn add(&self, kicker: Arc<Kicker>) -> Result<Arc<Progress>, EngineError> {
        let progress = Arc::new(Progress {
            kicker,
            inside: AtomicBool::new(false),
            present: AtomicBool::new(true),
            number: self.shared.halts.add(),
        });
        let mut vcpus = self.shared.vcpus.lock();
        if vcpus.is_empty() {
            let shared = Arc::clone(&self.shared);
            std::thread::Builder::new()
                .name("kvm-halt-watch".into())
                .spawn(move || {
                    enter(ThreadKind::Worker);
                    shared.watch();
                })
                .map_err(|error| {
                    EngineError::Unavailable(format!("no thread to be had: {error}"))
                })?;
        }
        vcpus.push(Arc::clone(&progress));
        Ok(progress)
    }

    pub fn set_present(&self, own: &Progress, present: bool) {
        own.present.store(present, Ordering::Relaxed);
        self.shared.halts.set_present(own.number, present);
    }

    /// A vCPU looks at itself: `dead` tells what it finds. True: all are halted for
    /// good.
    pub fn look(&self, own: &Progress, dead: impl FnOnce() -> bool) -> bool {
        let halts = &self.shared.halts;
        let round = halts.round();
        halts.report(own.number, round, dead()) == Halted::ForGood
    }
}

impl Drop for HaltWatch {
    fn drop(&mut self) {
        *self.shared.ended.lock() = true;
        self.shared.end.notify_all();
    }
}

impl Progress {
    /// The vCPU's thread enters and leaves `run`.
    #[inline]
    pub fn set_inside(&self, inside: bool) {
        self.inside.store(inside, Ordering::Relaxed);
    }

    /// Processor time of the vCPU's thread; `None` while it is not in `run`.
    fn cpu_time(&self) -> Option<Duration> {
        let thread = self.kicker.thread();
        if !self.inside.load(Ordering::Relaxed) || thread == 0 {
            return None;
        }
        // The clock of a thread's processor time, from its number (clock_getres(2),
        // MAKE_THREAD_CPUCLOCK of linux/posix-timers_types.h).
        let clock = !thread << 3 | 6;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a local.
        let result = unsafe { libc::clock_gettime(clock, &mut time) };
        (result == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
}

impl Shared {
    fn watch(&self) {
        let (mut wait, mut first) = (FIRST_LOOK, true);
        let mut times: Vec<Option<Duration>> = Vec::new();
        loop {
            let mut ended = self.ended.lock();
            if !*ended {
                self.end.wait_for(&mut ended, wait);
            }
            if *ended {
                return;
            }
            drop(ended);
            let mut vcpus = self.vcpus.lock().clone();
            vcpus.retain(|vcpu| vcpu.present.load(Ordering::Relaxed));
            let now: Vec<_> = vcpus.iter().map(|vcpu| vcpu.cpu_time()).collect();
            let asleep = now.len() == times.len()
                && now.iter().zip(&times).all(|(now, before)| match (now, before) {
                    (Some(now), Some(before)) => now.saturating_sub(*before) < wait / BUSY_PART,
                    _ => false,
                });
            times = now;
            if !asleep {
                wait = FIRST_LOOK;
                continue;
            }
            let all_dead = self.halts.next_round();
            for vcpu in &vcpus {
                vcpu.kicker.request_check();
            }
            wait = if all_dead || std::mem::take(&mut first) {
                FIRST_LOOK
            } else {
                (wait * 2).min(LAST_LOOK)
            };
        }
    }
}
