//! What the host's log hears of requests that fail.

use std::time::{Duration, Instant};

use crate::BlockError;

/// A guest can have requests fail as often as it likes, so that each cause is told again
/// after this time at the earliest.
const QUIET: Duration = Duration::from_secs(60);

/// The causes that were told of a disk. There are as many as there are errors of the host's.
#[derive(Debug, Default)]
pub struct Failures(Vec<(BlockError, Instant)>);

impl Failures {
    /// A failure of the host's is worth a line; a driver's nonsense is not.
    pub fn tell(&mut self, disk: &str, error: BlockError) {
        match error {
            BlockError::Beyond { .. } | BlockError::ReadOnly => log::debug!("{disk}: {error}"),
            error if self.is_due(error, Instant::now()) => {
                log::warn!("{disk}: a request failed: {error}");
            }
            _ => {}
        }
    }

    fn is_due(&mut self, error: BlockError, now: Instant) -> bool {
        match self.0.iter_mut().find(|(told, _)| *told == error) {
            Some((_, at)) if now.saturating_duration_since(*at) < QUIET => return false,
            Some((_, at)) => *at = now,
            None => self.0.push((error, now)),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_due_once_a_minute() {
        let mut failures = Failures::default();
        let start = Instant::now();
        for _ in 0..3 {
            let first = failures.0.is_empty();
            assert_eq!(failures.is_due(BlockError::NoSpace, start), first);
        }
        assert!(failures.is_due(BlockError::LostWrites, start), "another cause");
        let later = start + QUIET;
        assert!(!failures.is_due(BlockError::NoSpace, later - Duration::from_nanos(1)));
        assert!(failures.is_due(BlockError::NoSpace, later));
        assert!(!failures.is_due(BlockError::NoSpace, later));
        assert_eq!(failures.0.len(), 2);
    }
}
