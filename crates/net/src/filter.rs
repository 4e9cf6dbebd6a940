//! A packet filter: somebody says yes or no to each new flow, once.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Flow, Frame, NetBackend, Offload, Offloads, SendError};

/// What is said to a flow; `from_guest`: its first packet was the guest's.
pub type Verdict = Box<dyn FnMut(&Flow, bool) -> bool + Send>;

/// Flows that are remembered: beyond, all are forgotten and asked for anew, so that a guest
/// which makes ever new ones costs no memory.
const REMEMBERED: usize = 1 << 16;

/// A network of which flows are allowed one by one. What is no IP (ARP) passes.
pub struct Filter {
    inner: Box<dyn NetBackend>,
    verdict: Verdict,
    known: HashMap<Flow, bool>,
    dropped: Arc<AtomicU64>,
}

impl Filter {
    pub fn new(inner: Box<dyn NetBackend>, verdict: Verdict) -> Self {
        Self { inner, verdict, known: HashMap::new(), dropped: Arc::default() }
    }

    /// How many frames were not let through.
    pub fn dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped)
    }

    fn passes(&mut self, data: &[u8], from_guest: bool) -> bool {
        let Some(flow) = Flow::of(data) else { return true };
        // Both ways of a conversation are one.
        let key = if from_guest { flow } else { flow.reversed() };
        let passes = match self.known.get(&key) {
            Some(&known) => known,
            None => {
                if self.known.len() >= REMEMBERED {
                    self.known.clear();
                }
                let said = (self.verdict)(&flow, from_guest);
                self.known.insert(key, said);
                said
            }
        };
        if !passes {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        passes
    }
}

impl NetBackend for Filter {
    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        while self.inner.receive(frame)? {
            if self.passes(&frame.data, false) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError> {
        if self.passes(data, true) { self.inner.send(offload, data) } else { Ok(()) }
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
        self.inner.tick();
    }

    fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.inner.timer()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::testing::{Loop, received, tcp};

    #[test]
    fn each_flow_is_asked_for_once_and_its_answers_belong_to_it() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let verdict = Box::new(move |flow: &Flow, _: bool| {
            log.lock().unwrap().push(flow.destination_port);
            flow.destination_port == 80
        });
        let mut net = Filter::new(Box::new(Loop::new()), verdict);
        let dropped = net.dropped();
        for _ in 0..3 {
            net.send(&Offload::default(), &tcp(1000, 80)).unwrap();
            net.send(&Offload::default(), &tcp(1000, 25)).unwrap();
        }
        net.send(&Offload::default(), b"no IP at all, long enough").unwrap();
        // The loop gives back what was sent: from the network it is the same flow's other
        // way only with addresses exchanged, so it is new.
        assert_eq!(*asked.lock().unwrap(), [80, 25]);
        assert_eq!(dropped.load(Ordering::Relaxed), 3);
        let mut back = Filter::new(Box::new(Loop::new()), Box::new(|_, from_guest| from_guest));
        back.inner.send(&Offload::default(), &tcp(80, 1000)).unwrap();
        assert!(received(&mut back).is_empty(), "begun by the network");
        back.send(&Offload::default(), &tcp(7, 9)).unwrap();
        back.inner.send(&Offload::default(), &tcp_back(7, 9)).unwrap();
        assert!(received(&mut back).contains(&tcp_back(7, 9)), "an answer");
    }

    /// The answer to `tcp(source, destination)`.
    fn tcp_back(source: u16, destination: u16) -> Vec<u8> {
        let mut frame = tcp(destination, source);
        frame[26..34].rotate_left(4);
        frame
    }
}
