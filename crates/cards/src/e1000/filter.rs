//! Which frames a driver wants (manual, 3.2.2, 13.4.22 and 13.5).

use super::file::{
    BROADCAST, CFI_FILTER, CFI_SHIFT, File, MULTICAST_ALL, UNICAST_ALL, VLAN_FILTER,
};
use crate::MacAddress;

pub const ADDRESSES: u32 = 0x5400;
pub const GROUPS: u32 = 0x5200;
pub const VLANS: u32 = 0x5600;

/// RAH: an address that counts, and whether it is compared with that of the sender.
const VALID: u32 = 1 << 31;
const SELECT: u32 = 3 << 16;
const SELECT_SOURCE: u32 = 1 << 16;
const HIGH: u32 = VALID | SELECT | 0xFFFF;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Pairs of RAL and RAH.
    pub addresses: [u32; 32],
    pub groups: [u32; 128],
    pub vlans: [u32; 128],
}

/// How a frame has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    Exactly,
    /// By a table that others of its group may hit too.
    Perhaps,
    Not,
}

impl Default for Filter {
    fn default() -> Self {
        Self { addresses: [0; 32], groups: [0; 128], vlans: [0; 128] }
    }
}

impl Filter {
    /// As it is after a reset, when the first address was read from the EEPROM.
    pub fn new(mac: MacAddress) -> Self {
        let [a, b, c, d, e, f] = mac;
        let mut filter = Self::default();
        filter.addresses[0] = u32::from_le_bytes([a, b, c, d]);
        filter.addresses[1] = VALID | u32::from(u16::from_le_bytes([e, f]));
        filter
    }

    fn place(&mut self, offset: u32) -> Option<&mut u32> {
        let (first, words) = match offset {
            GROUPS..0x5400 => (GROUPS, &mut self.groups[..]),
            ADDRESSES..0x5480 => (ADDRESSES, &mut self.addresses[..]),
            VLANS..0x5800 => (VLANS, &mut self.vlans[..]),
            _ => return None,
        };
        words.get_mut((offset - first) as usize / 4)
    }

    /// None for a register that is none of the tables'.
    pub fn read(&mut self, offset: u32) -> Option<u32> {
        self.place(offset).copied()
    }

    /// Whether it was one of them.
    pub fn write(&mut self, offset: u32, value: u32) -> bool {
        let high = (ADDRESSES..0x5480).contains(&offset) && offset & 4 != 0;
        let place = self.place(offset);
        let there = place.is_some();
        if let Some(word) = place {
            *word = if high { value & HIGH } else { value };
        }
        there
    }

    /// The first address, where it counts.
    pub fn mac(&self) -> Option<MacAddress> {
        let [low, high] = [self.addresses[0], self.addresses[1]];
        let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
        (high & VALID != 0).then_some([a, b, c, d, e, f])
    }

