//! Command lists and tables: what a driver asks by a slot (4.2.2, 4.2.3).

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::SLOTS;

/// Bytes of a command header.
const HEADER: u64 = 32;
/// A command table: the frame, the packet at 0x40, the regions of data at 0x80.
const PACKET: usize = 0x40;
const REGIONS: u64 = 0x80;
const REGION: usize = 16;

/// A command, read once: the guest may change it meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Of the frame that goes to the device.
    pub frame: [u8; 20],
    pub packet: [u8; 16],
    header: u64,
    table: u64,
    regions: u32,
}

/// The slot's header or table is no memory, or its frame none that a device takes.
#[derive(Debug, PartialEq, Eq)]
pub struct BadSlot;

impl Slot {
    pub fn read(memory: &GuestMemory, list: u64, slot: usize) -> Result<Self, BadSlot> {
        let header = list.wrapping_add(HEADER * (slot % SLOTS) as u64);
        let mut bytes = [0; HEADER as usize];
        memory.read(GuestPhys(header), &mut bytes).map_err(|_| BadSlot)?;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let first = word(0);
        let table = u64::from(word(8) & !0x7F) | u64::from(word(12)) << 32;
        let mut content = [0; PACKET + 16];
        memory.read(GuestPhys(table), &mut content).map_err(|_| BadSlot)?;
        // A command is a frame of five words.
        if first & 0x1F < 5 {
            return Err(BadSlot);
        }
        let (mut frame, mut packet) = ([0; 20], [0; 16]);
        frame.copy_from_slice(&content[..20]);
        packet.copy_from_slice(&content[PACKET..]);
        Ok(Self { frame, packet, header, table, regions: first >> 16 })
    }

    /// The first `length` bytes of the data, or as many as there are.
    ///
    /// Of regions it looks at no more than the data needs, each of which has a byte at least,
    /// and at no more than one request may have.
    pub fn data(&self, memory: &GuestMemory, length: u64) -> Result<ScatterList, BadSlot> {
        let mut list = ScatterList::new(memory.snapshot());
        let most = (self.regions as usize).min(ScatterList::MAX_PIECES);
        let mut bytes = vec![0; most * REGION];
        let at = self.table.checked_add(REGIONS).ok_or(BadSlot)?;
        memory.read(GuestPhys(at), &mut bytes).map_err(|_| BadSlot)?;
        let mut left = length;
        for &region in bytes.as_chunks::<REGION>().0 {
            if left == 0 {
                break;
            }
            let region = u128::from_le_bytes(region);
            let (address, bytes) =
                (region as u64, u64::from((region >> 96) as u32 & 0x3F_FFFF) + 1);
            let here = bytes.min(left);
            list.push(GuestPhys(address), here).map_err(|_| BadSlot)?;
            left -= here;
        }
        Ok(list)
    }

    /// PRDBC: how many bytes were moved.
    pub fn moved(&self, memory: &GuestMemory, bytes: u64) {
        let _ = memory.write(GuestPhys(self.header.wrapping_add(4)), &(bytes as u32).to_le_bytes());
    }
}
