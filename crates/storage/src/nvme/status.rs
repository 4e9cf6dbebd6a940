//! Ends of commands (4.6.1).

use tetrarch_block::BlockError;

/// The status field without its phase: the code, its type from bit 8, Do Not Retry in bit 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u16);

/// A retry of what was refused is refused too.
const DO_NOT_RETRY: u16 = 1 << 14;

impl Status {
    pub const SUCCESS: Self = Self(0);
    // Generic (figure 127).
    pub const INVALID_OPCODE: Self = Self(0x01 | DO_NOT_RETRY);
    pub const INVALID_FIELD: Self = Self(0x02 | DO_NOT_RETRY);
    pub const DATA_TRANSFER: Self = Self(0x04 | DO_NOT_RETRY);
    pub const INVALID_NAMESPACE: Self = Self(0x0B | DO_NOT_RETRY);
    pub const SEQUENCE: Self = Self(0x0C | DO_NOT_RETRY);
    pub const PRP_OFFSET: Self = Self(0x13 | DO_NOT_RETRY);
    const WRITE_PROTECTED: Self = Self(0x20 | DO_NOT_RETRY);
    pub const LBA_RANGE: Self = Self(0x80 | DO_NOT_RETRY);
    const CAPACITY: Self = Self(0x81 | DO_NOT_RETRY);
    // Of a command (figure 128).
    pub const INVALID_COMPLETION_QUEUE: Self = Self(0x100 | DO_NOT_RETRY);
    pub const INVALID_QUEUE: Self = Self(0x101 | DO_NOT_RETRY);
    pub const INVALID_QUEUE_SIZE: Self = Self(0x102 | DO_NOT_RETRY);
    pub const TOO_MANY_EVENT_REQUESTS: Self = Self(0x105 | DO_NOT_RETRY);
    pub const INVALID_VECTOR: Self = Self(0x108 | DO_NOT_RETRY);
    pub const INVALID_LOG_PAGE: Self = Self(0x109 | DO_NOT_RETRY);
    pub const INVALID_QUEUE_DELETION: Self = Self(0x10C | DO_NOT_RETRY);
    pub const NOT_SAVEABLE: Self = Self(0x10D | DO_NOT_RETRY);
    // Of the medium (figure 130).
    const WRITE_FAULT: Self = Self(0x280 | DO_NOT_RETRY);
    const READ_FAULT: Self = Self(0x281 | DO_NOT_RETRY);

    /// As it stands in a completion, above the phase bit.
    pub fn bits(self) -> u16 {
        self.0
    }

    pub fn of(result: Result<(), BlockError>, writes: bool) -> Self {
        match result {
            Ok(()) => Self::SUCCESS,
            Err(BlockError::Beyond { .. }) => Self::LBA_RANGE,
            Err(BlockError::ReadOnly) => Self::WRITE_PROTECTED,
            Err(BlockError::NoSpace) => Self::CAPACITY,
            Err(_) if writes => Self::WRITE_FAULT,
            Err(_) => Self::READ_FAULT,
        }
    }
}