    /// `tag` is that of a frame that has one.
    pub fn passes(&self, frame: &[u8], tag: Option<u16>, file: &File) -> Passed {
        let control = file.rx_control();
        let is = |bit: u32| control & bit != 0;
        let (Some(&to), Some(&from)) =
            (frame.first_chunk::<6>(), frame.get(6..).and_then(<[u8]>::first_chunk::<6>))
        else {
            return Passed::Not;
        };
        if let Some(tag) = tag.filter(|_| is(VLAN_FILTER)) {
            let number = usize::from(tag & 0xFFF);
            let other = u32::from(tag >> 12 & 1) != control >> CFI_SHIFT & 1;
            if self.vlans[number / 32] >> (number % 32) & 1 == 0 || is(CFI_FILTER) && other {
                return Passed::Not;
            }
        }
        let group = to[0] & 1 != 0;
        let all = if group { is(MULTICAST_ALL) } else { is(UNICAST_ALL) };
        if all || is(BROADCAST) && to == [0xFF; 6] {
            return Passed::Exactly;
        }
        let named = self.addresses.as_chunks().0.iter().any(|&[low, high]| {
            let address = match high & (VALID | SELECT) {
                VALID => to,
                select if select == VALID | SELECT_SOURCE => from,
                _ => return false,
            };
            address[..4] == low.to_le_bytes() && address[4..] == high.to_le_bytes()[..2]
        });
        if named {
            return Passed::Exactly;
        }
        // MO: which 12 of the last 16 bits.
        let shift = [4, 3, 2, 0][(control >> 12 & 3) as usize];
        let hash = usize::from(u16::from_le_bytes([to[4], to[5]]) >> shift & 0xFFF);
        if group && self.groups[hash / 32] >> (hash % 32) & 1 != 0 {
            return Passed::Perhaps;
        }
        Passed::Not
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::RCTL;
    use super::*;

    const MAC: MacAddress = [2, 0, 0, 0, 0, 1];
    const OTHER: MacAddress = [2, 0, 0, 0, 0, 2];
    const GROUP: MacAddress = [1, 0, 0x5E, 0, 0x34, 0x12];

    fn file(control: u32) -> File {
        let mut file = File::default();
        file.write(RCTL, control);
        file
    }

    #[test]
    fn modes_say_what_comes() {
        let filter = Filter::new(MAC);
        assert_eq!(filter.mac(), Some(MAC));
        for (control, expected) in [
            (0, [true, false, false, false]),
            (BROADCAST, [true, false, false, true]),
            (MULTICAST_ALL, [true, false, true, true]),
            (UNICAST_ALL, [true, true, false, false]),
        ] {
            let passed = [MAC, OTHER, GROUP, [0xFF; 6]].map(|to| {
                let frame = [&to[..], &OTHER, &[8, 0, 0]].concat();
                filter.passes(&frame, None, &file(control)) == Passed::Exactly
            });
            assert_eq!(passed, expected, "{control:#x}");
        }
        assert_eq!(filter.passes(&[0; 11], None, &file(UNICAST_ALL)), Passed::Not);
    }

    #[test]
    fn tables_name_addresses_and_groups() {
        let mut filter = Filter::new(MAC);
        let frame = [&GROUP[..], &OTHER, &[8, 0]].concat();
        for (offset, hash) in [(0, 0x123), (1, 0x246), (2, 0x48D), (3, 0x234)] {
            filter.groups = [0; 128];
            let control = file(offset << 12);
            assert_eq!(filter.passes(&frame, None, &control), Passed::Not);
            assert!(filter.write(GROUPS + 4 * (hash / 32), 1 << (hash % 32)));
            assert_eq!(filter.passes(&frame, None, &control), Passed::Perhaps, "{hash:#x}");
        }
        filter.groups = [u32::MAX; 128];
        let frame = [&OTHER[..], &GROUP, &[8, 0]].concat();
        assert_eq!(filter.passes(&frame, None, &file(0)), Passed::Not, "no group");
        // By the sender, and by another address.
        assert!(filter.write(ADDRESSES + 8 * 15, 0x005E_0001));
        assert!(filter.write(ADDRESSES + 8 * 15 + 4, VALID | SELECT_SOURCE | 0x1234));
        assert_eq!(filter.passes(&frame, None, &file(0)), Passed::Exactly);
        assert!(filter.write(ADDRESSES + 8 * 15 + 4, SELECT_SOURCE | 0x1234));
        assert_eq!(filter.passes(&frame, None, &file(0)), Passed::Not, "not valid");
        assert!(filter.write(ADDRESSES + 4, u32::MAX));
        assert_eq!(filter.read(ADDRESSES + 4), Some(0x8003_FFFF));
        assert!(!filter.write(0x5480, 1));
    }

    #[test]
    fn tagged_frames_come_of_vlans_that_the_driver_named() {
        let mut filter = Filter::new(MAC);
        filter.vlans[1] = 1 << 24;
        let frame = [&MAC[..], &OTHER].concat();
        let passes = |tag, control| filter.passes(&frame, Some(tag), &file(control));
        assert_eq!(passes(57, 0), Passed::Exactly);
        assert_eq!(passes(57, VLAN_FILTER), Passed::Not);
        assert_eq!(passes(0xE000 | 56, VLAN_FILTER), Passed::Exactly);
        assert_eq!(passes(0x1000 | 56, VLAN_FILTER), Passed::Exactly);
        assert_eq!(passes(0x1000 | 56, VLAN_FILTER | CFI_FILTER), Passed::Not);
        let set = VLAN_FILTER | CFI_FILTER | 1 << CFI_SHIFT;
        assert_eq!(passes(0x1000 | 56, set), Passed::Exactly);
    }
}
