//! Interrupts: causes and their mask, and the timers that hold them back (manual, 13.4.17 to 13.4.21,
//! 13.4.30 and 13.4.44).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::Drive;

// Causes.
pub const TX_WRITTEN_BACK: u32 = 1 << 0;
pub const TX_QUEUE_EMPTY: u32 = 1 << 1;
pub const LINK_CHANGED: u32 = 1 << 2;
pub const RX_LOW: u32 = 1 << 4;
pub const RX_OVERRUN: u32 = 1 << 6;
pub const RX_TIMER: u32 = 1 << 7;
pub const TX_LOW: u32 = 1 << 15;
pub const RX_SMALL: u32 = 1 << 16;
/// All that there are.
const CAUSES: u32 = 0x0001_FFFF;

// Registers.
const ICR: u32 = 0x00C0;
const ITR: u32 = 0x00C4;
const ICS: u32 = 0x00C8;
const IMS: u32 = 0x00D0;
const IMC: u32 = 0x00D8;
const RDTR: u32 = 0x2820;
const RADV: u32 = 0x282C;
const TIDV: u32 = 0x3820;
const TADV: u32 = 0x382C;

const TIMER: u32 = 0xFFFF;
/// Of RDTR and TIDV: what waits is told at once.
const FLUSH: u32 = 1 << 31;
/// Units of the register that throttles, and of those that delay.
const THROTTLE_UNIT: Duration = Duration::from_nanos(256);
const DELAY_UNIT: Duration = Duration::from_nanos(1024);

/// Of what is delayed.
const RX: usize = 0;
const TX: usize = 1;

/// A cause that waits for more of its kind.
#[derive(Default)]
struct Delay {
    cause: u32,
    /// From the last event, 0: none is delayed; and from the first, 0: for ever.
    relative: u32,
    absolute: u32,
    first: Option<Instant>,
    due: Option<Instant>,
}

impl Delay {
    fn new(cause: u32) -> Self {
        Self { cause, ..Self::default() }
    }

    fn begin(&mut self, now: Instant) {
        let first = *self.first.get_or_insert(now);
        let last = now + DELAY_UNIT * self.relative;
        let most = (self.absolute != 0).then(|| first + DELAY_UNIT * self.absolute);
        self.due = Some(most.map_or(last, |most| last.min(most)));
    }

    /// Its cause, if it waited; it waits no more.
    fn end(&mut self) -> u32 {
        self.first = None;
        if self.due.take().is_some() { self.cause } else { 0 }
    }
}

struct State {
    causes: u32,
    mask: u32,
    /// Of the line.
    level: bool,
    interval: u32,
    /// The line is not raised again before.
    quiet: Option<Instant>,
    delays: [Delay; 2],
    armed: Option<Instant>,
}

impl State {
    fn new() -> Self {
        Self {
            causes: 0,
            mask: 0,
            level: false,
            interval: 0,
            quiet: None,
            delays: [Delay::new(RX_TIMER), Delay::new(TX_WRITTEN_BACK)],
            armed: None,
        }
    }
}

/// Causes, mask and timers as they are saved: ITR, RDTR, RADV, TIDV, TADV.
pub type Saved = [u32; 7];

/// Lock: `state`, under which the line is driven, so that levels come in their order.
pub struct Interrupts {
    state: Mutex<State>,
    line: Drive,
    timer: OwnedFd,
}

