//! BAR 0: interrupt masks, and the doorbells of the rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use tetrarch_bus::{Device, DeviceDoorbell, DeviceError};
use tetrarch_io::Event;

use super::interrupts::{Interrupts, MAX_INTERRUPTS};
use super::{MAX_RX, MAX_TX};

/// Registers are 8 bytes apart.
const STRIDE: u64 = 8;
const IMR: u64 = 0;
const TXPROD: u64 = 0x600;
const RXPROD: u64 = 0x800;
const RXPROD2: u64 = 0xA00;

pub struct CardRegisters {
    pub(super) interrupts: Arc<Interrupts>,
    /// Of the I/O thread: there are frames in the ring of a number, there are buffers.
    pub(super) sent: Vec<Arc<Event>>,
    pub(super) room: Arc<Event>,
    /// A frame waits for buffers.
    pub(super) waiting: Arc<AtomicBool>,
}

/// Which one of a row of registers is at an offset.
fn number(offset: u64, first: u64, count: usize) -> Option<usize> {
    let at = offset.checked_sub(first)?;
    let number = usize::try_from(at / STRIDE).ok()?;
    (at.is_multiple_of(STRIDE) && number < count).then_some(number)
}

impl Device for CardRegisters {
    fn read(&self, offset: u64, _size: u8) -> Result<u64, DeviceError> {
        let mask = number(offset, IMR, MAX_INTERRUPTS);
        Ok(mask.map_or(0, |number| self.interrupts.is_masked(number).into()))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        if let Some(interrupt) = number(offset, IMR, MAX_INTERRUPTS) {
            if size >= 4 {
                let masked = value & 1 != 0;
                self.interrupts.set_masked(interrupt, masked);
                // A driver does so when it has given back what it took.
                if !masked && self.waiting.load(SeqCst) {
                    self.room.signal();
                }
            }
        } else if let Some(queue) = number(offset, TXPROD, MAX_TX) {
            self.sent[queue].signal();
        } else if number(offset, RXPROD, MAX_RX).or(number(offset, RXPROD2, MAX_RX)).is_some() {
            self.room.signal();
        }
        Ok(())
    }

    /// What is written says nothing that the descriptors do not: an event can stand for it.
    fn doorbells(&self) -> Vec<DeviceDoorbell> {
        let doorbell = |offset, event: &Arc<Event>| {
            let event = Arc::clone(event) as _;
            DeviceDoorbell { offset, size: Some(4), value: None, event }
        };
        let sent = (0..).zip(&self.sent).map(|(index, event)| (TXPROD + STRIDE * index, event));
        let room = (0..MAX_RX as u64)
            .flat_map(|index| [RXPROD, RXPROD2].map(|first| (first + STRIDE * index, &self.room)));
        sent.chain(room).map(|(offset, event)| doorbell(offset, event)).collect()
    }
}
