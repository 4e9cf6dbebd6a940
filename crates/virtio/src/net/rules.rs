//! Which frames a driver wants (5.1.6.5.1 to 5.1.6.5.3).

/// An Ethernet address.
pub type MacAddress = [u8; 6];

/// Modes, as bits: those that the driver switches by the commands of these numbers.
const PROMISCUOUS: u8 = 1 << 0;
const ALL_MULTICAST: u8 = 1 << 1;
const ALL_UNICAST: u8 = 1 << 2;
const NO_MULTICAST: u8 = 1 << 3;
const NO_UNICAST: u8 = 1 << 4;
const NO_BROADCAST: u8 = 1 << 5;
/// The table was longer than is kept of it: all that it could have named comes.
const MANY_UNICAST: u8 = 1 << 6;
const MANY_MULTICAST: u8 = 1 << 7;

/// Addresses of a table that are kept.
pub const MAX_ADDRESSES: usize = 256;
/// Bytes of a bit for each VLAN.
pub const VLAN_BYTES: usize = 512;

/// Ethernet type of a frame with an 802.1Q tag.
const TAGGED: [u8; 2] = [0x81, 0x00];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    pub mac: MacAddress,
    pub mode: u8,
    pub unicast: Vec<MacAddress>,
    pub multicast: Vec<MacAddress>,
    /// Looked at where the driver has negotiated to filter by VLAN.
    pub vlans: [u8; VLAN_BYTES],
}

impl Rules {
    /// A driver that asks for nothing gets everything.
    pub fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            mode: PROMISCUOUS,
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: [0; VLAN_BYTES],
        }
    }

    /// Switches the mode of a command's number; false where there is none.
    pub fn switch(&mut self, command: u8, on: bool) -> bool {
        if command > 5 {
            return false;
        }
        let bit = 1 << command;
        self.mode = if on { self.mode | bit } else { self.mode & !bit };
        true
    }

    /// Takes tables of addresses, of which each may be longer than is kept.
    pub fn set_tables(&mut self, mut unicast: Vec<MacAddress>, mut multicast: Vec<MacAddress>) {
        self.mode &= !(MANY_UNICAST | MANY_MULTICAST);
        for (table, many) in [(&mut unicast, MANY_UNICAST), (&mut multicast, MANY_MULTICAST)] {
            if table.len() > MAX_ADDRESSES {
                table.clear();
                self.mode |= many;
            }
        }
        (self.unicast, self.multicast) = (unicast, multicast);
    }

    /// Adds or removes a VLAN; false where there is none of that number.
    pub fn set_vlan(&mut self, vlan: u16, on: bool) -> bool {
        let Some(byte) = self.vlans.get_mut(usize::from(vlan / 8)) else { return false };
        let bit = 1 << (vlan % 8);
        *byte = if on { *byte | bit } else { *byte & !bit };
        true
    }

    pub fn want(&self, frame: &[u8], by_vlan: bool) -> bool {
        let is = |mode: u8| self.mode & mode != 0;
        let Some(to) = frame.first_chunk::<6>() else { return false };
        if is(PROMISCUOUS) {
            return true;
        }
        if by_vlan && frame.get(12..14) == Some(&TAGGED) {
            let tag = frame.get(14..16).map_or(0, |tag| u16::from_be_bytes([tag[0], tag[1]]));
            let vlan = tag & 0xFFF;
            if self.vlans[usize::from(vlan / 8)] & 1 << (vlan % 8) == 0 {
                return false;
            }
        }
        if *to == [0xFF; 6] {
            !is(NO_BROADCAST)
        } else if to[0] & 1 != 0 {
            !is(NO_MULTICAST) && (is(ALL_MULTICAST | MANY_MULTICAST) || self.multicast.contains(to))
        } else {
            !is(NO_UNICAST)
                && (is(ALL_UNICAST | MANY_UNICAST) || *to == self.mac || self.unicast.contains(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = [2, 0, 0, 0, 0, 1];
    const OTHER: MacAddress = [2, 0, 0, 0, 0, 2];
    const GROUP: MacAddress = [1, 0, 0x5E, 0, 0, 1];
    const ALL: MacAddress = [0xFF; 6];

    fn frame(to: MacAddress) -> Vec<u8> {
        [&to[..], &OTHER, &[8, 0, 0, 0]].concat()
    }

    fn wanted(rules: &Rules) -> [bool; 4] {
        [MAC, OTHER, GROUP, ALL].map(|to| rules.want(&frame(to), true))
    }

    #[test]
    fn modes_say_what_comes() {
        let mut rules = Rules::new(MAC);
        assert_eq!(wanted(&rules), [true; 4]);
        rules.switch(0, false);
        assert_eq!(wanted(&rules), [true, false, false, true]);
        for (command, expected) in [
            (1, [true, false, true, true]),
            (2, [true, true, false, true]),
            (3, [true, false, false, true]),
            (4, [false, false, false, true]),
            (5, [true, false, false, false]),
        ] {
            assert!(rules.switch(command, true));
            assert_eq!(wanted(&rules), expected, "mode {command}");
            assert!(rules.switch(command, false));
        }
        assert!(!rules.switch(6, true));
        assert!(!rules.switch(255, true));
    }

    #[test]
    fn tables_name_addresses_and_long_ones_let_all_in() {
        let mut rules = Rules::new(MAC);
        rules.switch(0, false);
        rules.set_tables(vec![OTHER], vec![GROUP]);
        assert_eq!(wanted(&rules), [true; 4]);
        rules.set_tables(vec![[4; 6]; MAX_ADDRESSES], vec![[5; 6]; MAX_ADDRESSES]);
        assert_eq!(wanted(&rules), [true, false, false, true]);
        rules.set_tables(vec![[4; 6]; MAX_ADDRESSES + 1], vec![]);
        assert_eq!(wanted(&rules), [true, true, false, true]);
        rules.set_tables(vec![], vec![[5; 6]; MAX_ADDRESSES + 1]);
        assert_eq!(wanted(&rules), [true, false, true, true]);
        rules.set_tables(vec![], vec![]);
        assert_eq!(wanted(&rules), [true, false, false, true]);
    }

    #[test]
    fn tagged_frames_come_of_vlans_that_were_added() {
        let mut rules = Rules::new(MAC);
        rules.switch(0, false);
        let tagged = |vlan: u16| {
            let mut frame = [&MAC[..], &OTHER, &[0x81, 0]].concat();
            frame.extend((0xE000 | vlan).to_be_bytes());
            frame
        };
        assert!(rules.set_vlan(4095, true) && rules.set_vlan(7, true));
        assert!(!rules.set_vlan(4096, true));
        assert!(rules.want(&tagged(4095), true) && rules.want(&tagged(7), true));
        assert!(!rules.want(&tagged(8), true));
        assert!(rules.want(&tagged(8), false));
        rules.set_vlan(7, false);
        assert!(!rules.want(&tagged(7), true));
        let cut = [&MAC[..], &OTHER, &[0x81, 0, 1]].concat();
        assert!(!rules.want(&cut, true));
    }

    #[test]
    fn what_has_no_address_is_not_wanted() {
        let rules = Rules::new(MAC);
        for length in 0..6 {
            assert!(!rules.want(&frame(MAC)[..length], true));
        }
    }
}
