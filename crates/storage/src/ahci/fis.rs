//! Frames that a device sends, as a port writes them into memory (4.2.1).

use tetrarch_memory::{GuestMemory, GuestPhys};

use crate::ata::TaskFile;

/// Where each is in the area of received frames.
const PIO_SETUP: u64 = 0x20;
const REGISTERS: u64 = 0x40;
const DEVICE_BITS: u64 = 0x58;

/// Types of frames.
const TYPE_REGISTERS: u8 = 0x34;
const TYPE_PIO_SETUP: u8 = 0x5F;
const TYPE_DEVICE_BITS: u8 = 0xA1;
/// From the host: registers.
pub const TYPE_COMMAND: u8 = 0x27;

/// In the byte after the type.
const INTERRUPT: u8 = 1 << 6;
const TO_HOST: u8 = 1 << 5;

/// Status and error of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Result {
    pub status: u8,
    pub error: u8,
}

/// Where a port's frames go; nowhere while it receives none. A driver that gives an address
/// without memory gets none.
pub struct Received<'a> {
    pub memory: &'a GuestMemory,
    pub base: Option<u64>,
}

impl Received<'_> {
    fn write(&self, offset: u64, frame: &[u8]) {
        if let Some(base) = self.base {
            let _ = self.memory.write(GuestPhys(base.wrapping_add(offset)), frame);
        }
    }

    fn frame(kind: u8, flags: u8, result: Result, task: &TaskFile) -> [u8; 20] {
        let (lba, count) = (task.lba.to_le_bytes(), task.count.to_le_bytes());
        let mut frame = [0; 20];
        frame[..8].copy_from_slice(&[
            kind,
            flags,
            result.status,
            result.error,
            lba[0],
            lba[1],
            lba[2],
            task.device,
        ]);
        frame[8..11].copy_from_slice(&lba[3..6]);
        frame[12..14].copy_from_slice(&count);
        frame
    }

    /// Register FIS (10.3.5): how a command ended.
    pub fn registers(&self, result: Result, task: &TaskFile, interrupt: bool) {
        let flags = if interrupt { INTERRUPT } else { 0 };
        self.write(REGISTERS, &Self::frame(TYPE_REGISTERS, flags, result, task));
    }

    /// PIO Setup FIS (10.3.11): data follows, and with it the status at the end.
    pub fn pio_setup(&self, before: Result, after: Result, task: &TaskFile, bytes: u64, in_: bool) {
        let flags = INTERRUPT | if in_ { TO_HOST } else { 0 };
        let mut frame = Self::frame(TYPE_PIO_SETUP, flags, before, task);
        frame[15] = after.status;
        frame[16..18].copy_from_slice(&(bytes as u16).to_le_bytes());
        self.write(PIO_SETUP, &frame);
    }

    /// Set Device Bits FIS (10.3.6): queued commands have ended, those of the bits.
    pub fn device_bits(&self, result: Result, ended: u32) {
        let mut frame = [0; 8];
        // Status without BSY and DRQ, which it leaves as they are.
        let status = result.status & 0x77;
        frame[..4].copy_from_slice(&[TYPE_DEVICE_BITS, INTERRUPT, status, result.error]);
        frame[4..].copy_from_slice(&ended.to_le_bytes());
        self.write(DEVICE_BITS, &frame);
    }
}
