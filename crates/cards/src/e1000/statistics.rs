//! Statistics registers (manual, 13.7), which reading ends. They stay at the most that they can say.

pub const FIRST: u32 = 0x4000;
pub const COUNT: usize = 64;

pub const MPC: u32 = 0x4010;
const PRC64: u32 = 0x405C;
const GPRC: u32 = 0x4074;
const BPRC: u32 = 0x4078;
const MPRC: u32 = 0x407C;
const GPTC: u32 = 0x4080;
const GORCL: u32 = 0x4088;
const GOTCL: u32 = 0x4090;
pub const RNBC: u32 = 0x40A0;
pub const ROC: u32 = 0x40AC;
const TORL: u32 = 0x40C0;
const TOTL: u32 = 0x40C8;
const TPR: u32 = 0x40D0;
const TPT: u32 = 0x40D4;
const PTC64: u32 = 0x40D8;
const MPTC: u32 = 0x40F0;
const BPTC: u32 = 0x40F4;
pub const TSCTC: u32 = 0x40F8;
pub const TSCTFC: u32 = 0x40FC;

/// The low halves of those with 64 bits.
const WIDE: [u32; 4] = [GORCL, GOTCL, TORL, TOTL];
/// Bytes of the check sequence, which count.
const CHECK: u64 = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistics(pub [u32; COUNT]);

impl Default for Statistics {
    fn default() -> Self {
        Self([0; COUNT])
    }
}

/// Those of frames of one way.
struct Way {
    sizes: u32,
    good: u32,
    all: u32,
    to_all: u32,
    to_group: u32,
    good_bytes: u32,
    bytes: u32,
}

const RECEIVED: Way = Way {
    sizes: PRC64,
    good: GPRC,
    all: TPR,
    to_all: BPRC,
    to_group: MPRC,
    good_bytes: GORCL,
    bytes: TORL,
};
const SENT: Way = Way {
    sizes: PTC64,
    good: GPTC,
    all: TPT,
    to_all: BPTC,
    to_group: MPTC,
    good_bytes: GOTCL,
    bytes: TOTL,
};

fn index(offset: u32) -> usize {
    (offset - FIRST) as usize / 4 % COUNT
}

impl Statistics {
    pub fn has(offset: u32) -> bool {
        (FIRST..FIRST + 4 * COUNT as u32).contains(&offset) && offset.is_multiple_of(4)
    }

    pub fn read(&mut self, offset: u32) -> u32 {
        let at = index(offset);
        let value = self.0[at];
        // Of wide ones the low half is read first, and the high one ends both.
        if WIDE.contains(&offset) {
            return value;
        }
        self.0[at] = 0;
        if WIDE.iter().any(|&low| low + 4 == offset) {
            self.0[at - 1] = 0;
        }
        value
    }

    pub fn add(&mut self, offset: u32, count: u64) {
        let own = &mut self.0[index(offset)];
        *own = own.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn add_wide(&mut self, offset: u32, count: u64) {
        let at = index(offset);
        let before = u64::from(self.0[at + 1]) << 32 | u64::from(self.0[at]);
        let value = before.saturating_add(count);
        (self.0[at], self.0[at + 1]) = (value as u32, (value >> 32) as u32);
    }

    /// A frame that was stored, of so many bytes.
    pub fn received(&mut self, to: [u8; 6], bytes: u64) {
        self.frames(&RECEIVED, to, 1, bytes);
    }

    /// So many frames of one size that were sent.
    pub fn sent(&mut self, to: [u8; 6], frames: u64, bytes: u64) {
        self.frames(&SENT, to, frames, bytes);
    }

    fn frames(&mut self, way: &Way, to: [u8; 6], frames: u64, bytes: u64) {
        let bytes = bytes + CHECK;
        let size = match bytes {
            ..=64 => 0,
            65..=127 => 1,
            128..=255 => 2,
            256..=511 => 3,
            512..=1023 => 4,
            _ => 5,
        };
        self.add(way.sizes + 4 * size, frames);
        self.add(way.good, frames);
        self.add(way.all, frames);
        if to == [0xFF; 6] {
            self.add(way.to_all, frames);
        } else if to[0] & 1 != 0 {
            self.add(way.to_group, frames);
        }
        self.add_wide(way.good_bytes, frames * bytes);
        self.add_wide(way.bytes, frames * bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_ends_what_was_counted() {
        let mut statistics = Statistics::default();
        statistics.received([0xFF; 6], 60);
        statistics.received([1, 0, 0x5E, 0, 0, 1], 1514);
        statistics.received([2, 0, 0, 0, 0, 1], 61);
        for (offset, value) in
            [(PRC64, 1), (PRC64 + 4, 1), (PRC64 + 20, 1), (BPRC, 1), (MPRC, 1), (GPRC, 3)]
        {
            assert_eq!((statistics.read(offset), statistics.read(offset)), (value, 0));
        }
        let bytes = 60 + 1514 + 61 + 3 * 4;
        assert_eq!((statistics.read(TORL), statistics.read(TORL)), (bytes, bytes));
        assert_eq!((statistics.read(TORL + 4), statistics.read(TORL)), (0, 0));
    }

    #[test]
    fn they_stay_at_the_most_that_they_can_say() {
        let mut statistics = Statistics::default();
        statistics.sent([0xFF; 6], u64::from(u32::MAX), 2000);
        statistics.sent([0xFF; 6], 1, 2000);
        assert_eq!(statistics.read(GPTC), u32::MAX);
        assert_eq!(statistics.read(TOTL + 4), 2004);
        statistics.0[index(TOTL)] = u32::MAX;
        statistics.0[index(TOTL) + 1] = u32::MAX;
        statistics.sent([0xFF; 6], 1, 2000);
        assert_eq!((statistics.read(TOTL), statistics.read(TOTL + 4)), (u32::MAX, u32::MAX));
    }
}
