//! Why a SCSI command failed (SPC-3, 4.5): key, additional code and its qualifier.

use tetrarch_block::BlockError;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sense {
    pub key: u8,
    pub code: u8,
    pub qualifier: u8,
}

impl Sense {
    pub const NONE: Self = Self { key: 0, code: 0, qualifier: 0 };
    pub const NO_MEDIUM: Self = Self { key: 2, code: 0x3A, qualifier: 0x02 };
    /// It was stopped, and waits for START STOP UNIT.
    pub const STOPPED: Self = Self { key: 2, code: 0x04, qualifier: 0x02 };
    pub const WRITE_ERROR: Self = Self { key: 3, code: 0x0C, qualifier: 0 };
    pub const READ_ERROR: Self = Self { key: 3, code: 0x11, qualifier: 0 };
    pub const LIST_LENGTH: Self = Self { key: 5, code: 0x1A, qualifier: 0 };
    pub const INVALID_COMMAND: Self = Self { key: 5, code: 0x20, qualifier: 0 };
    pub const OUT_OF_RANGE: Self = Self { key: 5, code: 0x21, qualifier: 0 };
    pub const INVALID_FIELD: Self = Self { key: 5, code: 0x24, qualifier: 0 };
    pub const NO_SUCH_UNIT: Self = Self { key: 5, code: 0x25, qualifier: 0 };
    pub const INVALID_PARAMETER: Self = Self { key: 5, code: 0x26, qualifier: 0 };
    pub const NOT_SAVED: Self = Self { key: 5, code: 0x39, qualifier: 0 };
    pub const PREVENTED: Self = Self { key: 5, code: 0x53, qualifier: 0x02 };
    pub const MEDIUM_CHANGED: Self = Self { key: 6, code: 0x28, qualifier: 0 };
    pub const RESET: Self = Self { key: 6, code: 0x29, qualifier: 0 };
    pub const CAPACITY_CHANGED: Self = Self { key: 6, code: 0x2A, qualifier: 0x09 };
    pub const PROTECTED: Self = Self { key: 7, code: 0x27, qualifier: 0 };
    /// A thin disk finds no room (SBC-3, 4.7.3.5).
    pub const NO_SPACE: Self = Self { key: 7, code: 0x27, qualifier: 0x07 };

    /// What the host could not do for a disk.
    pub fn of(error: BlockError, writes: bool) -> Self {
        match error {
            BlockError::Beyond { .. } => Self::OUT_OF_RANGE,
            BlockError::ReadOnly => Self::PROTECTED,
            BlockError::NoSpace => Self::NO_SPACE,
            _ if writes => Self::WRITE_ERROR,
            _ => Self::READ_ERROR,
        }
    }

    /// Fixed format (4.5.3).
    pub fn bytes(self) -> Vec<u8> {
        let mut data = vec![0; 18];
        (data[0], data[2], data[7]) = (0x70, self.key, 10);
        (data[12], data[13]) = (self.code, self.qualifier);
        data
    }

    /// The error register of a packet command that ends so (ATA8-ACS, 7.22.5).
    pub fn error(self) -> u8 {
        const ABORT: u8 = 1 << 2;
        self.key << 4 | if self.key == 5 { ABORT } else { 0 }
    }
}