impl Interrupts {
    pub fn new(line: Drive) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { state: Mutex::new(State::new()), line, timer })
    }

    /// Ready when [`Interrupts::expire`] is due.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// None for a register that is none of them.
    pub fn read(&self, offset: u32) -> Option<u32> {
        let mut state = self.state.lock();
        let [rx, tx] = &state.delays;
        Some(match offset {
            ICR => {
                // Reading ends them (manual, 13.4.17).
                let causes = std::mem::take(&mut state.causes);
                self.update(&mut state);
                causes
            }
            ITR => state.interval,
            ICS => state.causes,
            IMS => state.mask,
            IMC => 0,
            RDTR => rx.relative,
            RADV => rx.absolute,
            TIDV => tx.relative,
            TADV => tx.absolute,
            _ => return None,
        })
    }

    /// Whether it was one of them.
    pub fn write(&self, offset: u32, value: u32) -> bool {
        let mut state = self.state.lock();
        match offset {
            ICR => state.causes &= !value,
            ITR => {
                state.interval = value & TIMER;
                state.quiet = None;
            }
            ICS => state.causes |= value & CAUSES,
            IMS => state.mask |= value & CAUSES,
            IMC => state.mask &= !value,
            RDTR | TIDV => {
                let delay = &mut state.delays[if offset == RDTR { RX } else { TX }];
                delay.relative = value & TIMER;
                if value & FLUSH != 0 || delay.relative == 0 {
                    let cause = delay.end();
                    state.causes |= cause;
                }
            }
            RADV => state.delays[RX].absolute = value & TIMER,
            TADV => state.delays[TX].absolute = value & TIMER,
            _ => return false,
        }
        self.update(&mut state);
        true
    }

    pub fn raise(&self, causes: u32) {
        if causes != 0 {
            let mut state = self.state.lock();
            state.causes |= causes;
            self.update(&mut state);
        }
    }

    /// Frames were stored, with what else is to be said.
    pub fn received(&self, others: u32) {
        self.happened(RX, others, true);
    }

    /// Descriptors were written back; `delayed` if their driver has asked for nothing else.
    pub fn sent(&self, others: u32, delayed: bool) {
        self.happened(TX, others, delayed);
    }

    fn happened(&self, which: usize, others: u32, delayed: bool) {
        let mut state = self.state.lock();
        let delay = &mut state.delays[which];
        let mut causes = others;
        if delayed && delay.relative != 0 {
            delay.begin(Instant::now());
        } else {
            delay.end();
            causes |= delay.cause;
        }
        state.causes |= causes;
        self.update(&mut state);
    }

    /// A timer has run out.
    pub fn expire(&self) {
        let mut state = self.state.lock();
        if rustix::io::read(&self.timer, &mut [0; 8]).is_ok() {
            state.armed = None;
        }
        let now = Instant::now();
        let due = |delay: &&mut Delay| delay.due.is_some_and(|due| due <= now);
        let causes =
            state.delays.iter_mut().filter(due).map(Delay::end).fold(0, |all, one| all | one);
        state.causes |= causes;
        self.update(&mut state);
    }

    /// Lets the line and the timer be as the rest says.
    fn update(&self, state: &mut State) {
        let wanted = state.causes & state.mask != 0;
        let mut waits = None;
        if wanted && !state.level {
            let now = (state.interval != 0).then(Instant::now);
            waits = state.quiet.filter(|&quiet| now.is_some_and(|now| now < quiet));
            if waits.is_none() {
                state.quiet = now.map(|now| now + THROTTLE_UNIT * state.interval);
                state.level = true;
                (self.line)(true);
            }
        } else if !wanted && state.level {
            state.level = false;
            (self.line)(false);
        }
        let next = state.delays.iter().filter_map(|delay| delay.due).chain(waits).min();
        // One that rings too early looks again.
        if let Some(next) = next
            && state.armed.is_none_or(|armed| next < armed)
        {
            state.armed = Some(next);
            self.arm(next);
        }
    }

    fn arm(&self, at: Instant) {
        // A timer of 0 would never ring.
        let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let setting = Itimerspec { it_interval: Timespec::default(), it_value };
        // Of a timer and a time that are sound.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
    }

    /// Nothing is due any more, and all are masked.
    pub fn reset(&self) {
        self.load([0; 7]);
    }

    /// What is delayed is told to whoever loads it.
    pub fn save(&self) -> Saved {
        let state = self.state.lock();
        let [rx, tx] = &state.delays;
        let waiting = [rx, tx].into_iter().filter(|delay| delay.due.is_some());
        let causes = waiting.fold(state.causes, |all, delay| all | delay.cause);
        [causes, state.mask, state.interval, rx.relative, rx.absolute, tx.relative, tx.absolute]
    }

    pub fn load(&self, saved: Saved) {
        let [causes, mask, interval, rdtr, radv, tidv, tadv] = saved;
        let mut state = self.state.lock();
        let (level, armed) = (state.level, state.armed);
        *state = State { level, armed, ..State::new() };
        state.causes = causes & CAUSES;
        state.mask = mask & CAUSES;
        state.interval = interval & TIMER;
        for (delay, (relative, absolute)) in
            state.delays.iter_mut().zip([(rdtr, radv), (tidv, tadv)])
        {
            (delay.relative, delay.absolute) = (relative & TIMER, absolute & TIMER);
        }
        self.update(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Interrupts, and how often their line rose.
    fn interrupts() -> (Interrupts, Arc<AtomicU32>) {
        let raised = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&raised);
        let line = move |level| {
            count.fetch_add(u32::from(level), Ordering::SeqCst);
        };
        (Interrupts::new(Box::new(line)).unwrap(), raised)
    }

    fn wait(interrupts: &Interrupts, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_micros(100));
            interrupts.expire();
        }
    }

    #[test]
    fn causes_that_are_not_masked_raise_the_line_until_they_are_read() {
        let (interrupts, raised) = interrupts();
        interrupts.raise(LINK_CHANGED);
        assert_eq!(raised.load(Ordering::SeqCst), 0);
        assert_eq!(interrupts.read(ICS), Some(LINK_CHANGED));
        assert!(interrupts.write(IMS, u32::MAX));
        assert_eq!(interrupts.read(IMS), Some(CAUSES));
        interrupts.raise(RX_LOW);
        assert_eq!(raised.load(Ordering::SeqCst), 1, "it is high");
        assert_eq!(interrupts.read(ICR), Some(LINK_CHANGED | RX_LOW));
        assert_eq!(interrupts.read(ICR), Some(0));
        interrupts.write(ICS, RX_LOW | LINK_CHANGED);
        assert_eq!(raised.load(Ordering::SeqCst), 2);
        interrupts.write(ICR, RX_LOW);
        interrupts.write(IMC, LINK_CHANGED);
        interrupts.write(IMS, LINK_CHANGED);
        assert_eq!(raised.load(Ordering::SeqCst), 3);
        assert_eq!((interrupts.read(ICR), interrupts.read(0xE0)), (Some(LINK_CHANGED), None));
        assert!(!interrupts.write(0xE0, 1));
    }

    #[test]
    fn line_rises_no_more_often_than_the_driver_wants() {
        let (interrupts, raised) = interrupts();
        interrupts.write(IMS, RX_LOW);
        interrupts.write(ITR, 0xFFFF); // 16.8 ms
        interrupts.raise(RX_LOW);
        let start = Instant::now();
        interrupts.read(ICR);
        interrupts.raise(RX_LOW);
        if start.elapsed() < Duration::from_millis(10) {
            assert_eq!(raised.load(Ordering::SeqCst), 1);
        }
        wait(&interrupts, || raised.load(Ordering::SeqCst) == 2);
        assert!(start.elapsed() >= Duration::from_millis(15));
        // Without the register at once.
        interrupts.read(ICR);
        interrupts.raise(RX_LOW);
        interrupts.write(ITR, 0);
        assert_eq!(raised.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn frames_wait_for_others_but_not_for_ever() {
        let (interrupts, _) = interrupts();
        interrupts.write(RDTR, 0xFFFF); // 67 ms
        interrupts.write(RADV, 20_000); // 20 ms
        let start = Instant::now();
        interrupts.received(0);
        if start.elapsed() < Duration::from_millis(10) {
            assert_eq!(interrupts.read(ICS), Some(0));
        }
        assert_eq!(interrupts.save()[0], RX_TIMER, "it is told to whoever goes on");
        wait(&interrupts, || {
            interrupts.received(0);
            interrupts.read(ICR) == Some(RX_TIMER)
        });
        assert!(start.elapsed() >= Duration::from_millis(20));
        // At once where the driver says so, or delays none any more.
        interrupts.received(RX_LOW);
        assert_eq!(interrupts.read(ICR), Some(RX_LOW));
        interrupts.write(RDTR, FLUSH | 0xFFFF);
        assert_eq!(interrupts.read(ICR), Some(RX_TIMER));
        interrupts.received(0);
        interrupts.write(RDTR, 0);
        assert_eq!(interrupts.read(ICR), Some(RX_TIMER));
        interrupts.write(TIDV, 0xFFFF);
        interrupts.sent(TX_QUEUE_EMPTY, true);
        assert_eq!(interrupts.read(ICR), Some(TX_QUEUE_EMPTY));
        interrupts.sent(0, false);
        assert_eq!(interrupts.read(ICR), Some(TX_WRITTEN_BACK));
        assert_eq!(interrupts.save(), [0, 0, 0, 0, 20_000, 0xFFFF, 0]);
    }
}
