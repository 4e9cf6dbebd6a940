//! A logical unit: a disk or a CD-ROM drive, with number 0 of its target.

use std::sync::Arc;

use tetrarch_block::{BlockBackend, BlockError, BlockInfo};

use super::cdb::Cdb;
use super::{Answer, Cd, Disk, PACKET, Sense};

/// Commands of all devices (SPC-3, 6).
const REQUEST_SENSE: u8 = 0x03;
const INQUIRY: u8 = 0x12;
const REPORT_LUNS: u8 = 0xA0;

/// What is to be done for a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    Done,
    /// The host gets these bytes, of which it takes as many as it has room for.
    Data(Vec<u8>),
    Read {
        offset: u64,
        length: u64,
    },
    Write {
        offset: u64,
        length: u64,
        durable: bool,
    },
    Flush,
    /// The host gives so many bytes of ranges, for [`Disk::unmapped`].
    Unmap {
        length: u64,
    },
    /// The bytes read as 0.
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    /// The host gives one block, of `block` bytes, for all of these.
    Same {
        offset: u64,
        length: u64,
        block: u64,
        unmap: bool,
    },
}

/// What a unit is, and remembers between commands.
pub enum Drive {
    Disk(Disk),
    Cd(Cd),
}

pub struct Unit {
    /// `None` once the machine has ended.
    disk: Option<Arc<dyn BlockBackend>>,
    pub drive: Drive,
    serial: String,
}

impl Unit {
    pub fn disk(disk: Arc<dyn BlockBackend>, serial: &str) -> Self {
        Self { disk: Some(disk), drive: Drive::Disk(Disk::default()), serial: serial.into() }
    }

    pub fn cd(disk: Arc<dyn BlockBackend>, serial: &str) -> Self {
        Self { disk: Some(disk), drive: Drive::Cd(Cd::default()), serial: serial.into() }
    }

    pub fn backend(&self) -> Option<&Arc<dyn BlockBackend>> {
        self.disk.as_ref()
    }

    pub fn close(&mut self) {
        self.disk = None;
    }

    pub fn info(&self) -> BlockInfo {
        self.disk.as_ref().map_or(BlockInfo::NONE, |disk| disk.info())
    }

    pub fn reset(&mut self) {
        match &mut self.drive {
            Drive::Disk(disk) => *disk = Disk::default(),
            Drive::Cd(cd) => cd.reset(),
        }
    }

    /// The disk has another size: the next command is told.
    pub fn resized(&mut self) {
        if let Drive::Disk(disk) = &mut self.drive {
            disk.attention = Some(Sense::CAPACITY_CHANGED);
        }
    }

    /// What a command asks; of another unit than the first there is nothing (SPC-3, 6.4.2).
    pub fn begin(&mut self, cdb: &Cdb, first: bool) -> Result<Step, Sense> {
        match (cdb.code(), first) {
            (REPORT_LUNS, _) => return report_luns(cdb),
            (INQUIRY, false) => {
                let mut data = vec![0; 36];
                (data[0], data[4]) = (0x7F, 31);
                return cut(data, cdb.word(3).into());
            }
            (REQUEST_SENSE, false) => {
                return cut(Sense::NO_SUCH_UNIT.bytes(), cdb.byte(4).into());
            }
            (_, false) => return Err(Sense::NO_SUCH_UNIT),
            (_, true) => {}
        }
        let info = self.info();
        match &mut self.drive {
            Drive::Disk(disk) => disk.begin(cdb, &info, &self.serial),
            Drive::Cd(cd) => {
                let mut packet = [0; PACKET];
                packet.copy_from_slice(&cdb.0[..PACKET]);
                Ok(match cd.begin(&packet, info.size)? {
                    Answer::Done => Step::Done,
                    Answer::Data(data) => Step::Data(data),
                    Answer::Read { offset, length } => Step::Read { offset, length },
                })
            }
        }
    }

    /// Why a command failed that the host could not carry out.
    pub fn failed(&mut self, error: BlockError, writes: bool) -> Sense {
        let sense = Sense::of(error, writes);
        match &mut self.drive {
            Drive::Disk(_) => sense,
            Drive::Cd(cd) => cd.failed(sense),
        }
    }
}

/// At most as many bytes as the host has asked for.
pub fn cut(mut data: Vec<u8>, allocated: u32) -> Result<Step, Sense> {
    data.truncate(allocated as usize);
    Ok(if data.is_empty() { Step::Done } else { Step::Data(data) })
}

/// There is the first, and it is no well-known one (SPC-3, 6.21).
fn report_luns(cdb: &Cdb) -> Result<Step, Sense> {
    let allocated = cdb.long(6);
    if allocated < 16 || cdb.byte(2) > 2 {
        return Err(Sense::INVALID_FIELD);
    }
    let mut data = vec![0; 16];
    if cdb.byte(2) == 1 {
        data.truncate(8);
    } else {
        data[3] = 8;
    }
    cut(data, allocated)
}
