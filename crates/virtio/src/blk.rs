//! Block device (5.2): a driver's requests to a disk.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use smallvec::SmallVec;
use tetrarch_block::{BlockBackend, BlockQueue, Completion, Failures, Request, SECTOR};
use tetrarch_io::{Attachment, Trigger};
use tetrarch_memory::ScatterList;

use crate::device::{DataPath, OWN_SOURCES};
use crate::queue::{Chain, QueueError, Used};
use crate::queues::Queues;

/// Feature bits (5.2.3).
pub const FLUSH: u64 = 1 << 9;

/// Types of a request (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Ends of a request: the last byte that is written.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// type, reserved, sector.
const HEADER: u64 = 16;
/// sector, number of sectors, flags; with one flag for zeroes.
const SEGMENT: u64 = 16;
const UNMAP: u32 = 1;
/// GET_ID has so many bytes.
const ID: usize = 20;

/// Segments of a discard, and sectors of each, at most: as the configuration says.
pub const MAX_SEGMENTS: u32 = 32;
pub const MAX_SECTORS: u32 = 1 << 22;

/// Most are one.
type Requests = SmallVec<[Request; 1]>;

/// More queues than a driver has CPUs are of no use to it.
pub const MAX_QUEUES: usize = 64;

/// A request of the driver that the disk has.
struct Pending {
    queue: usize,
    used: Used,
    /// Where the status goes,
    status: ScatterList,
    /// and how many bytes are written before it.
    data: u32,
    /// Requests to the disk that it became, and are not done.
    parts: u32,
    end: u8,
    /// It is to be on the disk when it ends, and is not yet.
    flush: bool,
}

pub struct Blk {
    /// `None` once the machine has ended.
    disk: Option<Arc<dyn BlockBackend>>,
    name: String,
    serial: [u8; ID],
    /// While the driver is ready.
    queue: Option<Box<dyn BlockQueue>>,
    /// By the tags that the disk has for them.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Requests that the disk has.
    submitted: usize,
    /// A driver that does not flush takes a write that is done for durable (5.2.5.1).
    write_through: bool,
    done: Vec<Completion>,
    failures: Failures,
}

impl Blk {
    /// The host's log calls it by its serial number, of which the guest sees 20 bytes.
    pub fn new(disk: Arc<dyn BlockBackend>, serial: &str) -> Self {
        let mut id = [0; ID];
        let len = serial.len().min(ID);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        Self {
            disk: Some(disk),
            name: serial.into(),
            serial: id,
            queue: None,
            pending: Vec::new(),
            free: Vec::new(),
            submitted: 0,
            write_through: false,
            done: Vec::new(),
            failures: Failures::default(),
        }
    }

    /// Begins a request; what is over already is given back with its length.
    fn begin(&mut self, index: usize, chain: Chain) -> Option<(Used, u32)> {
        let Chain { readable, writable, used } = chain;
        // Without a byte for its status there is no answer.
        let Some(data) = writable.len().checked_sub(1) else { return Some((used, 0)) };
        let (data, status) = writable.split_at(data);
        let mut requests = Requests::new();
        let (end, written) = self.parse(&readable, data, &mut requests);
        if requests.is_empty() || end != OK {
            status.write_at(0, &[end]);
            return Some((used, written + 1));
        }
        let writes = requests.iter().any(Request::writes);
        let pending = Pending {
            queue: index,
            used,
            status,
            data: written,
            parts: requests.len() as u32,
            end: OK,
            flush: writes && self.write_through,
        };
        let tag = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[tag] = Some(pending);
        if let Some(queue) = &mut self.queue {
            self.submitted += requests.len();
            requests.into_iter().for_each(|request| queue.submit(tag as u64, request));
        }
        None
    }

