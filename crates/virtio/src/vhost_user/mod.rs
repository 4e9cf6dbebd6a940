//! A device whose queues another process serves: a back end, by vhost-user.
//!
//! The back end does not see the driver's rings. It has split rings of its own, in memory that
//! is shared with it beside the guest's, into which the driver's chains are put once they were
//! checked, and from which they go back to the driver. So its writes to guest memory, which
//! nobody else sees, are told to the observers before the driver can learn that they are there:
//! a vCPU that looks into a used ring without an interrupt would else run code that was
//! translated from what was at that place before. And what it says of chains is checked.

mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tetrarch_io::{Attachment, Event, Trigger};
use tetrarch_memory::{GuestMemory, MemoryError};
use tetrarch_vhost_user::{BackEndError, Frontend, MemoryRegion, VERSION_1, VringSetup};

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError, Used};
use crate::queues::Queues;
use ring::DriverRing;

/// The back end's address of the rings' memory: above all that a guest can have.
const RINGS: u64 = 1 << 47;

/// Feature bits that are a kind's own (virtio 1.2, 2.2); the others are of rings and transports,
/// and so ours.
const KIND_FEATURES: u64 = ((1 << 24) - 1) | !((1 << 50) - 1);

/// How long a back end may work on requests that are to end, beside what it may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Descriptors of ours: the call of each queue, and behind them the socket.
const CALLS: u32 = OWN_SOURCES;

/// What the driver is told by the device where its back end is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Status VIRTIO_BLK_S_IOERR (5.2.6).
    Blk,
    /// FUSE's error EIO.
    Fs,
    /// Packets are lost; buffers for those that come stay where they are.
    Net,
}

/// One queue of the back end.
struct Lane {
    ring: DriverRing,
    kick: Event,
    call: Event,
    /// Chains that the back end has, by their heads,
    flight: Vec<Option<Chain>>,
    /// and how many of them are requests: the others wait for the world.
    requests: usize,
    running: bool,
    /// Where the back end goes on in the available ring.
    base: u16,
}

/// The data path: chains to the back end, and back.
pub struct VhostUser {
    served: Served,
    memory: Arc<GuestMemory>,
    rings: GuestMemory,
    lanes: Vec<Lane>,
    /// None: it is gone, for the reason below.
    back_end: Option<Frontend>,
    trouble: Option<String>,
    features: u64,
    /// The regions that the back end knows, and that it knows the features; None: not yet.
    told: Option<u64>,
    /// Our descriptors are with the I/O thread.
    watched: bool,
}

/// Why there is no data path.
#[derive(Debug, thiserror::Error)]
pub enum NotMade {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl VhostUser {
    pub fn new(
        served: Served,
        memory: Arc<GuestMemory>,
        back_end: Frontend,
        queues: usize,
    ) -> Result<Self, NotMade> {
        let rings = GuestMemory::new(ring::BYTES * queues as u64)?;
        let lane = |index: u64| -> Result<Lane, NotMade> {
            Ok(Lane {
                ring: DriverRing::new(&rings, ring::BYTES * index)?,
                kick: Event::new()?,
                call: Event::new()?,
                flight: std::iter::repeat_with(|| None).take(ring::SIZE.into()).collect(),
                requests: 0,
                running: false,
                base: 0,
            })
        };
        let lanes = (0..queues as u64).map(lane).collect::<Result<_, _>>()?;
        Ok(Self {
            served,
            memory,
            rings,
            lanes,
            back_end: Some(back_end),
            trouble: None,
            features: 0,
            told: None,
            watched: false,
        })
    }

    /// Whether the back end is there.
    pub fn alive(&self) -> bool {
        self.back_end.is_some()
    }

    /// Hangs up, when the machine has ended.
    pub fn close(&mut self) {
        self.back_end = None;
        self.lanes.iter_mut().for_each(|lane| drop(lane.forget()));
    }

    /// The back end is of no use any more: its chains go back to the driver with an error.
    fn lose(&mut self, queues: &mut Queues, cause: impl std::fmt::Display) {
        if self.back_end.take().is_some() {
            self.trouble = Some(format!("the back end {cause}"));
        }
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            lane.running = false;
            if self.served == Served::Net && is_receive(index) {
                continue;
            }
            for chain in lane.forget() {
                let (used, written) = refuse(self.served, chain);
                queues.push(index, used, written);
            }
            queues.interrupt(index);
        }
    }

