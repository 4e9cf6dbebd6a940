//! Registers that keep what is written to them (manual, 13.4).

const VET: u32 = 0x0038;
pub const RCTL: u32 = 0x0100;
pub const TCTL: u32 = 0x0400;
pub const RDBAL: u32 = 0x2800;
const RDBAH: u32 = 0x2804;
const RDLEN: u32 = 0x2808;
const RSRPD: u32 = 0x2C00;
pub const TDBAL: u32 = 0x3800;
const TDBAH: u32 = 0x3804;
const TDLEN: u32 = 0x3808;
const TXDCTL: u32 = 0x3828;
pub const RXCSUM: u32 = 0x5000;

// RCTL.
pub const RX_ENABLE: u32 = 1 << 1;
pub const UNICAST_ALL: u32 = 1 << 3;
pub const MULTICAST_ALL: u32 = 1 << 4;
pub const LONG: u32 = 1 << 5;
pub const LOOPBACK: u32 = 3 << 6;
pub const BROADCAST: u32 = 1 << 15;
pub const VLAN_FILTER: u32 = 1 << 18;
pub const CFI_FILTER: u32 = 1 << 19;
pub const CFI_SHIFT: u32 = 20;
pub const STRIP_CRC: u32 = 1 << 26;
// TCTL. Short frames are not padded (PSP), for there is no wire that asks for it, and passt takes
// what is behind a packet for a part of it.
pub const TX_ENABLE: u32 = 1 << 1;
// RXCSUM.
pub const CHECK_IP: u32 = 1 << 8;
pub const CHECK_TRANSPORT: u32 = 1 << 9;

/// A row of them.
struct Row {
    offset: u32,
    count: u32,
    /// Bits that there are.
    mask: u32,
    reset: u32,
}

const fn one(offset: u32, mask: u32) -> Row {
    Row { offset, count: 1, mask, reset: 0 }
}

/// By their offsets. What has no use without wires (flow control, gaps between frames, LEDs, the
/// packet buffer) or without somebody to wake is kept for drivers that read it again.
const ROWS: &[Row] = &[
    Row { offset: VET, count: 1, mask: 0xFFFF, reset: 0x8100 },
    one(RCTL, 0x06DF_B3FE),
    one(0x0170, 0xFFFF),      // FCTTV
    one(0x0178, 0xC000_FFFF), // TXCW
    one(TCTL, 0x03FF_FFFA),
    one(0x0410, 0x3FFF_FFFF), // TIPG
    one(0x0448, u32::MAX),    // TBT
    one(0x0458, 0xFFFF),      // AIT
    Row { offset: 0x0E00, count: 1, mask: 0xCFCF_CFCF, reset: 0x0602 }, // LEDCTL
    Row { offset: 0x1000, count: 1, mask: 0xFFFF, reset: 0x0030 }, // PBA: 48 KiB to receive
    one(0x2160, 0x8000_FFF8), // FCRTL
    one(0x2168, 0x8000_FFF8), // FCRTH
    Row { offset: 0x2410, count: 9, mask: 0x1FFF, reset: 0 }, // RDFH to RDFPC
    one(RDBAL, 0xFFFF_FFF0),
    one(RDBAH, u32::MAX),
    one(RDLEN, 0x000F_FF80),
    Row { offset: 0x2828, count: 1, mask: 0x013F_3F3F, reset: 0x0101_0000 }, // RXDCTL
    one(RSRPD, 0x0FFF),
    one(0x3000, 1),                                           // TXDMAC
    Row { offset: 0x3410, count: 9, mask: 0x1FFF, reset: 0 }, // TDFH to TDFPC
    one(TDBAL, 0xFFFF_FFF0),
    one(TDBAH, u32::MAX),
    one(TDLEN, 0x000F_FF80),
    one(TXDCTL, 0xFF3F_3F3F),
    one(0x3830, u32::MAX), // TSPMT
    one(RXCSUM, 0x07FF),
    one(0x5800, 0x000F),                                        // WUC
    one(0x5808, 0x000F_80FF),                                   // WUFC
    one(0x5820, u32::MAX),                                      // MANC
    one(0x5838, 0x0001_000F),                                   // IPAV
    Row { offset: 0x5840, count: 8, mask: u32::MAX, reset: 0 }, // IP4AT
    Row { offset: 0x5880, count: 4, mask: u32::MAX, reset: 0 }, // IP6AT
    Row { offset: 0x5F00, count: 8, mask: 0x07FF, reset: 0 },   // FFLT
];

const COUNT: usize = {
    let (mut count, mut at) = (0, 0);
    while at < ROWS.len() {
        count += ROWS[at].count as usize;
        at += 1;
    }
    count
};

/// Where registers of the manual's 82542 are too (manual, 13.4: alternate offsets).
const ALIASES: &[(u32, u32, u32)] = &[
    // From, so many bytes, to.
    (0x0040, 0x80, 0x5400),
    (0x0108, 4, 0x2820),
    (0x0110, 12, 0x2800),
    (0x0120, 4, 0x2810),
    (0x0128, 4, 0x2818),
    (0x0160, 4, 0x2168),
    (0x0168, 4, 0x2160),
    (0x0200, 0x200, 0x5200),
    (0x0420, 12, 0x3800),
    (0x0430, 4, 0x3810),
    (0x0438, 4, 0x3818),
    (0x0440, 4, 0x3820),
    (0x0600, 0x200, 0x5600),
];

