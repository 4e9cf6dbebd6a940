//! The one clock by which time reaches a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Instant;

use parking_lot::Mutex;

use crate::EngineError;

/// Other clocks of the machine that have to stand while the clock does: those
/// that an engine's kernel keeps.
pub trait ClockFollower: Send + Sync {
    fn stopped(&self) -> Result<(), EngineError>;
    fn started(&self) -> Result<(), EngineError>;
}

/// Machine time: nanoseconds and ticks of the host's TSC for which the machine
/// has been able to run. It stops with the machine and goes on from there.
///
/// Reading takes no lock: a sequence count tells the reader that the state
/// changed meanwhile (odd: it is changing).
pub struct Clock {
    /// What machine nanoseconds and [`Clock::now_ns`] are counted from on the host.
    origin: Instant,
    sequence: AtomicU64,
    /// Host time less machine time while it runs.
    lag_ns: AtomicU64,
    lag_tsc: AtomicU64,
    /// Machine time where it stands; `RUNS` while it runs.
    stands_ns: AtomicU64,
    stands_tsc: AtomicU64,
    /// Held for a whole change, so that changes follow one another.
    change: Mutex<Option<Arc<dyn ClockFollower>>>,
}

const RUNS: u64 = u64::MAX;

/// The host's time-stamp counter.
#[inline]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU, and Linux lets user space use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[derive(Clone, Copy)]
struct State {
    lag_ns: u64,
    lag_tsc: u64,
    stands: Option<(u64, u64)>,
}