    /// Says which features and which memory are in use. Nothing runs.
    fn tell(&mut self) -> Result<(), BackEndError> {
        let Some(back_end) = &self.back_end else { return Ok(()) };
        back_end.set_features(self.features & back_end.features() & KIND_FEATURES | VERSION_1)?;
        // Before the regions: of two that follow each other the later one counts.
        let generation = self.memory.generation();
        let (guest, rings) = (self.memory.ram(), self.rings.regions());
        let shifted = rings.iter().map(|region| (RINGS, region));
        let all = guest.iter().map(|region| (0, region)).chain(shifted);
        let regions: Vec<_> = all
            .filter_map(|(shift, region)| {
                let file = region.file()?;
                Some(MemoryRegion {
                    guest: region.start.0 + shift,
                    length: region.len,
                    file: file.file().as_fd(),
                    offset: file.start(),
                })
            })
            .collect();
        back_end.set_memory(&regions)?;
        self.told = Some(generation);
        Ok(())
    }

    fn run(&mut self, index: usize) -> Result<(), BackEndError> {
        if self.told.is_none() {
            self.tell()?;
        }
        let (Some(back_end), lane) = (&self.back_end, &mut self.lanes[index]) else {
            return Ok(());
        };
        let at = RINGS + ring::BYTES * index as u64;
        let setup = VringSetup {
            size: ring::SIZE,
            base: lane.base,
            descriptors: at,
            available: at + ring::AVAILABLE,
            used: at + ring::USED,
            kick: lane.kick.as_fd(),
            call: lane.call.as_fd(),
        };
        back_end.start_queue(index, &setup)?;
        lane.running = true;
        // For what is in the ring already.
        lane.kick.signal();
        Ok(())
    }

    /// Brings all to where the driver and its machine are: RAM may have come or gone.
    fn catch_up(&mut self, queues: &mut Queues, index: usize) -> Result<(), BackEndError> {
        if self.told.is_some_and(|generation| generation != self.memory.generation()) {
            let running: Vec<_> =
                (0..self.lanes.len()).filter(|&index| self.lanes[index].running).collect();
            running.iter().for_each(|&index| self.withdraw(queues, index));
            self.told = None;
            running.iter().try_for_each(|&index| self.run(index))?;
        }
        if self.lanes[index].running { Ok(()) } else { self.run(index) }
    }

    /// Gives the back end the chains that there are. Of those that go back to the driver at once,
    /// for there is nothing in them, it is the turn of others on the thread after a queue full.
    fn give(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let lane = &mut self.lanes[index];
        let mut added = false;
        let mut left = queues.size(index);
        let result = loop {
            if left == 0 {
                queues.serve_again(index);
                break Ok(());
            }
            left -= 1;
            let chain = match queues.take(index) {
                Ok(Some(chain)) => chain,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            // RAM that came since the back end was told of all: the chain may be in it.
            if self.told != Some(self.memory.generation()) {
                queues.put_back(index, chain.used);
                queues.serve_again(index);
                break Ok(());
            }
            if let Some(head) = lane.ring.add(&chain) {
                lane.requests += usize::from(is_request(&chain));
                lane.flight[usize::from(head)] = Some(chain);
                added = true;
            } else if chain.readable.is_empty() && chain.writable.is_empty() {
                queues.push(index, chain.used, 0);
                queues.interrupt(index);
            } else if lane.flight.iter().all(Option::is_none) {
                // It would never have room: its buffers lie across regions of memory.
                break Err(QueueError::TooLong);
            } else {
                queues.put_back(index, chain.used);
                break Ok(());
            }
        };
        if added && lane.ring.publish() {
            lane.kick.signal();
        }
        result
    }

    /// Takes what the back end has done, and gives it to the driver if there still is one.
    fn collect(
        &mut self,
        mut queues: Option<&mut Queues>,
        index: usize,
    ) -> Result<(), ring::RingError> {
        let lane = &mut self.lanes[index];
        let mut returned = false;
        let result = loop {
            let (head, written) = match lane.ring.take() {
                Ok(Some(done)) => done,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let Some(chain) = lane.flight[usize::from(head)].take() else { continue };
            lane.requests -= usize::from(is_request(&chain));
            // All that it could write, whatever it says.
            let room = chain.writable.len();
            chain.writable.written(room);
            if let Some(queues) = &mut queues {
                queues.push(index, chain.used, written.min(room as u32));
                returned = true;
            }
        };
        if returned && let Some(queues) = queues {
            queues.interrupt(index);
        }
        result
    }

    /// Waits until the back end has no request of a queue any more, and stops it.
    fn stop(&mut self, mut queues: Option<&mut Queues>, index: usize) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.lanes[index].call.take();
            self.collect(queues.as_deref_mut(), index).map_err(|error| error.to_string())?;
            let lane = &self.lanes[index];
            if lane.requests == 0 {
                break;
            }
            let Some(back_end) = &self.back_end else { return Ok(()) };
            back_end.check().map_err(|error| error.to_string())?;
            let late = || format!("has not done a request within {} s", PATIENCE.as_secs());
            let left = deadline.checked_duration_since(Instant::now()).ok_or_else(late)?;
            let mut ready = [&lane.call.as_fd(), &back_end.as_fd()]
                .map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN));
            // Interrupted, or too late: the next round sees.
            let _ = poll(&mut ready, Some(&Timespec::try_from(left).unwrap_or_default()));
        }
        let Some(back_end) = &self.back_end else { return Ok(()) };
        let base = back_end.stop_queue(index).map_err(|error| error.to_string())?;
        self.collect(queues, index).map_err(|error| error.to_string())?;
        let lane = &mut self.lanes[index];
        (lane.base, lane.running) = (base, false);
        // What of the others it has begun to write.
        lane.flight.iter().flatten().for_each(|chain| chain.writable.written(chain.writable.len()));
        Ok(())
    }
}

