//! BAR 0, but for its first registers, on vCPUs' threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError};
use tetrarch_io::Event;

use super::card::Card;
use super::file::canonical;
use super::interrupts::Interrupts;

/// The first of the registers that are here.
pub const FIRST_REGISTER: u32 = 0x38;

pub const RDH: u32 = 0x2810;
const RDT: u32 = 0x2818;
pub const TDH: u32 = 0x3810;
const TDT: u32 = 0x3818;
const TAIL: u32 = 0xFFFF;

pub struct CardRegisters {
    pub(super) card: Arc<Mutex<Card>>,
    pub(super) interrupts: Arc<Interrupts>,
    /// Of the ring to send and of that to receive.
    pub(super) tails: [Arc<AtomicU32>; 2],
    /// Of the I/O thread: there are frames in the ring, there are buffers.
    pub(super) sent: Arc<Event>,
    pub(super) room: Arc<Event>,
    /// A frame waits for buffers.
    pub(super) waiting: Arc<AtomicBool>,
}

impl CardRegisters {
    fn read_word(&self, offset: u32) -> u32 {
        let [tx, rx] = &self.tails;
        match offset {
            TDT => tx.load(SeqCst),
            RDT => rx.load(SeqCst),
            _ => self.interrupts.read(offset).unwrap_or_else(|| self.card.lock().read(offset)),
        }
    }

    fn write_word(&self, offset: u32, value: u32) {
        let [tx, rx] = &self.tails;
        match offset {
            TDT => {
                tx.store(value & TAIL, SeqCst);
                self.sent.signal();
            }
            RDT => {
                rx.store(value & TAIL, SeqCst);
                if self.waiting.load(SeqCst) {
                    self.room.signal();
                }
            }
            _ if self.interrupts.write(offset, value) => {}
            _ => self.card.lock().write(offset, value),
        }
    }
}

/// Registers are of 32 bits, and accesses too (manual, 13.1); of others parts of one are read, and
/// two are written.
impl Device for CardRegisters {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        let offset = offset as u32 + FIRST_REGISTER;
        let word = |at| u64::from(self.read_word(canonical(at)));
        let low = word(offset & !3);
        let high = if size == 8 && offset.is_multiple_of(4) { word(offset + 4) } else { 0 };
        Ok((low | high << 32) >> (8 * (offset & 3)))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        let offset = offset as u32 + FIRST_REGISTER;
        if size >= 4 && offset.is_multiple_of(4) {
            self.write_word(canonical(offset), value as u32);
            if size == 8 {
                self.write_word(canonical(offset + 4), (value >> 32) as u32);
            }
        }
        Ok(())
    }
}
