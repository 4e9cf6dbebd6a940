//! The registers by which a command is given.

/// A command with its parameters, of 28 or 48 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskFile {
    pub command: u8,
    pub features: u16,
    pub count: u16,
    /// 48 bits; of commands with less, the lower ones.
    pub lba: u64,
    pub device: u8,
}

/// The device register says that the address is of a block, not of a cylinder.
const LBA: u8 = 1 << 6;

impl TaskFile {
    /// Of a register FIS from the host (Serial ATA 3.0, 10.3.4).
    pub fn of_fis(fis: &[u8]) -> Self {
        let byte = |at: usize| u64::from(fis.get(at).copied().unwrap_or(0));
        let word = |low: usize, high: usize| (byte(low) | byte(high) << 8) as u16;
        Self {
            command: byte(2) as u8,
            features: word(3, 11),
            count: word(12, 13),
            lba: (0..3)
                .fold(0, |lba, at| lba | byte(4 + at) << (8 * at) | byte(8 + at) << (8 * at + 24)),
            device: byte(7) as u8,
        }
    }

    /// Sectors of a command with 16 bits for them; 0 are all that fit not.
    pub fn sectors(&self, wide: bool) -> u64 {
        match (wide, self.count) {
            (true, 0) => 1 << 16,
            (true, count) => count.into(),
            (false, count) if count & 0xFF == 0 => 1 << 8,
            (false, count) => u64::from(count & 0xFF),
        }
    }

    /// The first sector. `None` is an address by cylinder, head and sector that no drive with
    /// this (heads, sectors of a track) has.
    pub fn sector(&self, wide: bool, (heads, sectors): (u64, u64)) -> Option<u64> {
        if wide {
            return Some(self.lba);
        }
        let low = self.lba & 0xFF_FFFF;
        let head = u64::from(self.device & 0xF);
        if self.device & LBA != 0 {
            return Some(low | head << 24);
        }
        let (sector, cylinder) = (low & 0xFF, low >> 8);
        let there = (1..=sectors).contains(&sector) && head < heads;
        there.then(|| (cylinder * heads + head) * sectors + sector - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fis_has_its_registers_in_their_places() {
        let mut fis = [0; 20];
        for (byte, value) in fis.iter_mut().zip(0u8..) {
            *byte = value;
        }
        let task = TaskFile::of_fis(&fis);
        assert_eq!((task.command, task.features, task.count, task.device), (2, 0x0B03, 0x0D0C, 7));
        assert_eq!(task.lba, 0x0A09_0806_0504);
        assert_eq!(TaskFile::of_fis(&fis[..3]), TaskFile { command: 2, ..TaskFile::default() });
    }

    #[test]
    fn sectors_are_found_by_block_and_by_cylinder() {
        let geometry = (16, 63);
        let task = TaskFile { lba: 0x12_3456_789A, device: 0x45, ..TaskFile::default() };
        assert_eq!(task.sector(true, geometry), Some(0x12_3456_789A));
        assert_eq!(task.sector(false, geometry), Some(0x556_789A));
        let by_cylinder = |cylinder: u64, head: u8, sector: u64| {
            let task =
                TaskFile { lba: cylinder << 8 | sector, device: head, ..TaskFile::default() };
            task.sector(false, geometry)
        };
        assert_eq!(by_cylinder(0, 0, 1), Some(0));
        assert_eq!(by_cylinder(2, 3, 4), Some((2 * 16 + 3) * 63 + 3));
        assert_eq!(by_cylinder(0, 0, 0), None);
        assert_eq!(by_cylinder(0, 0, 64), None);
        let all = TaskFile::default();
        assert_eq!((all.sectors(true), all.sectors(false)), (65536, 256));
    }
}
