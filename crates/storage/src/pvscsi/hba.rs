//! Requests: taken from their ring, carried out, and answered, on the I/O thread.

use std::collections::VecDeque;
use std::sync::Arc;

use tetrarch_block::{BlockError, Request as DiskRequest};
use tetrarch_io::{Attachment, Event, Handler};
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::data::data;
use super::registers::{COMPLETION, Interrupts, MESSAGE};
use super::request::{Completion, HostStatus, Reply, Request, Way};
use super::rings::Rings;
use super::target::{Command, Same, Target};
use crate::landed::Landed;
use crate::scsi::{Disk, Sense, Step};

/// The kinds of news of a target.
pub const ADDED: u32 = 0;
pub const REMOVED: u32 = 1;

/// What is told of a target: it has come, or it is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    pub kind: u32,
    pub target: usize,
}

/// What became of a request at once.
enum Outcome {
    /// So many bytes were moved.
    Done(u64),
    /// The disk has it.
    Goes,
}

/// Why a request failed at once.
enum Failed {
    Host(HostStatus),
    Device(Sense),
}

impl From<HostStatus> for Failed {
    fn from(status: HostStatus) -> Self {
        Self::Host(status)
    }
}

impl From<Sense> for Failed {
    fn from(sense: Sense) -> Self {
        Self::Device(sense)
    }
}

pub struct Hba {
    pub memory: Arc<GuestMemory>,
    /// As many as there can be.
    pub targets: Vec<Option<Target>>,
    /// While the driver has set them up.
    pub rings: Option<Rings>,
    pub interrupts: Arc<Interrupts>,
    /// Of this thread.
    pub event: Arc<Event>,
    /// Requests of the ring that the disks have.
    pub in_flight: u32,
    /// Answers that the ring has no room for, or guest memory may not be given.
    pub answers: VecDeque<Completion>,
    /// Requests with an answer of their own that have not got it.
    pub issued: usize,
    pub news: VecDeque<News>,
    /// The index of the message that a target is to go by.
    pub leaving: Vec<Option<u32>>,
    /// The machine is held.
    pub quiet: bool,
    /// The controller has the bus: requests are taken.
    pub master: bool,
    /// It is without it: memory is left alone.
    pub away: bool,
    pub landed: Arc<Landed>,
}

impl Hba {
    pub fn works(&self) -> bool {
        self.master && !self.quiet
    }

    /// Takes what the ring holds and the disks have done, and says so to the driver.
    pub fn serve(&mut self) {
        self.finish();
        if self.works() {
            self.take_requests();
            self.finish();
        }
        self.answer();
        self.tell();
    }

    /// The same for a vCPU: that it runs says that the machine is not held, which the I/O thread
    /// may have yet to hear.
    pub fn serve_now(&mut self) {
        if self.master {
            self.take_requests();
        }
        self.finish();
        self.answer();
    }

    fn take_requests(&mut self) {
        let entries = self.rings.as_ref().map_or(0, Rings::entries);
        for _ in 0..entries {
            let others = self.in_flight.saturating_add(self.answers.len() as u32);
            let Some(rings) = self.rings.as_mut().filter(|rings| rings.has_room(others)) else {
                return self.kick();
            };
            let Some(request) = rings.take() else { return self.kick() };
            self.begin(&request, Reply::Ring);
        }
        self.kick();
        // After a ring full of requests it is the turn of others on the thread.
        if entries > 0 {
            self.event.signal();
        }
    }

    /// Starts what disks were asked.
    pub fn kick(&mut self) {
        for target in self.targets.iter_mut().flatten() {
            if let Some(requests) = target.requests.as_mut().filter(|queue| !queue.is_empty()) {
                requests.kick();
            }
        }
    }

    pub fn begin(&mut self, request: &Request, reply: Reply) {
        match reply {
            Reply::Ring => self.in_flight += 1,
            Reply::At(_) => self.issued += 1,
        }
        let mut completion = Completion::new(reply, request.context(), request.sense());
        match self.try_begin(request, completion) {
            Ok(Outcome::Goes) => return,
            Ok(Outcome::Done(bytes)) => completion.bytes = bytes,
            Err(Failed::Host(host)) => completion.host = host,
            Err(Failed::Device(sense)) => completion.sense = Some(sense),
        }
        self.complete(completion);
    }

