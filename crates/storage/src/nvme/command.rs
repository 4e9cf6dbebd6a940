//! A command as it stands in a submission queue (4.2).

/// Bytes of a submission queue's entry.
pub const ENTRY: usize = 64;

/// The 16 words of an entry, read once: the guest may change them meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Command([u64; 8]);

impl Command {
    pub fn new(entry: [u64; 8]) -> Self {
        Self(entry.map(u64::from_le))
    }

    pub fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    pub fn id(&self) -> u16 {
        (self.word(0) >> 16) as u16
    }

    /// Neither one of a fused pair nor with SGLs: we have none of them.
    pub fn is_plain(&self) -> bool {
        self.word(0) >> 8 & 0b1100_0011 == 0
    }

    pub fn namespace(&self) -> u32 {
        self.word(1)
    }

    /// PRP entries 1 and 2.
    pub fn prps(&self) -> (u64, u64) {
        (self.0[3], self.0[4])
    }

    /// A word of 32 bits; from 10 on they are the command's own.
    pub fn word(&self, index: usize) -> u32 {
        (self.0[index / 2] >> (32 * (index % 2))) as u32
    }
}
