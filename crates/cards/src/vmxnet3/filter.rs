//! Which frames a driver wants (struct Vmxnet3_RxFilterConf).

use super::MacAddress;

const UNICAST: u32 = 1;
const MULTICAST: u32 = 2;
const BROADCAST: u32 = 4;
const ALL_MULTICAST: u32 = 8;
const PROMISCUOUS: u32 = 16;

/// Bytes of a bit for each VLAN.
pub const VLAN_BYTES: usize = 512;
/// Addresses of the table that are kept: its length has 16 bits.
pub const MAX_ADDRESSES: usize = u16::MAX as usize / 6;

const TAGGED: [u8; 2] = [0x81, 0x00];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub mode: u32,
    /// Sorted.
    pub multicast: Vec<MacAddress>,
    pub vlans: [u8; VLAN_BYTES],
}

impl Default for Filter {
    fn default() -> Self {
        Self { mode: 0, multicast: Vec::new(), vlans: [0; VLAN_BYTES] }
    }
}

/// The tag of a frame that has one: priority and number.
pub fn tag(frame: &[u8]) -> Option<u16> {
    if frame.get(12..14) != Some(&TAGGED) {
        return None;
    }
    frame.get(14..16).map(|tag| u16::from_be_bytes([tag[0], tag[1]]))
}

impl Filter {
    pub fn set_multicast(&mut self, bytes: &[u8]) {
        self.multicast = bytes.as_chunks().0.iter().take(MAX_ADDRESSES).copied().collect();
        self.multicast.sort_unstable();
    }

    pub fn wants(&self, frame: &[u8], mac: MacAddress) -> bool {
        let is = |mode: u32| self.mode & mode != 0;
        let Some(to) = frame.first_chunk::<6>() else { return false };
        if is(PROMISCUOUS) {
            return true;
        }
        // A tag of no number is none (IEEE 802.1Q, 9.6).
        let vlan = usize::from(tag(frame).map_or(0, |tag| tag & 0xFFF));
        if vlan != 0 && self.vlans[vlan / 8] & 1 << (vlan % 8) == 0 {
            return false;
        }
        if *to == [0xFF; 6] {
            is(BROADCAST)
        } else if to[0] & 1 != 0 {
            is(ALL_MULTICAST) || is(MULTICAST) && self.multicast.binary_search(to).is_ok()
        } else {
            is(UNICAST) && *to == mac
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = [2, 0, 0, 0, 0, 1];
    const GROUPS: [MacAddress; 2] = [[1, 0, 0x5E, 0, 0, 9], [1, 0, 0x5E, 0, 0, 1]];

    #[test]
    fn modes_and_tables_say_what_comes() {
        let mut filter = Filter::default();
        filter.set_multicast(&GROUPS.concat());
        let frames = [MAC, [2, 0, 0, 0, 0, 2], GROUPS[1], [1, 0, 0x5E, 0, 0, 2], [0xFF; 6]];
        for (mode, expected) in [
            (0, [false; 5]),
            (UNICAST, [true, false, false, false, false]),
            (MULTICAST, [false, false, true, false, false]),
            (BROADCAST, [false, false, false, false, true]),
            (ALL_MULTICAST, [false, false, true, true, false]),
            (PROMISCUOUS, [true; 5]),
        ] {
            filter.mode = mode;
            let wanted = frames.map(|to| filter.wants(&[&to[..], &MAC, &[8, 0, 0]].concat(), MAC));
            assert_eq!(wanted, expected, "mode {mode}");
        }
        assert!(!filter.wants(&[0; 5], MAC));
    }

    #[test]
    fn tagged_frames_come_of_vlans_that_the_driver_named() {
        let mut filter = Filter { mode: UNICAST, ..Filter::default() };
        filter.vlans[7] = 1;
        let tagged = |tag: u16| {
            let mut frame = [&MAC[..], &MAC, &TAGGED].concat();
            frame.extend(tag.to_be_bytes());
            frame
        };
        assert!(filter.wants(&tagged(0xE000 | 56), MAC));
        assert!(!filter.wants(&tagged(57), MAC));
        assert!(filter.wants(&tagged(0xE000), MAC), "a priority alone");
        filter.mode |= PROMISCUOUS;
        assert!(filter.wants(&tagged(57), MAC));
        assert_eq!(tag(&tagged(0xE007)), Some(0xE007));
        assert_eq!(tag(&tagged(7)[..15]), None);
    }
}
