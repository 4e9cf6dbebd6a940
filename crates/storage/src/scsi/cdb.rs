//! Command descriptor blocks (SPC-3, 4.3).

/// Bytes of the longest that there are here.
pub const LONGEST: usize = 16;

/// A command: its bytes, and zeroes behind them.
#[derive(Clone, Copy, Debug)]
pub struct Cdb(pub [u8; LONGEST]);

impl Cdb {
    pub fn code(&self) -> u8 {
        self.0[0]
    }

    pub fn byte(&self, at: usize) -> u8 {
        self.0[at]
    }

    /// Big-endian.
    pub fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    pub fn long(&self, at: usize) -> u32 {
        u32::from(self.word(at)) << 16 | u32::from(self.word(at + 2))
    }

    pub fn quad(&self, at: usize) -> u64 {
        u64::from(self.long(at)) << 32 | u64::from(self.long(at + 4))
    }

    /// First block and number of blocks, by the length that the code's group has (SPC-3, 4.3.4.1).
    pub fn blocks(&self) -> (u64, u64) {
        match self.code() >> 5 {
            0 => {
                let first = self.long(0) & 0x1F_FFFF;
                let count = self.byte(4);
                (first.into(), if count == 0 { 256 } else { count.into() })
            }
            1 | 2 => (self.long(2).into(), self.word(7).into()),
            5 => (self.long(2).into(), self.long(6).into()),
            _ => (self.quad(2), self.long(10).into()),
        }
    }
}
