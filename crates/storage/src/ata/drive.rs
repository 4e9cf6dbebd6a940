//! A drive: the state that commands change, and what each command asks.

use std::sync::Arc;

use tetrarch_block::{BlockBackend, BlockError, BlockInfo};

use super::identify::{self, About, Current, MULTIPLE};
use super::{SECTOR, TaskFile, error};
use crate::scsi::Cd;

/// What is behind a drive.
pub enum Medium {
    Disk,
    Cd(Cd),
}

/// How a command's data goes, as far as the controller has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Pio,
    Dma,
}

/// What is to be done for a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// It is done, with this in the count register.
    Done(u16),
    /// The host gets these bytes, by PIO.
    Reply(Vec<u8>),
    Read {
        offset: u64,
        length: u64,
        by: By,
    },
    Write {
        offset: u64,
        length: u64,
        by: By,
        durable: bool,
    },
    /// The host gives so many bytes of ranges, for [`Drive::trimmed`].
    Trim {
        length: u64,
    },
    Flush,
    /// The host gives a packet, for [`Cd::begin`].
    Packet,
    /// The drive is as it was at power on, and says who it is by its signature.
    Reset,
}

/// A command that is refused: the error register.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub u8);

const ABORT: Refusal = Refusal(error::ABORT);
const NOT_FOUND: Refusal = Refusal(error::NOT_FOUND);

/// What a host changes of a drive, as numbers for a saved machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveState {
    pub write_cache: bool,
    pub multiple: u8,
    pub mode: u8,
    pub heads: u8,
    pub sectors: u8,
}

impl Default for DriveState {
    fn default() -> Self {
        // UDMA 5, as firmware leaves it.
        Self { write_cache: true, multiple: MULTIPLE, mode: 0x45, heads: 16, sectors: 63 }
    }
}

/// One drive at a controller.
pub struct Drive {
    /// `None` once the machine has ended.
    disk: Option<Arc<dyn BlockBackend>>,
    pub medium: Medium,
    pub state: DriveState,
    serial: String,
    model: String,
    /// The controller is one of Serial ATA, with command queues.
    sata: bool,
}

impl Drive {
    /// `sata` is for a controller of Serial ATA.
    pub fn disk(disk: Arc<dyn BlockBackend>, serial: &str, sata: bool) -> Self {
        Self::new(disk, Medium::Disk, serial, "Tetrarch disk", sata)
    }

    pub fn cd(disk: Arc<dyn BlockBackend>, serial: &str, sata: bool) -> Self {
        Self::new(disk, Medium::Cd(Cd::default()), serial, "Tetrarch CD-ROM", sata)
    }

    fn new(
        disk: Arc<dyn BlockBackend>,
        medium: Medium,
        serial: &str,
        model: &str,
        sata: bool,
    ) -> Self {
        let state = DriveState::default();
        let (serial, model) = (serial.into(), model.into());
        Self { disk: Some(disk), medium, state, serial, model, sata }
    }

    pub fn backend(&self) -> Option<&Arc<dyn BlockBackend>> {
        self.disk.as_ref()
    }

    pub fn close(&mut self) {
        self.disk = None;
    }

    pub fn is_packet(&self) -> bool {
        matches!(self.medium, Medium::Cd(_))
    }

    pub fn info(&self) -> BlockInfo {
        self.disk.as_ref().map_or(BlockInfo::NONE, |disk| disk.info())
    }

    /// What the registers hold after a reset (9.12): count, and LBA.
    pub fn signature(&self) -> (u16, u64) {
        if self.is_packet() { (1, 0xEB_1401) } else { (1, 1) }
    }

    /// Which registers a reset puts back.
    pub fn reset(&mut self) {
        self.state = DriveState::default();
        if let Medium::Cd(cd) = &mut self.medium {
            cd.reset();
        }
    }

    fn geometry(&self) -> (u64, u64) {
        (self.state.heads.into(), self.state.sectors.into())
    }

    /// Whether writes are durable when they end.
    pub fn write_through(&self) -> bool {
        !self.state.write_cache
    }

    /// What a command asks; queued ones are [`Drive::begin_queued`].
    pub fn begin(&mut self, task: &TaskFile) -> Result<Step, Refusal> {
        match task.command {
            // EXECUTE DEVICE DIAGNOSTIC: no error.
            0x90 => return Ok(Step::Reset),
            // SLEEP is not, since only a reset ends it.
            0xE0..=0xE3 => return Ok(Step::Done(0)),
            // CHECK POWER MODE: active.
            0xE5 => return Ok(Step::Done(0xFF)),
            0xEF => return self.set_features(task).map(|()| Step::Done(0)),
            _ => {}
        }
        if self.is_packet() { self.begin_packet(task) } else { self.begin_disk(task) }
    }

    fn begin_packet(&mut self, task: &TaskFile) -> Result<Step, Refusal> {
        match task.command {
            0x08 => Ok(Step::Reset),
            0xA0 => Ok(Step::Packet),
            0xA1 => Ok(Step::Reply(identify::packet(&self.about(), &self.current()))),
            // Flushes: there is nothing to write.
            0xE7 | 0xEA => Ok(Step::Done(0)),
            _ => Err(ABORT),
        }
    }