    /// What the disk is asked: the status of what ends here, and how many bytes of the
    /// answer there are before it.
    fn parse(
        &self,
        readable: &ScatterList,
        data: ScatterList,
        requests: &mut Requests,
    ) -> (u8, u32) {
        let mut header = [0; HEADER as usize];
        if readable.read_at(0, &mut header) < header.len() {
            return (IOERR, 0);
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = number(&header[8..]);
        let out = || readable.part(HEADER, u64::MAX);
        let bytes = |list: &ScatterList| {
            let whole = list.len().is_multiple_of(SECTOR) && !list.is_empty();
            sector.checked_mul(SECTOR).filter(|_| whole)
        };
        match kind {
            IN => match bytes(&data) {
                Some(offset) => {
                    let length = data.len() as u32;
                    requests.push(Request::Read { offset, data });
                    (OK, length)
                }
                None => (IOERR, 0),
            },
            OUT => {
                let data = out();
                match bytes(&data) {
                    Some(offset) => {
                        requests.push(Request::Write { offset, data });
                        (OK, 0)
                    }
                    None => (IOERR, 0),
                }
            }
            FLUSH_REQUEST => {
                requests.push(Request::Flush);
                (OK, 0)
            }
            GET_ID => (OK, data.write_at(0, &self.serial) as u32),
            DISCARD | WRITE_ZEROES => (segments(kind, &out(), requests), 0),
            _ => (UNSUPP, 0),
        }
    }

    /// Answers what the disk has done.
    fn finish(&mut self, queues: &mut Queues) {
        let Some(queue) = &mut self.queue else { return };
        // The queues that have got something, as bits.
        let mut answered = 0u64;
        loop {
            queue.completions(&mut self.done);
            if self.done.is_empty() {
                break;
            }
            let mut flushes = false;
            self.submitted -= self.done.len();
            for (tag, result) in self.done.drain(..) {
                let slot = &mut self.pending[tag as usize];
                let Some(pending) = slot else { continue };
                if let Err(error) = result {
                    pending.end = IOERR;
                    self.failures.tell(&self.name, error);
                }
                pending.parts -= 1;
                if pending.parts > 0 {
                    continue;
                }
                if pending.flush && pending.end == OK {
                    (pending.flush, pending.parts, flushes) = (false, 1, true);
                    self.submitted += 1;
                    queue.submit(tag, Request::Flush);
                    continue;
                }
                if let Some(Pending { queue, used, status, data, end, .. }) = slot.take() {
                    status.write_at(0, &[end]);
                    queues.push(queue, used, data + 1);
                    answered |= 1 << queue;
                }
                self.free.push(tag as usize);
            }
            if flushes {
                queue.kick();
            }
        }
        for index in 0..MAX_QUEUES {
            if answered & 1 << index != 0 {
                queues.interrupt(index);
            }
        }
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.stopped())
    }

    /// Lets go of the disk.
    pub fn close(&mut self) {
        self.reset();
        self.disk = None;
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// Ranges that are discarded or zeroed; the status where they cannot be (5.2.6.2).
fn segments(kind: u32, list: &ScatterList, requests: &mut Requests) -> u8 {
    let count = list.len() / SEGMENT;
    if !list.len().is_multiple_of(SEGMENT) || count == 0 || count > u64::from(MAX_SEGMENTS) {
        return IOERR;
    }
    for index in 0..count {
        let mut segment = [0; SEGMENT as usize];
        list.read_at(index * SEGMENT, &mut segment);
        let (sector, rest) = (number(&segment), number(&segment[8..]));
        let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
        let known = if kind == WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return UNSUPP;
        }
        let Some(offset) = sector.checked_mul(SECTOR).filter(|_| sectors <= MAX_SECTORS) else {
            return IOERR;
        };
        let length = u64::from(sectors) * SECTOR;
        requests.push(match kind {
            DISCARD => Request::Discard { offset, length },
            _ => Request::WriteZeroes { offset, length, unmap: flags & UNMAP != 0 },
        });
    }
    OK
}

impl DataPath for Blk {
    fn start(&mut self, features: u64, io: &Attachment) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Err(io::ErrorKind::NotConnected.into()) };
        let queue = disk.open_queue().map_err(io::Error::other)?;
        // The last one's descriptor has gone with it, on reset.
        io.add(queue.event().as_fd(), OWN_SOURCES, Trigger::Readable)?;
        self.queue = Some(queue);
        self.write_through = features & FLUSH == 0;
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        let result = queues.serve(index, |chain| self.begin(index, chain));
        if let Some(queue) = &mut self.queue {
            queue.kick();
        }
        self.finish(queues);
        result
    }

    fn ready(&mut self, queues: &mut Queues, _source: u32) -> Result<(), QueueError> {
        self.finish(queues);
        Ok(())
    }

    fn hurry(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.hurry();
        }
    }

    fn idle(&self) -> bool {
        self.submitted == self.stopped()
    }

    fn reset(&mut self) {
        // Waits for what is in flight.
        self.queue = None;
        self.pending.clear();
        self.free.clear();
        self.submitted = 0;
        self.done.clear();
    }
}
