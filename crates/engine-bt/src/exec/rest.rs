//! A machine at rest gives back the memory of its translations.
//!
//! Most of what is translated runs for a short time: a boot, the start of a program. Nobody
//! knows which of it runs again, but what a guest at rest still runs is little and soon
//! translated anew. So the cache is cleared when it has grown and the guest has rested for a
//! while, and while it has nothing to do.

use std::time::Duration;

/// How long a guest is looked at. In that time it rests but for one part in this many, and
/// translates no more than so many bytes.
const WINDOW: Duration = Duration::from_secs(5);
const BUSY_PART: u64 = 16;
const NEW_BYTES: u64 = 256 << 10;
/// What is worth giving back: some half a second of translating, and with all that is known
/// of it some two and a half times that memory.
const WORTH: u64 = 16 << 20;
/// No timer shall wait for it.
const UNDISTURBED: Duration = Duration::from_millis(200);

/// What a vCPU had done when the window began.
#[derive(Default)]
pub struct Rest {
    begin: Duration,
    halted: Duration,
    bytes: u64,
}

impl Rest {
    /// Whether to clear the cache at a halt. `timeout` is the time to the next timer, `halted`
    /// what the vCPU has rested in its life, `bytes` what the cache holds.
    pub fn is_long_enough(
        &mut self,
        now: Duration,
        timeout: Option<Duration>,
        halted: Duration,
        bytes: impl FnOnce() -> u64,
    ) -> bool {
        let window = now.saturating_sub(self.begin);
        if window < WINDOW || timeout.is_some_and(|timeout| timeout < UNDISTURBED) {
            return false;
        }
        let bytes = bytes();
        let before = std::mem::replace(self, Self { begin: now, halted, bytes });
        let busy = window.saturating_sub(halted.saturating_sub(before.halted));
        let new = bytes.saturating_sub(before.bytes);
        bytes >= WORTH
            && new <= NEW_BYTES
            && busy.as_nanos() * u128::from(BUSY_PART) <= window.as_nanos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MANY: u64 = 2 * WORTH;

    /// The answer at the end of a window in which the guest was busy and translated so much.
    fn asked(busy: Duration, from: u64, to: u64, timeout: Option<Duration>) -> bool {
        let mut rest = Rest::default();
        let (begin, end) = (100 * SECOND, 110 * SECOND);
        rest.is_long_enough(begin, None, SECOND, || from);
        rest.is_long_enough(end, timeout, SECOND + (end - begin) - busy, || to)
    }

    #[test]
    fn a_guest_that_rests_is_told_from_one_that_works() {
        let little = Duration::from_millis(100);
        assert!(asked(little, MANY, MANY, None));
        assert!(asked(little, MANY, MANY + NEW_BYTES, Some(SECOND)));
        assert!(!asked(SECOND, MANY, MANY, None), "it works");
        assert!(!asked(little, MANY, MANY + 2 * NEW_BYTES, None), "it runs new code");
        assert!(!asked(little, 0, WORTH / 2, None), "it has little");
        assert!(!asked(little, MANY, MANY, Some(little)), "a timer is due soon");
    }

    #[test]
    fn a_window_has_its_time() {
        let mut rest = Rest::default();
        assert!(!rest.is_long_enough(SECOND, None, SECOND, || MANY));
        assert!(!rest.is_long_enough(6 * SECOND, None, 6 * SECOND, || MANY), "it booted just now");
        assert!(!rest.is_long_enough(8 * SECOND, None, 8 * SECOND, || MANY));
        assert!(rest.is_long_enough(11 * SECOND, None, 11 * SECOND, || MANY));
    }
}
