//! The one clock by which time reaches a machine.

use std::sync::Mutex;
use std::time::Instant;

/// Nanoseconds that the machine has run; it can stop and go on.
pub struct Clock {
    state: Mutex<State>,
}

struct State {
    /// Machine time when the clock last started or stopped.
    base_ns: u64,
    /// Since when it runs; `None` while it stands.
    since: Option<Instant>,
}

impl Clock {
    pub fn new() -> Self {
        Self { state: Mutex::new(State { base_ns: 0, since: Some(Instant::now()) }) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is two plain values: a panic elsewhere cannot leave it torn.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn now_ns(&self) -> u64 {
        self.state().now_ns()
    }

    pub fn stop(&self) {
        let mut state = self.state();
        state.base_ns = state.now_ns();
        state.since = None;
    }

    pub fn start(&self) {
        let mut state = self.state();
        if state.since.is_none() {
            state.since = Some(Instant::now());
        }
    }
}

impl State {
    fn now_ns(&self) -> u64 {
        let run = self.since.map_or(0, |since| since.elapsed().as_nanos() as u64);
        self.base_ns + run
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
    use std::time::Duration;

    #[test]
    fn stopped_clock_stands_and_goes_on_from_there() {
        let clock = Clock::new();
        clock.stop();
        let stopped = clock.now_ns();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now_ns(), stopped);
        clock.start();
        std::thread::sleep(Duration::from_millis(2));
        let later = clock.now_ns() - stopped;
        assert!(later >= 2_000_000, "{later}");
    }
}
