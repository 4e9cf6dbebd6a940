//! A slower and worse network: delay, loss and rate, each way for itself.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::watch::Watch;
use crate::{
    Counters, Direction, DropReason, Frame, Interest, NetBackend, Offload, Offloads, Packet,
    Payload, Sent,
};

/// What a shaper does to frames.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    pub delay: Duration,
    /// Of how many is lost: 0 to 1.
    pub loss: f64,
    /// Bits in a second; None: as many as there are.
    pub rate: Option<u64>,
    /// The same seed loses the same frames.
    pub seed: u64,
}

/// What waits because of the rate is sent within this time, or dropped: a router's queue.
const BACKLOG: Duration = Duration::from_millis(200);
/// Bytes that wait, whatever the reason.
const QUEUE_BYTES: usize = 16 << 20;
/// Frames that are taken in before those that are due are looked at.
const TURN: usize = 64;

/// splitmix64 (Vigna): good enough to lose frames by.
struct Random(u64);

impl Random {
    fn chance(&mut self, of: f64) -> bool {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^= value >> 31;
        // 53 bits are what an f64 has.
        ((value >> 11) as f64) < of * (1_u64 << 53) as f64
    }
}

struct Waiting {
    due: Instant,
    offload: Offload,
    bytes: Vec<u8>,
}

/// One way.
struct Line {
    shape: Shape,
    random: Random,
    /// When the line has sent what it was given.
    free: Instant,
    queue: VecDeque<Waiting>,
    bytes: usize,
}

impl Line {
    fn new(shape: Shape, seed: u64) -> Self {
        let random = Random(seed);
        Self { shape, random, free: Instant::now(), queue: VecDeque::new(), bytes: 0 }
    }

    /// Takes a frame of `length` bytes up, or says why it is dropped.
    fn admit(&mut self, now: Instant, length: usize) -> Result<Instant, DropReason> {
        if self.random.chance(self.shape.loss) {
            return Err(DropReason::Lost);
        }
        let start = self.free.max(now);
        let late = start - now > BACKLOG && !self.queue.is_empty();
        if late || self.bytes + length > QUEUE_BYTES {
            return Err(DropReason::QueueFull);
        }
        self.free = start;
        if let Some(rate) = self.shape.rate {
            let nanoseconds = length as u128 * 8 * 1_000_000_000 / u128::from(rate.max(1));
            self.free += Duration::from_nanos(nanoseconds as u64);
        }
        Ok(self.free + self.shape.delay)
    }

    fn put(&mut self, due: Instant, offload: Offload, bytes: Vec<u8>) {
        self.bytes += bytes.len();
        self.queue.push_back(Waiting { due, offload, bytes });
    }

    fn due(&self) -> Option<Instant> {
        self.queue.front().map(|waiting| waiting.due)
    }

    fn take(&mut self) {
        if let Some(taken) = self.queue.pop_front() {
            self.bytes -= taken.bytes.len();
        }
    }

    fn is_full(&self) -> bool {
        self.bytes >= QUEUE_BYTES / 2
    }
}

/// A back end behind a network of a shape.
pub struct Shaper {
    inner: Box<dyn NetBackend>,
    out: Line,
    back: Line,
    interest: Interest,
    /// The back end takes nothing at the moment.
    blocked: bool,
    /// It may have more frames, and not say so again.
    more: bool,
    watch: Watch,
    timer: OwnedFd,
    armed: Option<Instant>,
    counters: Arc<Counters>,
    frame: Frame,
}

impl Shaper {
    pub fn new(
        inner: Box<dyn NetBackend>,
        shape: Shape,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let watch = Watch::new()?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        watch.set(inner.event(), true, false);
        watch.set(&timer, true, false);
        Ok(Self {
            inner,
            out: Line::new(shape, shape.seed),
            back: Line::new(shape, !shape.seed),
            interest: Interest { receive: true, send: false },
            blocked: false,
            more: false,
            watch,
            timer,
            armed: None,
            counters,
            frame: Frame::default(),
        })
    }

    /// Sends what is due.
    fn release(&mut self) {
        let now = Instant::now();
        self.blocked = false;
        let mut sent = false;
        while let Some(first) = self.out.queue.front().filter(|first| first.due <= now) {
            let payload = Payload::Bytes(&first.bytes);
            if self.inner.send(&Packet { offload: first.offload, payload }) == Sent::Busy {
                self.blocked = true;
                break;
            }
            self.out.take();
            sent = true;
        }
        if sent {
            self.inner.flush();
        }
    }

    /// Takes in what has come.
    fn collect(&mut self) {
        self.more = true;
        for _ in 0..TURN {
            if self.back.is_full() {
                break;
            }
            if !self.inner.receive(&mut self.frame) {
                self.more = false;
                break;
            }
            let bytes = self.frame.bytes();
            match self.back.admit(Instant::now(), bytes.len()) {
                Ok(due) => self.back.put(due, self.frame.offload, bytes.to_vec()),
                Err(reason) => self.counters.dropped(Direction::Received, reason),
            }
        }
    }

