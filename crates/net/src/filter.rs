//! A packet filter: somebody is asked once about each flow.
//!
//! The answer may take its time, and come from Python: a thread asks, frames of the flow
//! wait meanwhile, and the answer is kept.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tetrarch_io::Event;

use crate::watch::Watch;
use crate::{
    Counters, Direction, DropReason, Flow, Frame, Interest, NetBackend, Offload, Offloads, Packet,
    Payload, Sent,
};

/// Who decides about flows.
pub trait Judge: Send {
    /// Whether frames of a flow, and those that answer them, may pass. `direction` is that of
    /// its first frame.
    fn allows(&mut self, flow: &Flow, direction: Direction) -> bool;
}

/// Flows that are remembered. When there are more all are forgotten, and asked about again: a
/// guest can make up any number.
const MAX_FLOWS: usize = 1 << 16;
/// Frames that wait for answers.
const MAX_PARKED: usize = 256;
/// Questions that wait for the judge.
const MAX_QUESTIONS: usize = 1024;
/// Frames that are looked at for one that may pass, before it is the turn of others.
const TURN: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Asked,
    Yes,
    No,
}

struct Parked {
    direction: Direction,
    flow: Flow,
    offload: Offload,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Answers(Mutex<Vec<(Flow, bool)>>);

pub struct Filter {
    inner: Box<dyn NetBackend>,
    verdicts: FxHashMap<Flow, Verdict>,
    parked: VecDeque<Parked>,
    /// What may pass and waits for the guest, or for the back end.
    ready: VecDeque<Parked>,
    questions: SyncSender<(Flow, Direction)>,
    answers: Arc<Answers>,
    answered: Arc<Event>,
    watch: Watch,
    counters: Arc<Counters>,
    copy: Vec<u8>,
}

impl Filter {
    pub fn new(
        inner: Box<dyn NetBackend>,
        mut judge: Box<dyn Judge>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let watch = Watch::new()?;
        let answered = Arc::new(Event::new()?);
        watch.set(inner.event(), true, false);
        watch.set(&*answered, true, false);
        let answers = Arc::new(Answers::default());
        let (questions, asked) = mpsc::sync_channel::<(Flow, Direction)>(MAX_QUESTIONS);
        let (own_answers, own_event) = (Arc::clone(&answers), Arc::clone(&answered));
        // It ends with the filter, which nobody waits for: an answer may never come.
        std::thread::Builder::new().name("net-filter".into()).spawn(move || {
            while let Ok((flow, direction)) = asked.recv() {
                let yes = judge.allows(&flow, direction);
                own_answers.0.lock().push((flow, yes));
                own_event.signal();
            }
        })?;
        Ok(Self {
            inner,
            verdicts: FxHashMap::default(),
            parked: VecDeque::new(),
            ready: VecDeque::new(),
            questions,
            answers,
            answered,
            watch,
            counters,
            copy: Vec::new(),
        })
    }

    /// None: the frame may pass. Else what becomes of it.
    fn verdict(&mut self, bytes: &[u8], direction: Direction) -> Option<(Flow, Verdict)> {
        // Without ARP no flow begins, and what is no IP is no flow.
        let flow = Flow::of(bytes)?;
        let known = self.verdicts.get(&flow).or_else(|| self.verdicts.get(&flow.reversed()));
        if let Some(verdict) = known {
            return (*verdict != Verdict::Yes).then_some((flow, *verdict));
        }
        if self.verdicts.len() >= MAX_FLOWS {
            self.verdicts.retain(|_, verdict| *verdict == Verdict::Asked);
        }
        let verdict = match self.questions.try_send((flow, direction)) {
            Ok(()) => {
                self.verdicts.insert(flow, Verdict::Asked);
                Verdict::Asked
            }
            // Not remembered: it is asked about when the judge has caught up.
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Verdict::No,
        };
        Some((flow, verdict))
    }

