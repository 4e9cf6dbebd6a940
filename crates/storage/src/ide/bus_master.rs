//! The bus master of a channel: registers, and the table of regions that it works through.

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

/// Command: start, and that data goes to memory.
const START: u8 = 1 << 0;
const TO_MEMORY: u8 = 1 << 3;

/// Status: busy; an error; an interrupt of the drive; drives that can be used so.
const ACTIVE: u8 = 1 << 0;
const ERROR: u8 = 1 << 1;
const INTERRUPT: u8 = 1 << 2;
const DRIVES: u8 = 0b11 << 5;

/// Bytes of a region's entry, whose last says so.
const ENTRY: u64 = 8;
const LAST: u64 = 1 << 63;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusMaster {
    pub command: u8,
    pub status: u8,
    pub table: u32,
}

/// What a write to the registers asks for beside what they keep.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Nothing,
    Start,
    Stop,
}

/// The regions are no memory, or too many.
#[derive(Debug, PartialEq, Eq)]
pub struct BadTable;

impl BusMaster {
    pub fn read(&self, offset: u64) -> u8 {
        match offset {
            0 => self.command,
            2 => self.status,
            4..=7 => self.table.to_le_bytes()[(offset - 4) as usize],
            _ => 0,
        }
    }

    pub fn write(&mut self, offset: u64, value: u8) -> Change {
        match offset {
            0 => {
                let before = self.command & START;
                self.command = value & (START | TO_MEMORY);
                match (before, value & START) {
                    (0, START) => {
                        self.status |= ACTIVE;
                        return Change::Start;
                    }
                    (START, 0) => {
                        self.status &= !ACTIVE;
                        return Change::Stop;
                    }
                    _ => {}
                }
            }
            2 => {
                let kept = self.status & !(value & (ERROR | INTERRUPT)) & !DRIVES;
                self.status = kept | value & DRIVES;
            }
            4..=7 => {
                let shift = 8 * (offset - 4);
                let table = u64::from(self.table) & !(0xFF << shift) | u64::from(value) << shift;
                self.table = table as u32 & !3;
            }
            _ => {}
        }
        Change::Nothing
    }

    pub fn started(&self) -> bool {
        self.command & START != 0
    }

    pub fn fills_memory(&self) -> bool {
        self.command & TO_MEMORY != 0
    }

    /// The drive interrupts.
    pub fn interrupted(&mut self) {
        self.status |= INTERRUPT;
    }

    /// A transfer has ended; with `done` all regions were used, else the bus master still waits.
    pub fn ended(&mut self, done: bool) {
        if done {
            self.status &= !ACTIVE;
        }
    }

    pub fn failed(&mut self) {
        self.status = self.status & !ACTIVE | ERROR;
    }

    /// The first `length` bytes of the regions, or as many as there are; and whether these are
    /// all. A table has an entry for two bytes at least, and as many as a request may have pieces.
    pub fn regions(
        &self,
        memory: &GuestMemory,
        length: u64,
    ) -> Result<(ScatterList, bool), BadTable> {
        let mut list = ScatterList::new(memory.snapshot());
        let mut at = u64::from(self.table);
        let mut left = length;
        let mut last = false;
        let mut whole = true;
        while left > 0 && !last {
            let mut entry = [0; ENTRY as usize];
            memory.read(GuestPhys(at), &mut entry).map_err(|_| BadTable)?;
            let entry = u64::from_le_bytes(entry);
            let (address, bytes) = (entry & 0xFFFF_FFFE, entry >> 32 & 0xFFFE);
            let bytes = if bytes == 0 { 1 << 16 } else { bytes };
            let here = bytes.min(left);
            list.push(GuestPhys(address), here).map_err(|_| BadTable)?;
            (left, last, whole) = (left - here, entry & LAST != 0, here == bytes);
            at += ENTRY;
        }
        Ok((list, last && whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_read_to_the_last_or_to_the_length() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let table = |entries: &[(u32, u16, bool)]| {
            for (index, &(address, bytes, last)) in entries.iter().enumerate() {
                let entry =
                    u64::from(address) | u64::from(bytes) << 32 | if last { LAST } else { 0 };
                let at = GuestPhys(0x1000 + 8 * index as u64);
                memory.write(at, &entry.to_le_bytes()).unwrap();
            }
        };
        let master = BusMaster { table: 0x1000, ..BusMaster::default() };
        table(&[(0x2000, 512, false), (0x1_0000, 0, true)]);
        let regions = |length| {
            let (list, all) = master.regions(&memory, length)?;
            Ok::<_, BadTable>((list.len(), list.iovecs().len(), all))
        };
        assert_eq!(regions(512), Ok((512, 1, false)));
        assert_eq!(regions(512 + 65536), Ok((512 + 65536, 2, true)));
        assert_eq!(regions(1024), Ok((1024, 2, false)));
        assert_eq!(regions(1 << 20), Ok((512 + 65536, 2, true)), "as many as there are");
        table(&[(0xFFFF_0000, 512, true)]);
        assert_eq!(regions(512), Err(BadTable));
        // Entries of two bytes without an end.
        table(&[(0x2000, 2, false); 2000]);
        assert_eq!(regions(1 << 20), Err(BadTable));
        let outside = BusMaster { table: 0xFFFF_FFFC, ..BusMaster::default() };
        assert_eq!(outside.regions(&memory, 512).err(), Some(BadTable));
    }

    #[test]
    fn status_is_cleared_by_ones() {
        let mut master = BusMaster::default();
        assert_eq!(master.write(0, START | TO_MEMORY | 0xF0), Change::Start);
        assert_eq!((master.read(0), master.read(2)), (START | TO_MEMORY, ACTIVE));
        master.interrupted();
        master.failed();
        assert_eq!(master.read(2), ERROR | INTERRUPT);
        assert_eq!(master.write(2, INTERRUPT | DRIVES), Change::Nothing);
        assert_eq!(master.read(2), ERROR | DRIVES);
        assert_eq!(master.write(0, 0), Change::Stop);
        for offset in 4..8 {
            master.write(offset, 0xFF);
        }
        assert_eq!(master.table, 0xFFFF_FFFC);
    }
}
