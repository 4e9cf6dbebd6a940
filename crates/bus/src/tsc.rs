//! Time by the host's time-stamp counter: two reads around a device access
//! cost less than the access's lock, where a clock call costs more than both.

use std::time::Instant;

use tetrarch_engine::host_tsc;

/// Converts ticks to time, by the ratio seen since it was made: that needs no
/// knowledge of the frequency, and is the more exact the later it is asked.
pub struct TscScale {
    start: Instant,
    start_ticks: u64,
}

impl TscScale {
    pub fn new() -> Self {
        Self { start: Instant::now(), start_ticks: host_tsc() }
    }

    pub fn nanoseconds(&self, ticks_taken: u64) -> u64 {
        let elapsed_ns = self.start.elapsed().as_nanos();
        let elapsed_ticks = u128::from(host_tsc().saturating_sub(self.start_ticks).max(1));
        u64::try_from(u128::from(ticks_taken) * elapsed_ns / elapsed_ticks).unwrap_or(u64::MAX)
    }
}

impl Default for TscScale {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn scale_agrees_with_the_clock() {
        let scale = TscScale::new();
        let (clock, start) = (Instant::now(), host_tsc());
        std::thread::sleep(Duration::from_millis(20));
        let (measured, expected) = (scale.nanoseconds(host_tsc() - start), clock.elapsed());
        let ratio = measured as f64 / expected.as_nanos() as f64;
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }
}
