//! The registers of a device (ATA8-APT 7): what software writes goes to both on a cable.

use crate::ata::{Drive, TaskFile, status};

/// Bits of the device register: which of the two, and the bits that are always there.
pub const SELECT: u8 = 1 << 4;
const OBSOLETE: u8 = 0xA0;

/// Interrupt reason of packet commands, in the count register: the host gives a packet; data
/// goes to the host.
pub const PACKET: u8 = 1 << 0;
pub const TO_HOST: u8 = 1 << 1;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub status: u8,
    pub error: u8,
    /// What was written last, and what before it in the high byte.
    pub features: u16,
    pub count: u16,
    pub lba: [u16; 3],
    pub device: u8,
}

fn push(register: &mut u16, value: u8) {
    *register = *register << 8 | u16::from(value);
}

impl Registers {
    /// Offsets 1 to 6 of the ports.
    pub fn write(&mut self, offset: u64, value: u8) {
        match offset {
            1 => push(&mut self.features, value),
            2 => push(&mut self.count, value),
            3..=5 => push(&mut self.lba[(offset - 3) as usize], value),
            6 => self.device = value,
            _ => {}
        }
    }

    /// The same; `before` asks for what was written before the last (HOB).
    pub fn read(&self, offset: u64, before: bool) -> u8 {
        let byte = |register: u16| (if before { register >> 8 } else { register }) as u8;
        match offset {
            1 => self.error,
            2 => byte(self.count),
            3..=5 => byte(self.lba[(offset - 3) as usize]),
            6 => self.device | OBSOLETE,
            _ => self.status,
        }
    }

    pub fn task(&self, command: u8) -> TaskFile {
        let lba = self.lba.iter().enumerate().fold(0, |lba, (index, &register)| {
            let (low, high) = (u64::from(register & 0xFF), u64::from(register >> 8));
            lba | low << (8 * index) | high << (8 * index + 24)
        });
        let Self { features, count, device, .. } = *self;
        TaskFile { command, features, count, lba, device }
    }

    /// The bytes of a block of a packet command's data.
    pub fn set_byte_count(&mut self, bytes: u16) {
        (self.lba[1], self.lba[2]) = (bytes & 0xFF, bytes >> 8);
    }

    /// The most that the host takes in a block, an even number.
    pub fn byte_limit(&self) -> usize {
        match self.lba[1] & 0xFF | (self.lba[2] & 0xFF) << 8 {
            0 | 0xFFFF => 0xFFFE,
            1 => 2,
            limit => usize::from(limit & !1),
        }
    }

    /// As after a reset: the registers say what the device is.
    pub fn sign(&mut self, drive: &Drive) {
        let (count, lba) = drive.signature();
        // A packet device is not ready before it was asked who it is (ATA8-ACS 9.12).
        let ready = if drive.is_packet() { 0 } else { status::READY | status::SEEK };
        *self = Self {
            status: ready,
            error: 1,
            count,
            lba: [lba & 0xFF, lba >> 8 & 0xFF, lba >> 16 & 0xFF].map(|byte| byte as u16),
            features: 0,
            device: self.device,
        };
    }
}