    fn try_begin(&mut self, request: &Request, end: Completion) -> Result<Outcome, Failed> {
        let target = request.target().and_then(|number| self.targets.get_mut(number)?.as_mut());
        let target = target.ok_or(HostStatus::SELECTION_TIMEOUT)?;
        let cdb = request.cdb().ok_or(HostStatus::INVALID_PARAMETER)?;
        let memory = &self.memory;
        let step = target.unit.begin(&cdb, request.is_for_first_unit())?;
        let mut command = Command { completion: end, writes: true, same: None };
        let bytes_moved = &mut command.completion.bytes;
        let mut durable = false;
        let requests = match step {
            Step::Done => return Ok(Outcome::Done(0)),
            Step::Data(bytes) => {
                let room = request.room(Way::ToGuest)?.min(bytes.len() as u64);
                let list = data(memory, request, Way::ToGuest, room)?;
                return Ok(Outcome::Done(list.write_at(0, &bytes) as u64));
            }
            Step::Read { offset, length } => {
                let data = data(memory, request, Way::ToGuest, length)?;
                (*bytes_moved, command.writes) = (length, false);
                vec![DiskRequest::Read { offset, data }]
            }
            Step::Write { offset, length, durable: force } => {
                let data = data(memory, request, Way::FromGuest, length)?;
                (*bytes_moved, durable) = (length, force);
                vec![DiskRequest::Write { offset, data }]
            }
            Step::Flush => vec![DiskRequest::Flush],
            Step::Zero { offset, length, unmap } => {
                vec![DiskRequest::WriteZeroes { offset, length, unmap }]
            }
            Step::Unmap { length } => {
                let list = data(memory, request, Way::FromGuest, length)?;
                let mut bytes = vec![0; length as usize];
                list.read_at(0, &mut bytes);
                let ranges = Disk::unmapped(&bytes, &target.unit.info())?;
                if ranges.is_empty() {
                    return Ok(Outcome::Done(length));
                }
                *bytes_moved = length;
                let discard = |(offset, length)| DiskRequest::Discard { offset, length };
                ranges.into_iter().map(discard).collect()
            }
            Step::Same { offset, length, block, unmap } => {
                let list = data(memory, request, Way::FromGuest, block)?;
                let mut bytes = vec![0; block as usize];
                list.read_at(0, &mut bytes);
                *bytes_moved = block;
                if bytes.iter().all(|&byte| byte == 0) {
                    vec![DiskRequest::WriteZeroes { offset, length, unmap }]
                } else {
                    let mut same = Same { blocks: repeat(memory, &list)?, offset, left: length };
                    let first = same.next();
                    command.same = Some(same);
                    first.into_iter().collect()
                }
            }
        };
        // Without a queue the host has closed the disk.
        let queue = target.requests.as_mut().ok_or(HostStatus::HARDWARE)?;
        queue.submit(command, requests.into_iter(), durable);
        Ok(Outcome::Goes)
    }

    fn complete(&mut self, completion: Completion) {
        match completion.reply {
            Reply::Ring => {
                self.in_flight = self.in_flight.saturating_sub(1);
                self.answers.push_back(completion);
            }
            // Its driver waits at the register: not for a place in the ring.
            Reply::At(_) => self.answers.push_front(completion),
        }
    }

    /// Looks what the disks have done.
    pub fn finish(&mut self) {
        for number in 0..self.targets.len() {
            let Some(target) = &mut self.targets[number] else { continue };
            let Some(requests) = target.requests.as_mut().filter(|queue| !queue.is_empty()) else {
                continue;
            };
            let mut ended = std::mem::take(&mut target.ended);
            requests.take(&mut ended);
            for (command, result) in ended.drain(..) {
                self.finish_one(number, command, result);
            }
            if let Some(target) = &mut self.targets[number] {
                target.ended = ended;
            }
        }
    }

    fn finish_one(&mut self, number: usize, mut command: Command, result: Result<(), BlockError>) {
        let Some(target) = &mut self.targets[number] else { return };
        let mut end = command.completion;
        match (result, command.same.as_mut().and_then(Same::next), &mut target.requests) {
            (Err(error), ..) => {
                target.failures.tell(&target.name, error);
                end.bytes = 0;
                end.sense = Some(target.unit.failed(error, command.writes));
            }
            // Its memory is no more to be read.
            (Ok(()), Some(_), _) if self.away => {
                (end.bytes, end.host) = (0, HostStatus::BUS_RESET);
            }
            (Ok(()), Some(next), Some(requests)) => {
                requests.submit(command, [next].into_iter(), false);
                return requests.kick();
            }
            (Ok(()), ..) => {}
        }
        self.complete(end);
    }

