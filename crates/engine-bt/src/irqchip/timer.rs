//! The local APIC's timer, Intel SDM volume 3A, 11.5.4: one-shot, periodic and TSC-deadline.
//!
//! The undivided clock is 1 GHz, so a tick is a nanosecond of the machine clock. Nothing counts:
//! the timer holds the time of its expiry, and the current count is computed from it.

/// Periods below this (in ns) expire in multiples of themselves, at least this far apart, so
/// that a guest cannot make the engine do nothing but expire its timer.
const MIN_PERIOD_NS: u64 = 20_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    /// Bits 17-18 of the LVT timer entry; the reserved value counts as one-shot.
    pub fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    /// Configuration: the rate of IA32_TSC_DEADLINE's clock.
    tsc_hz: u64,

    mode: Mode,
    initial: u32,
    divide: u32,
    expiry_ns: Option<u64>,
    tsc_deadline: u64,
}

impl Timer {
    pub fn new(tsc_hz: u64) -> Self {
        Self {
            tsc_hz: tsc_hz.max(1),
            mode: Mode::OneShot,
            initial: 0,
            divide: 0,
            expiry_ns: None,
            tsc_deadline: 0,
        }
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.tsc_hz);
    }

    /// log2 of the divisor: bits 0, 1 and 3 of the register, 111b meaning 1 (figure 11-10).
    fn shift(&self) -> u32 {
        ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7
    }

    fn period_ns(&self) -> u64 {
        (u64::from(self.initial) << self.shift()).max(1)
    }

    fn disarm(&mut self) {
        self.expiry_ns = None;
        self.tsc_deadline = 0;
    }

    pub fn set_mode(&mut self, mode: Mode) {
        // 11.5.4.1: a change to or from TSC-deadline mode disarms the timer.
        if (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline) {
            self.disarm();
            self.initial = 0;
        }
        self.mode = mode;
    }

    pub fn initial(&self) -> u32 {
        self.initial
    }

    pub fn set_initial(&mut self, value: u32, now_ns: u64) {
        if self.mode == Mode::TscDeadline {
            return;
        }
        self.initial = value;
        self.expiry_ns = (value != 0).then(|| now_ns.saturating_add(self.period_ns()));
    }

    pub fn divide(&self) -> u32 {
        self.divide
    }

    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        let left = u64::from(self.current(now_ns));
        self.divide = value & 0xb;
        if self.mode != Mode::TscDeadline && self.expiry_ns.is_some() {
            self.expiry_ns = Some(now_ns.saturating_add(left << self.shift()));
        }
    }

    /// The current count register.
    pub fn current(&self, now_ns: u64) -> u32 {
        let (Some(expiry), false) = (self.expiry_ns, self.mode == Mode::TscDeadline) else {
            return 0;
        };
        let mut left = expiry.saturating_sub(now_ns);
        if self.mode == Mode::Periodic {
            let period = self.period_ns();
            left = match now_ns.checked_sub(expiry) {
                Some(late) => period - late % period,
                None => (left - 1) % period + 1,
            };
        }
        u32::try_from(left.div_ceil(1 << self.shift())).unwrap_or(u32::MAX)
    }

    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Writes to the MSR are ignored outside TSC-deadline mode; 0 disarms.
    pub fn set_tsc_deadline(&mut self, value: u64, now_ns: u64, tsc: u64) {
        if self.mode != Mode::TscDeadline {
            return;
        }
        self.tsc_deadline = value;
        self.expiry_ns = (value != 0).then(|| self.estimate(now_ns, tsc));
    }

    fn estimate(&self, now_ns: u64, tsc: u64) -> u64 {
        let left = u128::from(self.tsc_deadline.saturating_sub(tsc));
        let ns = (left * 1_000_000_000).div_ceil(u128::from(self.tsc_hz));
        now_ns.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    pub fn expiry_ns(&self) -> Option<u64> {
        self.expiry_ns
    }

    /// True if the timer has expired since the last call. A periodic timer that expired often
    /// says so once and keeps its phase.
    pub fn expire(&mut self, now_ns: u64, tsc: u64) -> bool {
        let Some(expiry) = self.expiry_ns else {
            return false;
        };
        match self.mode {
            Mode::TscDeadline => {
                if tsc >= self.tsc_deadline {
                    self.disarm();
                    return true;
                }
                if now_ns >= expiry {
                    // The two clocks differ by rounding: never fire early by the guest's clock.
                    self.expiry_ns = Some(self.estimate(now_ns, tsc));
                }
                false
            }
            _ if now_ns < expiry => false,
            Mode::OneShot => {
                self.expiry_ns = None;
                true
            }
            Mode::Periodic => {
                let period = self.period_ns();
                let passed = (now_ns - expiry) / period;
                let stride = MIN_PERIOD_NS.div_ceil(period);
                self.expiry_ns =
                    Some(expiry.saturating_add((passed + stride).saturating_mul(period)));
                true
            }
        }
    }

    /// To the expiry; negative where it is overdue.
    pub fn left_ns(&self, now_ns: u64) -> Option<i64> {
        Some(self.expiry_ns?.wrapping_sub(now_ns) as i64)
    }

    /// A timer with these registers. Where the expiry is not known it follows
    /// from the current count.
    pub fn restored(
        tsc_hz: u64,
        mode: Mode,
        [initial, divide, current]: [u32; 3],
        (tsc_deadline, left_ns): (u64, Option<i64>),
        (now_ns, tsc): (u64, u64),
    ) -> Self {
        let mut timer =
            Self { mode, initial, divide: divide & 0xb, tsc_deadline, ..Self::new(tsc_hz) };
        timer.expiry_ns = match (left_ns, mode) {
            // Modulo 2^64 as it was taken. Only a TSC deadline can be so far ahead
            // that this wraps, and that one is judged by the TSC.
            (Some(left), _) => Some(now_ns.wrapping_add_signed(left)),
            (None, Mode::TscDeadline) => (tsc_deadline != 0).then(|| timer.estimate(now_ns, tsc)),
            (None, _) => {
                (current != 0).then(|| now_ns.saturating_add(u64::from(current) << timer.shift()))
            }
        };
        timer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisor_encoding() {
        let mut timer = Timer::new(1);
        let shifts = [0, 1, 2, 3, 8, 9, 10, 11].map(|value| {
            timer.set_divide(value, 0);
            timer.shift()
        });
        assert_eq!(shifts, [1, 2, 3, 4, 5, 6, 7, 0]);
    }

    #[test]
    fn one_shot_counts_down_and_expires_once() {
        let mut timer = Timer::new(1);
        timer.set_divide(3, 0); // by 16
        timer.set_initial(100, 1000);
        assert_eq!(timer.expiry_ns(), Some(2600));
        assert_eq!(timer.current(1000), 100);
        assert_eq!(timer.current(1800), 50);
        assert!(!timer.expire(2599, 0));
        assert!(timer.expire(2600, 0));
        assert!(!timer.expire(9999, 0));
        assert_eq!((timer.current(9999), timer.initial()), (0, 100));
    }

    #[test]
    fn periodic_coalesces_and_keeps_phase() {
        let mut timer = Timer::new(1);
        timer.set_divide(0xb, 0);
        timer.set_mode(Mode::Periodic);
        timer.set_initial(100_000, 50);
        assert!(timer.expire(100_050, 0));
        assert_eq!(timer.expiry_ns(), Some(200_050));
        assert!(timer.expire(777_777, 0));
        assert_eq!(timer.expiry_ns(), Some(800_050));
        // Read after the expiry but before it was noticed.
        assert_eq!(timer.current(800_051), 99_999);
    }

    #[test]
    fn tiny_period_is_thinned_but_counts_right() {
        let mut timer = Timer::new(1);
        timer.set_divide(0xb, 0);
        timer.set_mode(Mode::Periodic);
        timer.set_initial(3, 0);
        assert!(timer.expire(3, 0));
        assert!(timer.expiry_ns().is_some_and(|e| e >= 20_003));
        assert_eq!(timer.current(4), 2);
        assert_eq!(timer.current(6), 3);
    }

    #[test]
    fn tsc_deadline_fires_by_the_tsc() {
        let mut timer = Timer::new(3_000_000_000);
        timer.set_tsc_deadline(5, 0, 0);
        assert_eq!(timer.tsc_deadline(), 0);
        timer.set_mode(Mode::TscDeadline);
        timer.set_tsc_deadline(3_000_001, 1000, 3000);
        assert_eq!(timer.expiry_ns(), Some(1000 + 999_001));
        assert!(!timer.expire(1_000_001, 3_000_000));
        assert_eq!(timer.expiry_ns(), Some(1_000_002));
        assert!(timer.expire(1_000_002, 3_000_001));
        assert_eq!((timer.tsc_deadline(), timer.expiry_ns()), (0, None));
        timer.set_tsc_deadline(9, 0, 100);
        timer.set_mode(Mode::Periodic);
        assert_eq!(timer.expiry_ns(), None);
    }

    #[test]
    fn new_divisor_scales_what_is_left() {
        let mut timer = Timer::new(1);
        timer.set_divide(0xb, 0);
        timer.set_initial(1000, 0);
        timer.set_divide(0, 500);
        assert_eq!(timer.expiry_ns(), Some(1500));
        assert_eq!(timer.current(500), 500);
    }
}
