//! Receive side scaling (upt1_defs.h, struct UPT1_RSSConf): which queue gets a frame.

use tetrarch_net::{Contents, Family};

/// Bytes of the structure.
pub const BYTES: usize = 176;
const KEY: usize = 8;
const KEY_BYTES: usize = 40;
const TABLE: usize = 48;
const MAX_ENTRIES: usize = 128;

// Kinds of hashes, as bits.
const IPV4: u16 = 1;
const TCP_IPV4: u16 = 2;
const IPV6: u16 = 4;
const TCP_IPV6: u16 = 8;
const TOEPLITZ: u16 = 1;

/// What a driver has asked for.
pub struct Rss {
    bytes: [u8; BYTES],
    kinds: u16,
    entries: usize,
}

impl Rss {
    /// None for what is no such structure.
    pub fn new(bytes: [u8; BYTES]) -> Option<Self> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (kinds, function, key, entries) = (word(0), word(2), word(4), word(6));
        let entries = usize::from(entries);
        let sound = function == TOEPLITZ
            && usize::from(key) == KEY_BYTES
            && (1..=MAX_ENTRIES).contains(&entries);
        sound.then_some(Self { bytes, kinds, entries })
    }

    pub fn bytes(&self) -> &[u8; BYTES] {
        &self.bytes
    }

    /// Queue, kind as completions have it, and hash of a frame. Frames without a hash go to the first
    /// queue.
    pub fn queue(
        &self,
        contents: Option<&Contents>,
        frame: &[u8],
        queues: usize,
    ) -> (usize, u32, u32) {
        let Some(contents) = contents else { return (0, 0, 0) };
        let has = |kind| self.kinds & kind != 0;
        let ports = contents.ports(frame).filter(|_| contents.is_tcp());
        let (ports, kind) = match (contents.layers.family, ports) {
            (Family::V4, Some(ports)) if has(TCP_IPV4) => (ports, 2),
            (Family::V4, _) if has(IPV4) => (&[][..], 1),
            (Family::V6, Some(ports)) if has(TCP_IPV6) => (ports, 4),
            (Family::V6, _) if has(IPV6) => (&[][..], 3),
            _ => return (0, 0, 0),
        };
        let hash = self.hash(contents.layers.addresses(frame).iter().chain(ports));
        let entry = self.bytes[TABLE + hash as usize % self.entries];
        (usize::from(entry) % queues.max(1), kind, hash)
    }

    /// Toeplitz: the sum of the key's 32 bits from each place on where the input has a one.
    fn hash<'a>(&self, input: impl Iterator<Item = &'a u8>) -> u32 {
        let key = &self.bytes[KEY..KEY + KEY_BYTES];
        let at = |index: usize| u64::from(key.get(index).copied().unwrap_or(0));
        let mut window = (0..8).fold(0, |window, index| window << 8 | at(index));
        let mut hash = 0;
        for (index, byte) in input.enumerate() {
            for bit in 0..8 {
                if byte & (0x80 >> bit) != 0 {
                    hash ^= (window >> (32 - bit)) as u32;
                }
            }
            window = window << 8 | at(index + 8);
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and the sums of Microsoft's "Verifying the RSS Hash Calculation".
    const MICROSOFT: [u8; 40] = [
        0x6D, 0x5A, 0x56, 0xDA, 0x25, 0x5B, 0x0E, 0xC2, 0x41, 0x67, 0x25, 0x3D, 0x43, 0xA3, 0x8F,
        0xB0, 0xD0, 0xCA, 0x2B, 0xCB, 0xAE, 0x7B, 0x30, 0xB4, 0x77, 0xCB, 0x2D, 0xA3, 0x80, 0x30,
        0xF2, 0x0C, 0x6A, 0x42, 0xB7, 0x3B, 0xBE, 0xAC, 0x01, 0xFA,
    ];

    #[test]
    fn hashes_are_the_published_ones() {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&[15, 0, 1, 0, 40, 0, 4, 0]);
        bytes[KEY..KEY + KEY_BYTES].copy_from_slice(&MICROSOFT);
        let rss = Rss::new(bytes).unwrap();
        // 66.9.149.187:2794 to 161.142.100.80:1766
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0A, 0xEA, 0x06, 0xE6];
        assert_eq!(rss.hash(input.iter()), 0x51CC_C178);
        assert_eq!(rss.hash(input[..8].iter()), 0x323E_8FC2);
        // 3ffe:2501:200:1fff::7 to 3ffe:2501:200:3::1
        let mut input = [0; 32];
        input[..8].copy_from_slice(&[0x3F, 0xFE, 0x25, 0x01, 0x02, 0x00, 0x1F, 0xFF]);
        input[15] = 7;
        input[16..24].copy_from_slice(&[0x3F, 0xFE, 0x25, 0x01, 0x02, 0x00, 0x00, 0x03]);
        input[31] = 1;
        assert_eq!(rss.hash(input.iter()), 0x2CC1_8CD5);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let mut good = [0; BYTES];
        good[..8].copy_from_slice(&[15, 0, 1, 0, 40, 0, 128, 0]);
        assert!(Rss::new(good).is_some());
        for (at, value) in [(2, 0), (4, 41), (6, 0), (6, 129), (7, 1)] {
            let mut bytes = good;
            bytes[at] = value;
            assert!(Rss::new(bytes).is_none(), "{at}: {value}");
        }
    }
}