    fn park(&mut self, parked: Parked) {
        if self.parked.len() >= MAX_PARKED {
            self.counters.dropped(parked.direction, DropReason::QueueFull);
        } else {
            self.parked.push_back(parked);
        }
    }

    /// Takes answers up, and the frames that waited for them.
    fn settle(&mut self) {
        if !self.answered.take() {
            return;
        }
        for (flow, yes) in std::mem::take(&mut *self.answers.0.lock()) {
            self.verdicts.insert(flow, if yes { Verdict::Yes } else { Verdict::No });
        }
        for parked in std::mem::take(&mut self.parked) {
            let known = self
                .verdicts
                .get(&parked.flow)
                .or_else(|| self.verdicts.get(&parked.flow.reversed()));
            match known {
                Some(Verdict::Yes) => self.ready.push_back(parked),
                Some(Verdict::Asked) => self.parked.push_back(parked),
                _ => self.counters.dropped(parked.direction, DropReason::Filtered),
            }
        }
        self.release();
    }

    /// Sends what may pass.
    fn release(&mut self) {
        let mut kept = VecDeque::new();
        let mut busy = false;
        for parked in std::mem::take(&mut self.ready) {
            let payload = Payload::Bytes(&parked.bytes);
            let packet = Packet { offload: parked.offload, payload };
            if parked.direction == Direction::Sent && !busy {
                busy = self.inner.send(&packet) == Sent::Busy;
                if !busy {
                    continue;
                }
            }
            kept.push_back(parked);
        }
        self.ready = kept;
        self.inner.flush();
    }
}

impl NetBackend for Filter {
    fn event(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        let waiting = self.ready.iter().any(|parked| parked.direction == Direction::Sent);
        self.inner.watch(Interest { send: interest.send || waiting, ..interest });
    }