/// The offset by which a register is known here.
pub fn canonical(offset: u32) -> u32 {
    let alias = ALIASES.iter().find(|&&(from, bytes, _)| (from..from + bytes).contains(&offset));
    alias.map_or(offset, |&(from, _, to)| to + offset - from)
}

fn place(offset: u32) -> Option<(usize, &'static Row)> {
    let mut before = 0;
    for row in ROWS {
        if let Some(bytes) = offset.checked_sub(row.offset)
            && bytes / 4 < row.count
        {
            return bytes.is_multiple_of(4).then_some((before + bytes as usize / 4, row));
        }
        before += row.count as usize;
    }
    None
}

/// The place of one that there is, known before.
const fn known(offset: u32) -> usize {
    let (mut at, mut before) = (0, 0);
    while ROWS[at].offset != offset {
        before += ROWS[at].count as usize;
        at += 1;
    }
    before
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File([u32; COUNT]);

impl Default for File {
    fn default() -> Self {
        let mut words = [0; COUNT];
        let mut left = &mut words[..];
        for row in ROWS {
            let (own, rest) = left.split_at_mut(row.count as usize);
            own.fill(row.reset);
            left = rest;
        }
        Self(words)
    }
}

impl File {
    /// None for a register that is none of them.
    pub fn read(&self, offset: u32) -> Option<u32> {
        place(offset).map(|(at, _)| self.0[at])
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        if let Some((at, row)) = place(offset) {
            self.0[at] = value & row.mask;
        }
    }

    pub fn rx_control(&self) -> u32 {
        self.0[const { known(RCTL) }]
    }

    pub fn tx_control(&self) -> u32 {
        self.0[const { known(TCTL) }]
    }

    pub fn checks(&self) -> u32 {
        self.0[const { known(RXCSUM) }]
    }

    /// The Ethernet type of tags.
    pub fn tag_type(&self) -> [u8; 2] {
        (self.0[const { known(VET) }] as u16).to_be_bytes()
    }

    /// Frames of so many bytes at most are small ones.
    pub fn small(&self) -> u32 {
        self.0[const { known(RSRPD) }]
    }

    /// Descriptors that are left to send at which the driver wants to hear of it; 0: it does not.
    pub fn low_threshold(&self) -> u32 {
        (self.0[const { known(TXDCTL) }] >> 25) * 8
    }

    /// Bytes of a receive buffer (RCTL.BSIZE and BSEX).
    pub fn buffer(&self) -> u32 {
        let control = self.rx_control();
        match (control >> 25 & 1, control >> 16 & 3) {
            (1, size @ 1..) => 32_768 >> size,
            (_, size) => 2048 >> size,
        }
    }

    /// Address and length in bytes of a ring whose first register is `base`.
    pub fn ring(&self, base: u32) -> (u64, u32) {
        let [low, high, length] =
            [0, 4, 8].map(|offset| self.read(base + offset).unwrap_or_default());
        (u64::from(high) << 32 | u64::from(low), length)
    }

    pub fn save(&self) -> Vec<u32> {
        self.0.to_vec()
    }

    /// None where it is of another.
    pub fn load(words: &[u32]) -> Option<Self> {
        let mut words: [u32; COUNT] = words.try_into().ok()?;
        let masks = ROWS.iter().flat_map(|row| (0..row.count).map(|_| row.mask));
        words.iter_mut().zip(masks).for_each(|(word, mask)| *word &= mask);
        Some(Self(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_apart() {
        for pair in ROWS.windows(2) {
            assert!(pair[0].offset + 4 * pair[0].count <= pair[1].offset);
        }
        for row in ROWS {
            assert_eq!(row.reset & !row.mask, 0, "{:#x}", row.offset);
        }
    }

    #[test]
    fn registers_keep_the_bits_that_they_have() {
        let mut file = File::default();
        for offset in [RCTL, 0x2410, 0x2430, 0x5F1C] {
            let mask = place(offset).unwrap().1.mask;
            file.write(offset, u32::MAX);
            assert_eq!(file.read(offset), Some(mask));
        }
        for offset in [0x103, 0x2434, 0x5F20, 0x1_FFFC] {
            file.write(offset, u32::MAX);
            assert_eq!(file.read(offset), None);
        }
        assert_eq!(File::load(&file.save()), Some(file));
        assert_eq!(File::load(&[0; COUNT - 1]), None);
    }

    #[test]
    fn buffers_have_the_sizes_of_the_manual() {
        let sizes = [(0, [2048, 1024, 512, 256]), (1, [2048, 16_384, 8192, 4096])];
        for (extended, sizes) in sizes {
            for (size, bytes) in (0..).zip(sizes) {
                let mut file = File::default();
                file.write(RCTL, extended << 25 | size << 16);
                assert_eq!(file.buffer(), bytes);
            }
        }
    }

    #[test]
    fn alternate_offsets_are_those_of_other_registers() {
        for (from, to) in [(0x110, RDBAL), (0x118, RDLEN), (0x438, 0x3818), (0x3FC, 0x53FC)] {
            assert_eq!(canonical(from), to);
        }
        assert_eq!(canonical(RCTL), RCTL);
    }
}
