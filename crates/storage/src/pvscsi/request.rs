//! A request as it stands in its ring, and how it ends.

use crate::scsi::{Cdb, Sense};

/// Bytes of a request.
pub const REQUEST: usize = 128;
/// Bytes of a completion.
pub const COMPLETION: usize = 32;

/// Flags of a request.
const SCATTERED: u32 = 1 << 0;
const LONG_COMMAND: u32 = 1 << 1;
const NO_DATA: u32 = 1 << 2;
const TO_GUEST: u32 = 1 << 3;
const FROM_GUEST: u32 = 1 << 4;

/// How the adapter fared with a request; the device has a status of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostStatus(pub u16);

impl HostStatus {
    pub const SUCCESS: Self = Self(0x00);
    /// There is no such target.
    pub const SELECTION_TIMEOUT: Self = Self(0x11);
    /// The buffer is shorter than what the command moves.
    pub const DATA_RUN: Self = Self(0x12);
    /// In the request or in its list of segments.
    pub const INVALID_PARAMETER: Self = Self(0x1A);
    pub const HARDWARE: Self = Self(0x20);
    pub const BUS_RESET: Self = Self(0x25);
}

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToGuest,
    FromGuest,
}

/// Read once: the guest may change it meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Request([u8; REQUEST]);

impl Request {
    pub fn new(bytes: [u8; REQUEST]) -> Self {
        Self(bytes)
    }

    pub fn of_words(words: [u64; REQUEST / 8]) -> Self {
        let mut bytes = [0; REQUEST];
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
        }
        Self(bytes)
    }

    fn quad(&self, at: usize) -> u64 {
        let mut quad = [0; 8];
        quad.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(quad)
    }

    fn long(&self, at: usize) -> u32 {
        (self.quad(at & !7) >> (8 * (at & 7))) as u32
    }

    pub fn context(&self) -> u64 {
        self.quad(0)
    }

    /// Of the data, or of the list of its segments.
    pub fn address(&self) -> u64 {
        self.quad(8)
    }

    /// Bytes of the guest's buffer.
    pub fn room(&self, way: Way) -> Result<u64, HostStatus> {
        let against = match way {
            Way::ToGuest => FROM_GUEST,
            Way::FromGuest => TO_GUEST,
        };
        if self.flags() & against != 0 {
            return Err(HostStatus::INVALID_PARAMETER);
        }
        Ok(if self.flags() & NO_DATA != 0 { 0 } else { self.quad(16) })
    }

    /// Where sense data goes, and how many bytes of it at most.
    pub fn sense(&self) -> (u64, u32) {
        (self.quad(24), self.long(32))
    }

    fn flags(&self) -> u32 {
        self.long(36)
    }

    pub fn is_scattered(&self) -> bool {
        self.flags() & SCATTERED != 0
    }

    /// `None` where it is longer than any here.
    pub fn cdb(&self) -> Option<Cdb> {
        let mut cdb = [0; 16];
        let length = usize::from(self.0[56]);
        if length > cdb.len() || self.flags() & LONG_COMMAND != 0 {
            return None;
        }
        cdb[..length].copy_from_slice(&self.0[40..40 + length]);
        Some(Cdb(cdb))
    }

    /// Whether it is for unit 0.
    pub fn is_for_first_unit(&self) -> bool {
        self.0[57..65].iter().all(|&byte| byte == 0)
    }

    /// There is bus 0 alone.
    pub fn target(&self) -> Option<usize> {
        (self.0[66] == 0).then_some(self.0[67].into())
    }
}

/// Where a request's end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Ring,
    /// At an address of its own.
    At(u64),
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub reply: Reply,
    pub context: u64,
    /// Moved.
    pub bytes: u64,
    pub host: HostStatus,
    /// Why the device failed it.
    pub sense: Option<Sense>,
    /// Where that goes, and how many bytes of it at most.
    pub sense_place: (u64, u32),
}

impl Completion {
    /// One that went well, so far.
    pub fn new(reply: Reply, context: u64, sense_place: (u64, u32)) -> Self {
        let (bytes, host, sense) = (0, HostStatus::SUCCESS, None);
        Self { reply, context, bytes, host, sense, sense_place }
    }

    /// As it stands in its ring, with so many bytes of sense data written.
    pub fn words(&self, sense_bytes: u32) -> [u64; COMPLETION / 8] {
        /// CHECK CONDITION (SAM-4, 5.3).
        const CHECK: u64 = 2;
        let scsi = if self.sense.is_some() { CHECK } else { 0 };
        let statuses = u64::from(self.host.0) | scsi << 16;
        let third = u64::from(sense_bytes) | statuses << 32;
        [self.context.to_le(), self.bytes.to_le(), third.to_le(), 0]
    }
}