    fn work(&mut self) {
        self.inner.work();
        self.settle();
        if !self.ready.is_empty() {
            self.release();
        }
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn accept(&mut self, offloads: Offloads) {
        self.inner.accept(offloads);
    }

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if !packet.is_sound() {
            return self.inner.send(packet);
        }
        // What is decided about is what is sent: the guest may change its own.
        let mut copy = std::mem::take(&mut self.copy);
        packet.copy_to(&mut copy);
        let offload = packet.offload;
        let sent = match self.verdict(&copy, Direction::Sent) {
            None => self.inner.send(&Packet { offload, payload: Payload::Bytes(&copy) }),
            Some((flow, Verdict::Asked)) => {
                let direction = Direction::Sent;
                self.park(Parked { direction, flow, offload, bytes: copy.clone() });
                Sent::Taken
            }
            Some(_) => {
                self.counters.dropped(Direction::Sent, DropReason::Filtered);
                Sent::Taken
            }
        };
        self.copy = copy;
        sent
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let waiting = self.ready.iter().position(|one| one.direction == Direction::Received);
        if let Some(parked) = waiting.and_then(|at| self.ready.remove(at)) {
            frame.set(parked.offload, &parked.bytes);
            return true;
        }
        for _ in 0..TURN {
            if !self.inner.receive(frame) {
                return false;
            }
            match self.verdict(frame.bytes(), Direction::Received) {
                None => return true,
                Some((flow, Verdict::Asked)) => {
                    let (direction, offload) = (Direction::Received, frame.offload);
                    self.park(Parked { direction, flow, offload, bytes: frame.bytes().to_vec() });
                }
                Some(_) => self.counters.dropped(Direction::Received, DropReason::Filtered),
            }
        }
        // The back end may have more, and not say so again.
        self.answered.signal();
        false
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
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::{Loopback, numbered, tcp4, tcp6, udp6};

    struct Ports(Arc<Mutex<Vec<Flow>>>);

    impl Judge for Ports {
        fn allows(&mut self, flow: &Flow, direction: Direction) -> bool {
            assert_eq!(direction, Direction::Sent);
            self.0.lock().push(*flow);
            flow.ports == Some((0x1000, 0x2000))
        }
    }

    fn made() -> (Filter, Arc<Mutex<Vec<Flow>>>, Arc<Counters>) {
        let (asked, counters) = (Arc::<Mutex<Vec<Flow>>>::default(), Arc::new(Counters::default()));
        let judge = Box::new(Ports(Arc::clone(&asked)));
        let filter = Filter::new(Box::new(Loopback::default()), judge, Arc::clone(&counters));
        (filter.unwrap(), asked, counters)
    }

    fn until(filter: &mut Filter, mut done: impl FnMut(&mut Filter) -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !done(filter) {
            assert!(Instant::now() < end, "no answer");
            filter.work();
            std::thread::yield_now();
        }
    }

    #[test]
    fn each_flow_is_asked_about_once_and_its_frames_wait_for_the_answer() {
        let (mut filter, asked, counters) = made();
        let mut frame = Frame::default();
        for _ in 0..3 {
            for bytes in [tcp4(10, 0), tcp6(10, 0), udp6(&[1]), numbered(1)] {
                assert_eq!(filter.send(&Packet::plain(&bytes)), Sent::Taken);
            }
        }
        let mut came = Vec::new();
        until(&mut filter, |filter| {
            while filter.receive(&mut frame) {
                came.push(frame.bytes().to_vec());
            }
            filter.parked.is_empty() && filter.ready.is_empty()
        });
        let count = |bytes: Vec<u8>| came.iter().filter(|one| **one == bytes).count();
        assert_eq!(came.len(), 9);
        assert_eq!((count(tcp4(10, 0)), count(tcp6(10, 0)), count(numbered(1))), (3, 3, 3));
        assert_eq!(counters.drops(Direction::Sent, DropReason::Filtered), 3);
        assert_eq!(asked.lock().len(), 3);
        let flow = asked.lock()[0];
        assert_eq!(flow.protocol, 6);
        assert_eq!(flow.source.to_string(), "10.0.0.1");
        assert_eq!(flow.destination.to_string(), "10.0.0.2");
    }

    #[test]
    fn answers_of_a_flow_pass_without_a_question() {
        let (mut filter, asked, _) = made();
        filter.send(&Packet::plain(&tcp4(1, 0)));
        until(&mut filter, |filter| filter.parked.is_empty());
        assert!(filter.receive(&mut Frame::default()));
        let mut answer = tcp4(1, 0);
        answer[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        answer[34..38].copy_from_slice(&[0x20, 0, 0x10, 0]);
        filter.send(&Packet::plain(&answer));
        let mut frame = Frame::default();
        assert!(filter.receive(&mut frame));
        assert_eq!(frame.bytes(), answer);
        assert_eq!(asked.lock().len(), 1);
    }

    #[test]
    fn guest_that_makes_up_flows_fills_nothing_without_end() {
        let (mut filter, _, counters) = made();
        let mut bytes = tcp4(1, 0);
        for number in 0..200_000_u32 {
            bytes[26..30].copy_from_slice(&number.to_be_bytes());
            filter.send(&Packet::plain(&bytes));
            assert!(filter.verdicts.len() <= MAX_FLOWS + 1);
            assert!(filter.parked.len() <= MAX_PARKED);
            if number % 64 == 0 {
                filter.work();
                while filter.receive(&mut Frame::default()) {}
            }
        }
        let dropped = counters.drops(Direction::Sent, DropReason::QueueFull)
            + counters.drops(Direction::Sent, DropReason::Filtered);
        assert!(dropped > 0);
    }

    #[test]
    fn frames_of_every_length_are_harmless() {
        let (mut filter, _, _) = made();
        for whole in [tcp4(20, 0), tcp6(20, 0), udp6(&[0; 9])] {
            for length in 0..whole.len() {
                filter.send(&Packet::plain(&whole[..length]));
                filter.work();
                while filter.receive(&mut Frame::default()) {}
            }
        }
    }
}