impl Lane {
    /// Takes all chains from the back end, which will not touch them any more.
    fn forget(&mut self) -> Vec<Chain> {
        let chains: Vec<_> = self.flight.iter_mut().filter_map(Option::take).collect();
        chains.iter().for_each(|chain| chain.writable.written(chain.writable.len()));
        self.ring.reset();
        (self.requests, self.running, self.base) = (0, false, 0);
        chains
    }
}

impl DataPath for VhostUser {
    fn start(&mut self, features: u64, io: &Attachment) -> io::Result<()> {
        self.features = features;
        self.told = None;
        if let Some(back_end) = &self.back_end
            && !self.watched
        {
            for (source, lane) in (CALLS..).zip(&self.lanes) {
                io.add(&lane.call, source, Trigger::Readable)?;
            }
            io.add(back_end, CALLS + self.lanes.len() as u32, Trigger::Readable)?;
            self.watched = true;
        }
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        if queues.quiet || !queues.is_enabled(index) {
            return Ok(());
        }
        if self.back_end.is_some()
            && let Err(error) = self.catch_up(queues, index)
        {
            self.lose(queues, error);
        }
        if self.back_end.is_some() {
            return self.give(queues, index);
        }
        if self.served == Served::Net && is_receive(index) {
            return Ok(());
        }
        queues.serve(index, |chain| Some(refuse(self.served, chain)))
    }

    fn ready(&mut self, queues: &mut Queues, source: u32) -> Result<(), QueueError> {
        let index = (source - CALLS) as usize;
        if let Some(lane) = self.lanes.get(index) {
            lane.call.take();
            if let Err(error) = self.collect(Some(queues), index) {
                self.lose(queues, error);
            }
            // There is room now for what had none.
            return self.serve(queues, index);
        }
        if let Some(Err(error)) = self.back_end.as_ref().map(Frontend::check) {
            // What it did before it went counts.
            for index in 0..self.lanes.len() {
                let _ = self.collect(Some(queues), index);
            }
            self.lose(queues, error);
        }
        Ok(())
    }

    /// Buffers for what may come from the world do not count: of a device that is held they are
    /// filled, and the driver hears of it later.
    fn idle(&self) -> bool {
        self.lanes.iter().all(|lane| lane.requests == 0)
    }

    fn settled(&self) -> bool {
        self.lanes.iter().all(|lane| !lane.running || lane.flight.iter().all(Option::is_none))
    }

    fn withdraw(&mut self, queues: &mut Queues, index: usize) {
        if self.lanes[index].running
            && let Err(cause) = self.stop(Some(queues), index)
        {
            self.lose(queues, cause);
        }
    }

    fn reset(&mut self) {
        for index in 0..self.lanes.len() {
            if self.lanes[index].running
                && let Err(cause) = self.stop(None, index)
                && self.back_end.take().is_some()
            {
                self.trouble = Some(format!("the back end {cause}"));
            }
            self.lanes[index].forget();
        }
        self.told = None;
    }

    fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
}

/// A chain that asks for something, and is answered before long.
fn is_request(chain: &Chain) -> bool {
    !chain.readable.is_empty()
}

/// Whether a network card's queue is for packets that come (5.1.2).
fn is_receive(index: usize) -> bool {
    index.is_multiple_of(2)
}

/// Answers a chain by an error, as far as its device knows one.
fn refuse(served: Served, chain: Chain) -> (Used, u32) {
    const IOERR: u8 = 1;
    /// struct fuse_out_header: length, error, unique; the request has its unique at 8.
    const FUSE_ANSWER: u32 = 16;
    const EIO: i32 = 5;
    let Chain { readable, writable, used } = chain;
    let written = match served {
        Served::Blk => match writable.len().checked_sub(1) {
            Some(last) => writable.write_at(last, &[IOERR]) as u32,
            None => 0,
        },
        // One that has no room for it is not answered, as FUSE_FORGET.
        Served::Fs if writable.len() >= FUSE_ANSWER.into() => {
            let mut answer = [0; FUSE_ANSWER as usize];
            answer[..4].copy_from_slice(&FUSE_ANSWER.to_le_bytes());
            answer[4..8].copy_from_slice(&(-EIO).to_le_bytes());
            readable.read_at(8, &mut answer[8..]);
            writable.write_at(0, &answer) as u32
        }
        Served::Fs | Served::Net => 0,
    };
    (used, written)
}