impl Clock {
    /// A clock that runs from 0; its TSC is the host's.
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            sequence: AtomicU64::new(0),
            lag_ns: AtomicU64::new(0),
            lag_tsc: AtomicU64::new(0),
            stands_ns: AtomicU64::new(RUNS),
            stands_tsc: AtomicU64::new(0),
            change: Mutex::new(None),
        }
    }

    /// Ties another clock to this one. There is one at most.
    pub fn set_follower(&self, follower: Arc<dyn ClockFollower>) {
        *self.change.lock() = Some(follower);
    }

    fn host_ns(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// Calls `read` with a state that held for the whole call.
    #[inline]
    fn consistent<T>(&self, read: impl Fn(State) -> T) -> T {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            if before & 1 == 0 {
                let stands_ns = self.stands_ns.load(Ordering::Relaxed);
                let stands_tsc = self.stands_tsc.load(Ordering::Relaxed);
                let value = read(State {
                    lag_ns: self.lag_ns.load(Ordering::Relaxed),
                    lag_tsc: self.lag_tsc.load(Ordering::Relaxed),
                    stands: (stands_ns != RUNS).then_some((stands_ns, stands_tsc)),
                });
                // The host's time is read before the count is read again.
                // SAFETY: LFENCE is part of x86-64 and has no effect but order.
                unsafe { core::arch::x86_64::_mm_lfence() };
                fence(Ordering::Acquire);
                if self.sequence.load(Ordering::Relaxed) == before {
                    return value;
                }
            }
            std::hint::spin_loop();
        }
    }

    /// To be called with `change` locked. What `change` reads of the host's
    /// time is later than any that a reader may have taken for the old state.
    fn publish(&self, change: impl FnOnce(&Self) -> State) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { core::arch::x86_64::_mm_lfence() };
        let state = change(self);
        let (stands_ns, stands_tsc) = state.stands.unwrap_or((RUNS, 0));
        self.lag_ns.store(state.lag_ns, Ordering::Relaxed);
        self.lag_tsc.store(state.lag_tsc, Ordering::Relaxed);
        self.stands_ns.store(stands_ns, Ordering::Relaxed);
        self.stands_tsc.store(stands_tsc, Ordering::Relaxed);
        self.sequence.store(sequence + 2, Ordering::Release);
    }

    fn state(&self) -> State {
        self.consistent(|state| state)
    }

    #[inline]
    pub fn now_ns(&self) -> u64 {
        self.consistent(|state| match state.stands {
            Some((ns, _)) => ns,
            None => self.host_ns().wrapping_sub(state.lag_ns),
        })
    }

    /// Ticks by which the machine's TSC lags behind the host's: those of all
    /// pauses, the one that goes on included.
    #[inline]
    pub fn tsc_lag(&self) -> u64 {
        self.consistent(|state| match state.stands {
            Some((_, tsc)) => host_tsc().wrapping_sub(tsc),
            None => state.lag_tsc,
        })
    }

    /// The host's TSC less the ticks of all pauses.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.consistent(|state| match state.stands {
            Some((_, tsc)) => tsc,
            None => host_tsc().wrapping_sub(state.lag_tsc),
        })
    }

    pub fn stands(&self) -> bool {
        self.state().stands.is_some()
    }

    /// Without effect on a clock that stands. Where the follower fails the
    /// clock stands all the same.
    pub fn stop(&self) -> Result<(), EngineError> {
        let follower = self.change.lock();
        let state = self.state();
        if state.stands.is_some() {
            return Ok(());
        }
        self.publish(|clock| State {
            stands: Some((
                clock.host_ns().wrapping_sub(state.lag_ns),
                host_tsc().wrapping_sub(state.lag_tsc),
            )),
            ..state
        });
        follower.as_ref().map_or(Ok(()), |follower| follower.stopped())
    }

    /// Without effect on a clock that runs. Where the follower fails the clock
    /// runs all the same.
    pub fn start(&self) -> Result<(), EngineError> {
        let follower = self.change.lock();
        let Some((ns, tsc)) = self.state().stands else { return Ok(()) };
        let told = follower.as_ref().map_or(Ok(()), |follower| follower.started());
        self.publish(|clock| State {
            lag_ns: clock.host_ns().wrapping_sub(ns),
            lag_tsc: host_tsc().wrapping_sub(tsc),
            stands: None,
        });
        told
    }

    /// Sets machine time, for a machine that goes on from a saved state. The
    /// TSC is not touched: each vCPU's state says what it reads.
    pub fn set_ns(&self, ns: u64) {
        let _change = self.change.lock();
        let state = self.state();
        self.publish(|clock| match state.stands {
            Some((_, tsc)) => State { stands: Some((ns, tsc)), ..state },
            None => State { lag_ns: clock.host_ns().wrapping_sub(ns), ..state },
        });
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn stopped_clock_stands_and_goes_on_from_there() {
        let clock = Clock::new();
        clock.stop().unwrap();
        let (stopped, tsc) = (clock.now_ns(), clock.tsc());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!((clock.now_ns(), clock.tsc()), (stopped, tsc));
        let lag = clock.tsc_lag();
        clock.start().unwrap();
        // The pause is in the lag for good.
        assert!(clock.tsc_lag() >= lag && lag > 0);
        let pause = clock.host_ns() - clock.now_ns();
        assert!(pause >= 2_000_000, "{pause}");
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.now_ns() - stopped >= 2_000_000);
        assert!(clock.tsc() > tsc);
    }

    #[test]
    fn clock_can_be_set_while_it_stands_and_while_it_runs() {
        let clock = Clock::new();
        clock.set_ns(5_000_000_000);
        assert!((5_000_000_000..6_000_000_000).contains(&clock.now_ns()));
        clock.stop().unwrap();
        let tsc = clock.tsc();
        clock.set_ns(7);
        assert_eq!((clock.now_ns(), clock.tsc()), (7, tsc));
    }

    #[test]
    fn time_never_goes_back_for_a_reader_of_a_clock_that_stops_and_starts() {
        let (clock, ended, reads) = (Clock::new(), AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut ns = 0;
                while !ended.load(Ordering::Relaxed) {
                    let now = clock.now_ns();
                    assert!(now >= ns, "{now} after {ns}");
                    ns = now;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut changes = 0;
            while changes < 2000 || reads.load(Ordering::Relaxed) < 2000 {
                clock.stop().unwrap();
                clock.start().unwrap();
                changes += 1;
            }
            ended.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn follower_hears_each_change_once() {
        #[derive(Default)]
        struct Heard(Mutex<Vec<&'static str>>);
        impl ClockFollower for Heard {
            fn stopped(&self) -> Result<(), EngineError> {
                self.0.lock().push("stopped");
                Ok(())
            }
            fn started(&self) -> Result<(), EngineError> {
                self.0.lock().push("started");
                Err(EngineError::Internal("no".into()))
            }
        }
        let (clock, heard) = (Clock::new(), Arc::new(Heard::default()));
        clock.set_follower(Arc::clone(&heard) as _);
        clock.start().unwrap();
        clock.stop().unwrap();
        clock.stop().unwrap();
        assert!(clock.start().is_err());
        assert!(!clock.stands());
        assert_eq!(*heard.0.lock(), ["stopped", "started"]);
    }
}
