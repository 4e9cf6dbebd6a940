//! A target: its unit, and the requests that its disk has.

use tetrarch_block::{BlockError, Failures, Request as DiskRequest};
use tetrarch_io::Attachment;
use tetrarch_memory::ScatterList;

use super::request::Completion;
use crate::requests::Requests;
use crate::scsi::Unit;

/// A block that is written again and again, by WRITE SAME.
pub struct Same {
    /// The block, as often as one request takes it.
    pub blocks: ScatterList,
    pub offset: u64,
    /// Bytes that were not asked of the disk yet.
    pub left: u64,
}

impl Same {
    /// The next request to the disk.
    pub fn next(&mut self) -> Option<DiskRequest> {
        let length = self.left.min(self.blocks.len());
        if length == 0 {
            return None;
        }
        let (offset, data) = (self.offset, self.blocks.part(0, length));
        self.offset += length;
        self.left -= length;
        Some(DiskRequest::Write { offset, data })
    }
}

/// A request that the disk has.
pub struct Command {
    /// Its end, if the disk does not fail.
    pub completion: Completion,
    pub writes: bool,
    pub same: Option<Same>,
}

pub struct Target {
    pub name: String,
    pub unit: Unit,
    /// While there is a disk.
    pub requests: Option<Requests<Command>>,
    pub ended: Vec<(Command, Result<(), BlockError>)>,
    pub failures: Failures,
}

impl Target {
    pub fn new(name: String, unit: Unit) -> Self {
        let (ended, failures) = (Vec::new(), Failures::default());
        Self { name, unit, requests: None, ended, failures }
    }

    /// Opens the queue of its disk: of none that is open. `number` is that of the target.
    pub fn open(&mut self, number: usize, io: &Attachment) {
        let Some(disk) = self.unit.backend() else { return };
        match Requests::open(&**disk, io, number as u32) {
            Ok(requests) => self.requests = Some(requests),
            Err(error) => log::warn!("{}: the disk cannot be used: {error}", self.name),
        }
    }

    /// Whether nothing is in flight.
    pub fn settled(&mut self) -> bool {
        self.requests.as_mut().is_none_or(|requests| {
            requests.hurry();
            requests.idle()
        })
    }
}