    /// Sets timer and interest to what is waited for.
    fn rearm(&mut self) {
        let back = self.back.due().filter(|_| self.interest.receive);
        let out = self.out.due().filter(|_| !self.blocked);
        self.inner.watch(Interest { receive: !self.back.is_full(), send: self.blocked });
        let more = (self.more && !self.back.is_full()).then(Instant::now);
        let next = back.into_iter().chain(out).chain(more).min();
        if next == self.armed {
            return;
        }
        self.armed = next;
        // A timer of 0 would never ring.
        let wait = next.map_or(Duration::ZERO, |due| {
            due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1))
        });
        let it_value =
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let it_interval = Timespec::default();
        let setting = Itimerspec { it_interval, it_value };
        // Of a timer and a time that are sound.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
    }
}

impl NetBackend for Shaper {
    fn event(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        self.interest = interest;
        self.rearm();
    }

    fn work(&mut self) {
        if rustix::io::read(&self.timer, &mut [0; 8]).is_ok() {
            self.armed = None;
        }
        self.inner.work();
        self.release();
        self.collect();
        self.rearm();
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn accept(&mut self, offloads: Offloads) {
        self.inner.accept(offloads);
    }

    /// Never busy: what the line cannot take is dropped, as by a router.
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if !packet.is_sound() {
            return self.inner.send(packet);
        }
        match self.out.admit(Instant::now(), packet.len()) {
            Ok(due) => {
                let mut bytes = Vec::new();
                packet.copy_to(&mut bytes);
                self.out.put(due, packet.offload, bytes);
            }
            Err(reason) => self.counters.dropped(Direction::Sent, reason),
        }
        Sent::Taken
    }

    fn flush(&mut self) {
        self.release();
        self.inner.flush();
        self.rearm();
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let now = Instant::now();
        let Some(first) = self.back.queue.front().filter(|first| first.due <= now) else {
            self.rearm();
            return false;
        };
        frame.set(first.offload, &first.bytes);
        self.back.take();
        true
    }

    fn enable(&mut self, on: bool) {
        self.inner.enable(on);
    }

    fn link(&self) -> bool {
        self.inner.link()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loopback, number_of, numbered};

    fn shaper(shape: Shape) -> (Shaper, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let shaper = Shaper::new(Box::new(Loopback::default()), shape, Arc::clone(&counters));
        (shaper.unwrap(), counters)
    }

    /// Sends frames through the loop; the numbers of those that came back, and how long that
    /// took.
    fn run((shaper, counters): (&mut Shaper, &Counters), frames: u32) -> (Vec<u32>, Duration) {
        use rustix::event::{PollFd, PollFlags, poll};
        let start = Instant::now();
        for number in 0..frames {
            assert_eq!(shaper.send(&Packet::plain(&numbered(number))), Sent::Taken);
        }
        shaper.flush();
        let mut came = Vec::new();
        let mut frame = Frame::default();
        let dropped = || -> u64 {
            let stats = counters.stats();
            stats.iter().filter(|(name, _)| name.contains("dropped")).map(|(_, count)| count).sum()
        };
        while came.len() as u64 + dropped() < u64::from(frames) {
            let event = shaper.event();
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(ready, 1, "the timer never rang");
            shaper.work();
            while shaper.receive(&mut frame) {
                came.push(number_of(frame.bytes()));
            }
        }
        (came, start.elapsed())
    }

    #[test]
    fn delay_is_both_ways_and_keeps_the_order() {
        let delay = Duration::from_millis(30);
        let (mut shaper, counters) = shaper(Shape { delay, ..Shape::default() });
        let (came, took) = run((&mut shaper, &counters), 100);
        assert_eq!(came, Vec::from_iter(0..100));
        assert!(took >= 2 * delay, "{took:?}");
    }

    #[test]
    fn seed_says_which_frames_are_lost_and_all_are_accounted_for() {
        let lost = |seed| {
            let (mut shaper, counters) = shaper(Shape { loss: 0.1, seed, ..Shape::default() });
            let (came, _) = run((&mut shaper, &counters), 10_000);
            let out = counters.drops(Direction::Sent, DropReason::Lost);
            let back = counters.drops(Direction::Received, DropReason::Lost);
            assert_eq!(came.len() as u64 + out + back, 10_000);
            assert!((850..1150).contains(&out), "{out} of 10,000 at 10 %");
            assert!((750..1050).contains(&back), "{back} of some 9,000 at 10 %");
            came
        };
        assert_eq!(lost(1), lost(1));
        assert_ne!(lost(1), lost(2));
    }

    #[test]
    fn rate_is_kept_and_what_waits_too_long_is_dropped() {
        // A frame of 60 bytes takes 10 ms: of 100 the first 200 ms are taken.
        let (mut shaper, counters) = shaper(Shape { rate: Some(48_000), ..Shape::default() });
        let (came, took) = run((&mut shaper, &counters), 100);
        let dropped = counters.drops(Direction::Sent, DropReason::QueueFull);
        assert_eq!(came.len() as u64 + dropped, 100);
        assert!(came.len() >= 20, "{}", came.len());
        assert!(dropped >= 70, "{dropped}");
        assert!(took >= Duration::from_millis(10) * came.len() as u32, "{took:?}");
    }
}
