//! Commands of the control queue (5.1.6.5).

use tetrarch_memory::ScatterList;

use super::rules::MacAddress;

// Classes, and commands in them.
const RECEIVE: u8 = 0;
const MAC: u8 = 1;
const TABLE_SET: u8 = 0;
const ADDRESS_SET: u8 = 1;
const VLAN: u8 = 2;
const ANNOUNCE: u8 = 3;
const MULTI_QUEUE: u8 = 4;
const OFFLOADS: u8 = 5;

/// Class and command.
const HEADER: u64 = 2;
/// Entries of a table that are looked at: a longer one is no table of any network card.
const MAX_ENTRIES: u32 = 4096;

/// What a driver asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Switches the mode of a number.
    Mode(u8, bool),
    Tables(Vec<MacAddress>, Vec<MacAddress>),
    Address(MacAddress),
    Vlan(u16, bool),
    /// The driver has announced itself to the network.
    Announced,
    Pairs(u16),
    GuestOffloads(u64),
}

impl Command {
    /// None for what is no command.
    pub fn read(list: &ScatterList) -> Option<Self> {
        let [class, command] = bytes(list, 0)?;
        match (class, command) {
            (RECEIVE, _) => bytes(list, HEADER).map(|[on]| Self::Mode(command, on != 0)),
            (MAC, TABLE_SET) => {
                let (unicast, behind) = table(list, HEADER)?;
                let (multicast, _) = table(list, behind)?;
                Some(Self::Tables(unicast, multicast))
            }
            (MAC, ADDRESS_SET) => bytes(list, HEADER).map(Self::Address),
            (VLAN, 0 | 1) => {
                Some(Self::Vlan(u16::from_le_bytes(bytes(list, HEADER)?), command == 0))
            }
            (ANNOUNCE, 0) => Some(Self::Announced),
            (MULTI_QUEUE, 0) => Some(Self::Pairs(u16::from_le_bytes(bytes(list, HEADER)?))),
            (OFFLOADS, 0) => Some(Self::GuestOffloads(u64::from_le_bytes(bytes(list, HEADER)?))),
            _ => None,
        }
    }
}

fn bytes<const N: usize>(list: &ScatterList, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (list.read_at(offset, &mut bytes) == N).then_some(bytes)
}

/// A table of addresses, and where it ends.
fn table(list: &ScatterList, offset: u64) -> Option<(Vec<MacAddress>, u64)> {
    let count = u32::from_le_bytes(bytes(list, offset)?);
    if count > MAX_ENTRIES {
        return None;
    }
    let start = offset + 4;
    let entries = (0..u64::from(count)).map(|index| bytes(list, start + 6 * index));
    Some((entries.collect::<Option<_>>()?, start + 6 * u64::from(count)))
}
