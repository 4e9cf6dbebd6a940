//! A worse network, for tests: delay, loss and a limited rate, on both ways.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::{Frame, NetBackend, Offload, Offloads, SendError};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shaping {
    /// Of each frame, one way.
    pub delay: Duration,
    /// The share of frames that is lost, 0 to 1.
    pub loss: f64,
    /// Bytes a second, each way; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Which frames are lost follows from it.
    pub seed: u64,
}

/// Frames on their way in one direction.
#[derive(Default)]
struct Way {
    queue: VecDeque<(Instant, Frame)>,
    bytes: usize,
    /// When the last one that was accepted has left, at the limited rate.
    free: Option<Instant>,
}

/// What waits in one way at most; further frames are lost, as in a router.
const QUEUE_BYTES: usize = 4 << 20;

impl Way {
    fn take(&mut self, shaping: &Shaping, frame: Frame) -> bool {
        if self.bytes + frame.data.len() > QUEUE_BYTES {
            return false;
        }
        let now = Instant::now();
        let mut at = now;
        if let Some(rate) = shaping.rate {
            let time = Duration::from_secs_f64(frame.data.len() as f64 / rate.max(1) as f64);
            at = self.free.map_or(now, |free| free.max(now)) + time;
            self.free = Some(at);
        }
        self.bytes += frame.data.len();
        self.queue.push_back((at + shaping.delay, frame));
        true
    }

    fn due(&self) -> Option<Instant> {
        self.queue.front().map(|&(at, _)| at)
    }

    fn next(&mut self, now: Instant) -> Option<Frame> {
        if self.due()? > now {
            return None;
        }
        let (_, frame) = self.queue.pop_front()?;
        self.bytes -= frame.data.len();
        Some(frame)
    }
}

pub struct Shaper {
    inner: Box<dyn NetBackend>,
    shaping: Shaping,
    timer: OwnedFd,
    random: u64,
    to_guest: Way,
    to_network: Way,
}

impl Shaper {
    pub fn new(inner: Box<dyn NetBackend>, shaping: Shaping) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            inner,
            shaping,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            // Any but 0, of which xorshift makes nothing else.
            random: shaping.seed ^ 0x9E37_79B9_7F4A_7C15 | 1,
            to_guest: Way::default(),
            to_network: Way::default(),
        })
    }

    fn loses(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 11) as f64 / (1_u64 << 53) as f64) < self.shaping.loss
    }

    fn arm(&self) {
        let due = [self.to_guest.due(), self.to_network.due()].into_iter().flatten().min();
        let wait = due.map_or(Duration::ZERO, |at| {
            // 0 would disarm it.
            at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1))
        });
        let value = Timespec {
            tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // Fails only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

impl NetBackend for Shaper {
    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        while self.inner.receive(frame)? {
            if !self.loses() {
                self.to_guest.take(&self.shaping, frame.clone());
            }
        }
        let next = self.to_guest.next(Instant::now());
        self.arm();
        Ok(next.map(|next| *frame = next).is_some())
    }

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError> {
        if !self.loses() {
            let frame = Frame { offload: *offload, data: data.to_vec() };
            self.to_network.take(&self.shaping, frame);
            self.tick();
        }
        Ok(())
    }

    fn want_room(&mut self, wanted: bool) {
        self.inner.want_room(wanted);
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn accept(&mut self, offloads: Offloads) -> io::Result<()> {
        self.inner.accept(offloads)
    }

    fn tick(&mut self) {
        // What it was set for is done below.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.inner.tick();
        let now = Instant::now();
        while let Some(frame) = self.to_network.next(now) {
            // A network that is full loses it: nothing waits twice.
            let _ = self.inner.send(&frame.offload, &frame.data);
        }
        self.arm();
    }

    fn timer(&self) -> Option<BorrowedFd<'_>> {
        Some(self.timer.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, received};

    fn through(shaping: Shaping, frames: usize) -> (Vec<Vec<u8>>, Duration) {
        let mut net = Shaper::new(Box::new(Loop::new()), shaping).unwrap();
        let start = Instant::now();
        for index in 0..frames {
            net.send(&Offload::default(), &[index as u8; 1000]).unwrap();
        }
        let mut got = Vec::new();
        let mut quiet = Instant::now();
        while quiet.elapsed() < Duration::from_millis(150) {
            net.tick();
            let more = received(&mut net);
            if !more.is_empty() {
                quiet = Instant::now();
            }
            got.extend(more);
        }
        (got, start.elapsed())
    }

    #[test]
    fn frames_come_later_and_in_their_order() {
        let delay = Duration::from_millis(30);
        let (got, took) = through(Shaping { delay, ..Shaping::default() }, 10);
        assert_eq!(
            got.iter().map(|frame| frame[0]).collect::<Vec<_>>(),
            (0..10).collect::<Vec<_>>()
        );
        assert!(took >= 2 * delay, "both ways");
        let rate = Some(100_000);
        let (got, took) = through(Shaping { rate, ..Shaping::default() }, 10);
        assert_eq!(got.len(), 10);
        assert!(took >= Duration::from_millis(100), "10,000 bytes at 100,000 a second");
    }

    #[test]
    fn loss_is_what_was_asked_and_the_same_for_a_seed() {
        let lossy = |seed| through(Shaping { loss: 0.3, seed, ..Shaping::default() }, 400).0;
        let got = lossy(7);
        // Of 400 that are lost at 0.3 twice, about 196 arrive.
        assert!((120..280).contains(&got.len()), "{}", got.len());
        assert!(got == lossy(7));
        assert!(got != lossy(8));
        assert!(through(Shaping { loss: 1.0, ..Shaping::default() }, 50).0.is_empty());
    }
}