    /// Gives the driver the answers that there are.
    pub fn answer(&mut self) {
        if self.away {
            return;
        }
        let mut posted = false;
        while let Some(&end) = self.answers.front() {
            match (end.reply, &mut self.rings) {
                (Reply::Ring, Some(rings)) => {
                    if !rings.has_room(0) {
                        break;
                    }
                    let words = end.words(put_sense(&self.memory, &end));
                    rings.post(words);
                    posted = true;
                }
                (Reply::Ring, None) => {}
                (Reply::At(at), _) => {
                    let words = end.words(put_sense(&self.memory, &end));
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                    // Where it is no RAM, the driver waits for nothing.
                    let _ = self.memory.write(GuestPhys(at), &bytes);
                    self.issued = self.issued.saturating_sub(1);
                }
            }
            self.answers.pop_front();
        }
        if posted {
            self.interrupts.raise(COMPLETION);
        }
    }

    /// Gives the driver the news that there are, where it has asked for them.
    pub fn tell(&mut self) {
        let works = self.works();
        let Some(rings) = self.rings.as_mut().filter(|rings| rings.tells()) else {
            // It looks for targets when it begins.
            return self.news.clear();
        };
        if !works {
            return;
        }
        let mut told = false;
        while let Some(&News { kind, target }) = self.news.front() {
            let Some(index) = rings.tell(kind, target as u32) else { break };
            if kind == REMOVED {
                self.leaving[target] = Some(index);
            }
            told = true;
            self.news.pop_front();
        }
        if told {
            self.interrupts.raise(MESSAGE);
        }
    }

    /// Ends what is in flight at some targets, whose queues are opened anew: when this returns, the
    /// disks touch guest memory no more.
    pub fn abandon(&mut self, io: &Attachment, which: impl Fn(usize) -> bool) {
        self.finish();
        for number in (0..self.targets.len()).filter(|&number| which(number)) {
            let Some(target) = &mut self.targets[number] else { continue };
            let left = target.requests.take().map(|requests| requests.abandon());
            let left: Vec<_> = left.into_iter().flatten().collect();
            target.open(number, io);
            for Command { completion, .. } in left {
                self.complete(Completion { bytes: 0, host: HostStatus::BUS_RESET, ..completion });
            }
        }
    }

    /// The same, and nobody hears of it; the rings are gone.
    pub fn reset(&mut self, io: &Attachment) {
        self.abandon(io, |_| true);
        self.rings = None;
        (self.in_flight, self.issued) = (0, 0);
        self.answers.clear();
        self.news.clear();
        // The driver that was asked has forgotten all it knew.
        self.leaving.iter_mut().for_each(|leaving| *leaving = None);
        self.interrupts.reset();
    }

    /// Units are as they were at first.
    pub fn reset_units(&mut self, which: impl Fn(usize) -> bool) {
        for (number, target) in self.targets.iter_mut().enumerate() {
            if let Some(target) = target.as_mut().filter(|_| which(number)) {
                target.unit.reset();
            }
        }
    }

    /// Whether nothing is in flight.
    pub fn settled(&mut self) -> bool {
        // Of each target, whatever the others say: all are to hurry.
        let targets = self.targets.iter_mut().flatten();
        targets.filter_map(|target| (!target.settled()).then_some(())).count() == 0
    }
}

/// Writes why a request failed; gives how many bytes.
fn put_sense(memory: &GuestMemory, end: &Completion) -> u32 {
    let (Some(sense), (at, room)) = (end.sense, end.sense_place) else { return 0 };
    let bytes = sense.bytes();
    let bytes = &bytes[..bytes.len().min(room as usize)];
    if memory.write(GuestPhys(at), bytes).is_ok() { bytes.len() as u32 } else { 0 }
}

/// A block as often as one request to a disk takes it.
fn repeat(memory: &GuestMemory, block: &ScatterList) -> Result<ScatterList, HostStatus> {
    let mut blocks = ScatterList::new(memory.snapshot());
    let pieces = block.ranges().count().max(1);
    for _ in 0..ScatterList::MAX_PIECES / pieces {
        for (start, length) in block.ranges() {
            blocks.push(start, length).map_err(|_| HostStatus::INVALID_PARAMETER)?;
        }
    }
    Ok(blocks)
}

impl Handler for Hba {
    fn ready(&mut self, _source: u32) {
        self.serve();
        self.landed.signal();
    }

    fn settled(&mut self) -> bool {
        Self::settled(self)
    }

    fn quiesce(&mut self) -> bool {
        self.quiet = true;
        self.settled()
    }

    fn resume(&mut self) {
        self.quiet = false;
        self.serve();
        self.landed.signal();
    }
}
