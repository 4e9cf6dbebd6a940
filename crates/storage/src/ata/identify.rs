//! What a drive says of itself: 256 words (ATA8-ACS 7.12, 7.13).

use tetrarch_block::BlockInfo;

/// Who a drive is, in ASCII.
pub struct About<'a> {
    pub serial: &'a str,
    pub model: &'a str,
}

/// Values that a driver may have changed.
pub struct Current {
    pub write_cache: bool,
    /// Sectors of a block of READ MULTIPLE; 0: it is not set up.
    pub multiple: u8,
    /// What SET FEATURES chose: a mode of UDMA or multi-word DMA.
    pub mode: u8,
    /// Heads, and sectors of a track.
    pub geometry: (u64, u64),
    /// The controller is one of Serial ATA.
    pub serial: bool,
}

/// The most sectors of a block of READ MULTIPLE.
pub const MULTIPLE: u8 = 16;
/// Commands that a queue holds.
const QUEUE_DEPTH: u16 = 32;

struct Words([u16; 256]);

impl Words {
    /// Two characters a word, the first in its high byte.
    fn text(&mut self, at: usize, words: usize, text: &str) {
        let mut ascii = text.bytes().filter(|byte| (0x20..0x7F).contains(byte));
        for word in &mut self.0[at..at + words] {
            let mut next = || u16::from(ascii.next().unwrap_or(b' '));
            *word = next() << 8 | next();
        }
    }

    fn number(&mut self, at: usize, words: usize, value: u64) {
        for index in 0..words {
            self.0[at + index] = (value >> (16 * index)) as u16;
        }
    }

    fn common(&mut self, about: &About<'_>, current: &Current) {
        self.text(10, 10, about.serial);
        self.text(23, 4, "1.0");
        self.text(27, 20, about.model);
        self.0[49] = 1 << 11 | 1 << 9 | 1 << 8; // IORDY, LBA, DMA
        self.0[53] = 0b111; // words 54 to 58, 64 to 70 and 88 are valid
        let mode = u16::from(current.mode & 7);
        let selected = |kind: u8| if current.mode >> 3 == kind { 1 << (8 + mode) } else { 0 };
        self.0[63] = 0x07 | selected(0b00100); // multi-word DMA 0 to 2
        self.0[64] = 0b11; // PIO 3 and 4
        (65..=68).for_each(|at| self.0[at] = 120); // ns of a cycle
        self.0[80] = 0x01F0; // ATA/ATAPI-4 to ATA8-ACS
        self.0[83] = 1 << 14;
        self.0[84] = 1 << 14;
        self.0[87] = 1 << 14;
        self.0[88] = 0x3F | selected(0b01000); // UDMA 0 to 5
        // Of a parallel device: a cable of 80 wires. A serial one's speeds are 1.5 to 6 Gbit/s.
        if current.serial {
            self.0[76] = 0b1110;
            self.0[77] = 3 << 1;
        } else {
            self.0[93] = 1 << 14 | 1 << 13 | 1;
        }
    }

    fn bytes(mut self) -> Vec<u8> {
        // Integrity word (7.12.7.96): all bytes add up to 0.
        self.0[255] = 0xA5;
        let sum = self.0.iter().flat_map(|word| word.to_le_bytes()).fold(0u8, u8::wrapping_add);
        self.0[255] |= u16::from(sum.wrapping_neg()) << 8;
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// Cylinders of a geometry, of which 16383 stand for more too.
pub fn cylinders(sectors: u64, (heads, of_track): (u64, u64)) -> u64 {
    (sectors / (heads * of_track).max(1)).min(16383)
}

/// IDENTIFY DEVICE.
pub fn disk(about: &About<'_>, current: &Current, info: &BlockInfo) -> Vec<u8> {
    let mut words = Words([0; 256]);
    words.common(about, current);
    let sectors = info.size / 512;
    let (heads, of_track) = current.geometry;
    let of_default = cylinders(sectors, (16, 63));
    words.0[0] = 1 << 6; // a fixed drive
    words.number(1, 1, of_default);
    words.number(3, 1, 16);
    words.number(6, 1, 63);
    words.0[47] = 0x8000 | u16::from(MULTIPLE);
    words.0[50] = 1 << 14;
    let current_cylinders = cylinders(sectors, current.geometry);
    words.number(54, 1, current_cylinders);
    words.number(55, 1, heads);
    words.number(56, 1, of_track);
    words.number(57, 2, current_cylinders * heads * of_track);
    words.0[59] = if current.multiple > 0 { 1 << 8 | u16::from(current.multiple) } else { 0 };
    words.number(60, 2, sectors.min(0x0FFF_FFFF));
    if current.serial {
        words.0[75] = QUEUE_DEPTH - 1;
        words.0[76] |= 1 << 8; // it has a command queue
    }
    words.0[82] = 1 << 14 | 1 << 5; // NOP, write cache
    words.0[83] |= 1 << 13 | 1 << 12 | 1 << 10; // flushes, 48 bits
    words.0[84] |= 1 << 6; // writes with forced unit access
    words.0[85] = 1 << 14 | u16::from(current.write_cache) << 5;
    words.0[86] = 1 << 13 | 1 << 12 | 1 << 10;
    words.0[87] |= 1 << 6;
    words.number(100, 4, sectors);
    words.0[105] = super::TRIM_BLOCKS as u16;
    words.0[106] = 1 << 14 | 1 << 13 | 3; // 8 logical sectors in a physical one
    words.0[169] = 1; // TRIM
    words.0[217] = 1; // nothing turns
    words.bytes()
}

/// IDENTIFY PACKET DEVICE: a CD-ROM, removable, with packets of 12 bytes.
pub fn packet(about: &About<'_>, current: &Current) -> Vec<u8> {
    let mut words = Words([0; 256]);
    words.common(about, current);
    words.0[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
    words.0[82] = 1 << 4; // packets
    words.0[85] = 1 << 4;
    words.bytes()
}