    fn begin_disk(&mut self, task: &TaskFile) -> Result<Step, Refusal> {
        let read = |(offset, length), by| Step::Read { offset, length, by };
        let write = |(offset, length), by, durable| Step::Write { offset, length, by, durable };
        match task.command {
            0x06 if task.features & 0xFF == 1 => {
                Ok(Step::Trim { length: task.sectors(true) * SECTOR })
            }
            // RECALIBRATE and SEEK.
            0x10..=0x1F | 0x70..=0x7F => Ok(Step::Done(0)),
            0x20 | 0x21 | 0xC4 => Ok(read(self.extent(task, false)?, By::Pio)),
            0x24 | 0x29 => Ok(read(self.extent(task, true)?, By::Pio)),
            0xC8 | 0xC9 => Ok(read(self.extent(task, false)?, By::Dma)),
            0x25 => Ok(read(self.extent(task, true)?, By::Dma)),
            0x30 | 0x31 | 0xC5 => Ok(write(self.writable(task, false)?, By::Pio, false)),
            0x34 | 0x39 => Ok(write(self.writable(task, true)?, By::Pio, false)),
            0xCE => Ok(write(self.writable(task, true)?, By::Pio, true)),
            0xCA | 0xCB => Ok(write(self.writable(task, false)?, By::Dma, false)),
            0x35 => Ok(write(self.writable(task, true)?, By::Dma, false)),
            0x3D => Ok(write(self.writable(task, true)?, By::Dma, true)),
            // READ VERIFY.
            0x40 | 0x41 => self.extent(task, false).map(|_| Step::Done(0)),
            0x42 => self.extent(task, true).map(|_| Step::Done(0)),
            // INITIALIZE DEVICE PARAMETERS.
            0x91 => {
                let (heads, sectors) = ((task.device & 0xF) + 1, task.count as u8);
                if sectors == 0 {
                    return Err(ABORT);
                }
                (self.state.heads, self.state.sectors) = (heads, sectors);
                Ok(Step::Done(0))
            }
            // SET MULTIPLE MODE.
            0xC6 => {
                let multiple = task.count as u8;
                if multiple > MULTIPLE || !(multiple == 0 || multiple.is_power_of_two()) {
                    return Err(ABORT);
                }
                self.state.multiple = multiple;
                Ok(Step::Done(0))
            }
            0xE7 | 0xEA => Ok(Step::Flush),
            0xEC => Ok(Step::Reply(identify::disk(&self.about(), &self.current(), &self.info()))),
            _ => Err(ABORT),
        }
    }

    /// READ and WRITE FPDMA QUEUED, whose count is where others have features (7.21, 7.75).
    pub fn begin_queued(&self, task: &TaskFile) -> Result<Step, Refusal> {
        let moved = TaskFile { count: task.features, ..*task };
        let by = By::Dma;
        match task.command {
            0x60 if self.sata => {
                let (offset, length) = self.extent(&moved, true)?;
                Ok(Step::Read { offset, length, by })
            }
            0x61 if self.sata => {
                let (offset, length) = self.writable(&moved, true)?;
                Ok(Step::Write { offset, length, by, durable: task.device & 0x80 != 0 })
            }
            _ => Err(ABORT),
        }
    }

    /// Bytes of the disk.
    fn extent(&self, task: &TaskFile, wide: bool) -> Result<(u64, u64), Refusal> {
        let (sectors, all) = (task.sectors(wide), self.info().size / SECTOR);
        let first = task.sector(wide, self.geometry()).ok_or(NOT_FOUND)?;
        match first.checked_add(sectors) {
            Some(end) if end <= all => Ok((first * SECTOR, sectors * SECTOR)),
            _ => Err(NOT_FOUND),
        }
    }

    fn writable(&self, task: &TaskFile, wide: bool) -> Result<(u64, u64), Refusal> {
        // ATA knows no drive that cannot be written; this is how its media say so.
        if self.info().readonly { Err(ABORT) } else { self.extent(task, wide) }
    }

    /// Ranges to trim, as bytes of the disk (7.5.3.2).
    pub fn trimmed(&self, ranges: &[u8]) -> Result<Vec<(u64, u64)>, Refusal> {
        let all = self.info().size / SECTOR;
        if self.info().readonly {
            return Err(ABORT);
        }
        let mut found = Vec::new();
        for &range in ranges.as_chunks::<8>().0 {
            let range = u64::from_le_bytes(range);
            let (first, sectors) = (range & 0xFFFF_FFFF_FFFF, range >> 48);
            if first + sectors > all {
                return Err(NOT_FOUND);
            }
            if sectors > 0 {
                found.push((first * SECTOR, sectors * SECTOR));
            }
        }
        Ok(found)
    }

    fn set_features(&mut self, task: &TaskFile) -> Result<(), Refusal> {
        match (task.features as u8, task.count as u8) {
            (0x02, _) => self.state.write_cache = true,
            (0x82, _) => self.state.write_cache = false,
            // Transfer modes: PIO, multi-word DMA 0 to 2, UDMA 0 to 5.
            (0x03, 0x00..=0x0C) => {}
            (0x03, mode @ (0x20..=0x22 | 0x40..=0x45)) => self.state.mode = mode,
            // Look-ahead, defaults after a soft reset: all the same here.
            (0xAA | 0x55 | 0xCC | 0x66, _) => {}
            _ => return Err(ABORT),
        }
        Ok(())
    }

    fn about(&self) -> About<'_> {
        About { serial: &self.serial, model: &self.model }
    }

    fn current(&self) -> Current {
        let DriveState { write_cache, multiple, mode, .. } = self.state;
        let (geometry, serial) = (self.geometry(), self.sata);
        Current { write_cache, multiple, mode, geometry, serial }
    }
}

/// The error register for what the host could not do.
pub fn failure(error: BlockError, writes: bool) -> u8 {
    match error {
        BlockError::Beyond { .. } => super::error::NOT_FOUND,
        _ if writes => super::error::ABORT,
        _ => super::error::UNCORRECTABLE,
    }
}
