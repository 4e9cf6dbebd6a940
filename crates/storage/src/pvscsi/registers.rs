//! Registers that are touched for requests and interrupts: kicks, and what has happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceDoorbell, DeviceError, Interrupt};
use tetrarch_devices::Drive;
use tetrarch_io::Event;

/// From the second page on: what happened, what of it interrupts, and the kicks, one for requests
/// that read or write and one for others.
const STATUS: u64 = 0x000C;
const MASK: u64 = 0x1010;
const KICK_OTHER: u64 = 0x2014;
const KICK_TRANSFER: u64 = 0x3018;

/// There are completions, and there is a message.
pub const COMPLETION: u32 = 1 << 0;
pub const MESSAGE: u32 = 1 << 2;
const ALL: u32 = 0xF;

/// What has happened, and how the driver hears of it.
///
/// Lock: `line`, under which the line follows the registers.
pub struct Interrupts {
    status: AtomicU32,
    mask: AtomicU32,
    line: Mutex<Drive>,
    messages: Vec<Arc<dyn Interrupt>>,
}

impl Interrupts {
    /// `line` is high while something has happened; each of `messages` is raised when it does.
    pub fn new(line: Drive, messages: Vec<Arc<dyn Interrupt>>) -> Self {
        let (status, mask) = (AtomicU32::new(0), AtomicU32::new(0));
        Self { status, mask, line: Mutex::new(line), messages }
    }

    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, SeqCst);
        self.drive();
        self.send(bits);
    }

    /// Each time, since drivers that get messages leave the status as it is.
    fn send(&self, bits: u32) {
        if bits & self.mask.load(SeqCst) != 0 {
            self.messages.iter().for_each(|message| message.raise());
        }
    }

    fn drive(&self) {
        let line = self.line.lock();
        line(self.status.load(SeqCst) & self.mask.load(SeqCst) != 0);
    }

    fn clear(&self, bits: u32) {
        self.status.fetch_and(!bits, SeqCst);
        self.drive();
    }

    fn set_mask(&self, mask: u32) {
        let new = mask & ALL & !self.mask.swap(mask & ALL, SeqCst);
        self.drive();
        self.send(self.status.load(SeqCst) & new);
    }

    /// As after a reset of the adapter, which leaves the mask.
    pub fn reset(&self) {
        self.clear(ALL);
    }

    /// Status and mask.
    pub fn save(&self) -> (u32, u32) {
        (self.status.load(SeqCst), self.mask.load(SeqCst))
    }

    /// The line is as it was then; nothing is sent.
    pub fn load(&self, (status, mask): (u32, u32)) {
        self.status.store(status & ALL, SeqCst);
        self.mask.store(mask & ALL, SeqCst);
        self.drive();
    }
}

/// The registers from the second page on.
pub struct RingRegisters {
    pub(super) interrupts: Arc<Interrupts>,
    /// Of the I/O thread: there are requests.
    pub(super) event: Arc<Event>,
}

impl Device for RingRegisters {
    fn read(&self, offset: u64, _size: u8) -> Result<u64, DeviceError> {
        let (status, mask) = self.interrupts.save();
        Ok(match offset {
            STATUS => status.into(),
            MASK => mask.into(),
            _ => 0,
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        match (offset, size) {
            (STATUS, 4..) => {
                self.interrupts.clear(value as u32 & ALL);
                // Completions may have waited for the driver to take others.
                self.event.signal();
            }
            (MASK, 4..) => self.interrupts.set_mask(value as u32),
            (KICK_OTHER | KICK_TRANSFER, _) => self.event.signal(),
            _ => {}
        }
        Ok(())
    }

    /// What a kick writes says nothing: an event can stand for one.
    fn doorbells(&self) -> Vec<DeviceDoorbell> {
        let doorbell = |offset| {
            let event = Arc::clone(&self.event);
            DeviceDoorbell { offset, size: Some(4), value: None, event: event as _ }
        };
        vec![doorbell(KICK_OTHER), doorbell(KICK_TRANSFER)]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    struct Count(AtomicU32);

    impl Interrupt for Count {
        fn raise(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn line_follows_status_and_mask_and_a_message_is_sent_of_each() {
        let level = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(Count(AtomicU32::new(0)));
        let seen = Arc::clone(&level);
        let line: Drive = Box::new(move |level| seen.store(level, SeqCst));
        let interrupts = Arc::new(Interrupts::new(line, vec![Arc::clone(&sent) as _]));
        let event = Arc::new(Event::new().unwrap());
        let registers = RingRegisters { interrupts: Arc::clone(&interrupts), event };
        let now = || (level.load(SeqCst), sent.0.load(SeqCst));
        interrupts.raise(COMPLETION);
        assert_eq!(now(), (false, 0), "masked");
        registers.write(MASK, 4, u64::MAX).unwrap();
        assert_eq!(registers.read(MASK, 4).unwrap(), 0xF);
        assert_eq!(now(), (true, 1));
        interrupts.raise(COMPLETION);
        assert_eq!(now(), (true, 2), "the status need not be cleared for messages");
        registers.write(MASK, 4, 0xF).unwrap();
        assert_eq!(now(), (true, 2), "nothing is new");
        interrupts.raise(MESSAGE);
        registers.write(STATUS, 4, COMPLETION.into()).unwrap();
        assert_eq!(now(), (true, 3));
        assert_eq!(registers.read(STATUS, 4).unwrap(), u64::from(MESSAGE));
        registers.write(STATUS, 2, 0xFF).unwrap();
        assert_eq!(now(), (true, 3), "a part of a register is none");
        registers.write(STATUS, 4, 0xFF).unwrap();
        assert_eq!(now(), (false, 3));
        for offset in [KICK_OTHER, KICK_TRANSFER] {
            registers.event.take();
            registers.write(offset, 4, 0).unwrap();
            assert!(registers.event.take());
        }
    }
}
