//! The commands of a disk (SBC-3, 5).

use tetrarch_block::BlockInfo;

use super::cdb::Cdb;
use super::inquiry::{self, PHYSICAL};
use super::unit::{Step, cut};
use super::{Sense, mode};

/// The most blocks that a command moves.
pub const MAX_TRANSFER_BLOCKS: u64 = 0xFFFF;
/// The most blocks that one is written to by WRITE SAME.
pub const MAX_SAME_BLOCKS: u64 = 0x1_0000;
/// The most ranges of UNMAP.
pub const MAX_UNMAP_RANGES: usize = 256;
/// Bytes of its list before the ranges, and of a range: first block, blocks.
const UNMAP_HEADER: usize = 8;
const UNMAP_RANGE: usize = 16;

/// Of READ and WRITE, in byte 1.
const FORCE_ACCESS: u8 = 1 << 3;
const PROTECT: u8 = 0b111 << 5;
/// Of WRITE SAME, in byte 1.
const UNMAP: u8 = 1 << 3;
const ANCHOR: u8 = 1 << 4;
/// Each block has its own number in it, of two kinds (SBC-2).
const NUMBERED: u8 = 0b11 << 1;
const NO_DATA: u8 = 1 << 0;

/// What a disk remembers between commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the next command is told first.
    pub attention: Option<Sense>,
    /// By START STOP UNIT.
    pub stopped: bool,
}

impl Default for Disk {
    fn default() -> Self {
        Self { attention: Some(Sense::RESET), stopped: false }
    }
}

/// Bytes of a logical block.
pub fn block_size(info: &BlockInfo) -> u64 {
    info.block_size.max(512).into()
}

/// Logical blocks, whole ones.
pub fn blocks(info: &BlockInfo) -> u64 {
    info.size / block_size(info)
}

impl Disk {
    pub fn begin(&mut self, cdb: &Cdb, info: &BlockInfo, serial: &str) -> Result<Step, Sense> {
        match cdb.code() {
            // Both are told nothing before (SAM-4, 5.14). What failed was told with the failure.
            0x03 => {
                let sense = self.attention.take().unwrap_or(Sense::NONE);
                return cut(sense.bytes(), cdb.byte(4).into());
            }
            0x12 => return inquiry::inquiry(cdb, info, serial),
            _ => {}
        }
        if let Some(attention) = self.attention.take() {
            return Err(attention);
        }
        match cdb.code() {
            0x1A => mode::sense(cdb, info, true),
            0x5A => mode::sense(cdb, info, false),
            0x1B => Ok(self.start_stop(cdb)),
            _ if self.stopped => Err(Sense::STOPPED),
            // TEST UNIT READY.
            0x00 => Ok(Step::Done),
            0x25 => Ok(Step::Data(capacity_10(info))),
            // SERVICE ACTION IN (16), of which it is one.
            0x9E if cdb.byte(1) & 0x1F == 0x10 => cut(capacity_16(info), cdb.long(10)),
            0x9E => Err(Sense::INVALID_FIELD),
            0x08 | 0x28 | 0xA8 | 0x88 => {
                let (offset, length) = transfer(cdb, info)?;
                Ok(if length == 0 { Step::Done } else { Step::Read { offset, length } })
            }
            0x0A | 0x2A | 0xAA | 0x8A => {
                let durable = cdb.code() != 0x0A && cdb.byte(1) & FORCE_ACCESS != 0;
                let (offset, length) = transfer(cdb, info)?;
                writable(info)?;
                Ok(if length == 0 { Step::Done } else { Step::Write { offset, length, durable } })
            }
            // VERIFY (10) and (16), which compare with nothing.
            0x2F | 0x8F => {
                if cdb.byte(1) & (PROTECT | 0b110) != 0 {
                    return Err(Sense::INVALID_FIELD);
                }
                let (first, count) = cdb.blocks();
                extent(info, first, count).map(|_| Step::Done)
            }
            // SYNCHRONIZE CACHE, always of all of it.
            0x35 | 0x91 => {
                let (first, count) = cdb.blocks();
                extent(info, first, count).map(|_| Step::Flush)
            }
            0x41 | 0x93 => write_same(cdb, info),
            0x42 if info.discards => {
                writable(info)?;
                if cdb.byte(1) & 1 != 0 {
                    return Err(Sense::INVALID_FIELD); // nothing is anchored
                }
                let length = cdb.word(7).into();
                Ok(if length == 0 { Step::Done } else { Step::Unmap { length } })
            }
            _ => Err(Sense::INVALID_COMMAND),
        }
    }

    /// Power conditions are all alike.
    fn start_stop(&mut self, cdb: &Cdb) -> Step {
        const START: u8 = 1 << 0;
        if cdb.byte(4) >> 4 != 0 {
            return Step::Done;
        }
        self.stopped = cdb.byte(4) & START == 0;
        if self.stopped { Step::Flush } else { Step::Done }
    }

    /// Ranges to unmap, as bytes of the disk (5.28.2).
    pub fn unmapped(list: &[u8], info: &BlockInfo) -> Result<Vec<(u64, u64)>, Sense> {
        if list.len() < UNMAP_HEADER {
            return Err(Sense::LIST_LENGTH);
        }
        let said = usize::from(u16::from_be_bytes([list[2], list[3]]));
        let ranges = &list[UNMAP_HEADER..];
        let ranges = &ranges[..said.min(ranges.len())];
        let (ranges, _) = ranges.as_chunks::<UNMAP_RANGE>();
        if ranges.len() > MAX_UNMAP_RANGES {
            return Err(Sense::INVALID_PARAMETER);
        }
        let mut found = Vec::with_capacity(ranges.len());
        for range in ranges {
            let range = u128::from_be_bytes(*range);
            let (first, count) = ((range >> 64) as u64, (range >> 32) as u32);
            let (offset, length) = extent(info, first, count.into())?;
            if length > 0 {
                found.push((offset, length));
            }
        }
        Ok(found)
    }
}

/// Blocks as bytes of the disk.
fn extent(info: &BlockInfo, first: u64, count: u64) -> Result<(u64, u64), Sense> {
    match first.checked_add(count) {
        // Inside the disk, whose size is one of 64 bits.
        Some(end) if end <= blocks(info) => {
            Ok((first * block_size(info), count * block_size(info)))
        }
        _ => Err(Sense::OUT_OF_RANGE),
    }
}

fn transfer(cdb: &Cdb, info: &BlockInfo) -> Result<(u64, u64), Sense> {
    let (first, count) = cdb.blocks();
    // There is no protection information; the shortest commands have no such field.
    let protect = cdb.code() >> 5 != 0 && cdb.byte(1) & PROTECT != 0;
    if count > MAX_TRANSFER_BLOCKS || protect {
        return Err(Sense::INVALID_FIELD);
    }
    extent(info, first, count)
}

fn writable(info: &BlockInfo) -> Result<(), Sense> {
    if info.readonly { Err(Sense::PROTECTED) } else { Ok(()) }
}

fn write_same(cdb: &Cdb, info: &BlockInfo) -> Result<Step, Sense> {
    let (first, count) = cdb.blocks();
    let flags = cdb.byte(1);
    let no_data = cdb.code() == 0x93 && flags & NO_DATA != 0;
    let refused =
        flags & (PROTECT | ANCHOR | NUMBERED) != 0 || (flags & UNMAP != 0 && !info.discards);
    if refused || !(1..=MAX_SAME_BLOCKS).contains(&count) {
        return Err(Sense::INVALID_FIELD);
    }
    let (offset, length) = extent(info, first, count)?;
    writable(info)?;
    let unmap = flags & UNMAP != 0;
    Ok(if no_data {
        Step::Zero { offset, length, unmap }
    } else {
        Step::Same { offset, length, block: block_size(info), unmap }
    })
}

/// SBC-3, 5.15.2.
fn capacity_10(info: &BlockInfo) -> Vec<u8> {
    let last = u32::try_from(last_block(info)).unwrap_or(u32::MAX);
    let mut data = last.to_be_bytes().to_vec();
    data.extend((block_size(info) as u32).to_be_bytes());
    data
}

/// SBC-3, 5.16.2.
fn capacity_16(info: &BlockInfo) -> Vec<u8> {
    let mut data = last_block(info).to_be_bytes().to_vec();
    data.extend((block_size(info) as u32).to_be_bytes());
    data.resize(32, 0);
    data[13] = (PHYSICAL / block_size(info)).max(1).ilog2() as u8;
    data[14] = u8::from(info.discards) << 7;
    data
}

fn last_block(info: &BlockInfo) -> u64 {
    blocks(info).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: BlockInfo = BlockInfo {
        size: 1000 * 512,
        block_size: 512,
        readonly: false,
        discards: true,
        discard_granularity: 4096,
    };

    fn ask_of(info: &BlockInfo, bytes: &[u8]) -> Result<Step, Sense> {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        Disk { attention: None, stopped: false }.begin(&Cdb(cdb), info, "disk0")
    }

    fn ask(bytes: &[u8]) -> Result<Step, Sense> {
        ask_of(&INFO, bytes)
    }

    fn data(bytes: &[u8]) -> Vec<u8> {
        match ask(bytes) {
            Ok(Step::Data(data)) => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn transfers_of_each_length_name_the_same_blocks() {
        let read = Ok(Step::Read { offset: 3 * 512, length: 2 * 512 });
        assert_eq!(ask(&[0x08, 0, 0, 3, 2]), read);
        assert_eq!(ask(&[0x28, 0, 0, 0, 0, 3, 0, 0, 2]), read);
        assert_eq!(ask(&[0xA8, 0, 0, 0, 0, 3, 0, 0, 0, 2]), read);
        assert_eq!(ask(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2]), read);
        assert_eq!(ask(&[0x08]), Ok(Step::Read { offset: 0, length: 256 * 512 }));
        assert_eq!(ask(&[0x28]), Ok(Step::Done));
        let write = |durable| Ok(Step::Write { offset: 3 * 512, length: 2 * 512, durable });
        // The highest bits of a block's number, where others have FUA.
        assert_eq!(ask(&[0x0A, 0x08, 0, 3, 2]), Err(Sense::OUT_OF_RANGE));
        assert_eq!(ask(&[0x0A, 0, 0, 3, 2]), write(false));
        assert_eq!(ask(&[0x2A, 8, 0, 0, 0, 3, 0, 0, 2]), write(true));
        assert_eq!(ask(&[0xAA, 8, 0, 0, 0, 3, 0, 0, 0, 2]), write(true));
        assert_eq!(ask(&[0x8A, 8, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2]), write(true));
    }

    #[test]
    fn what_is_out_of_range_or_not_there_is_said() {
        for (bytes, sense) in [
            (&[0x28, 0, 0, 0, 3, 0xE7, 0, 0, 2][..], Sense::OUT_OF_RANGE),
            (&[0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 1], Sense::OUT_OF_RANGE),
            (&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], Sense::INVALID_FIELD),
            (&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD),
            (&[0x35, 0, 0, 0, 4, 0, 0, 0, 1], Sense::OUT_OF_RANGE),
            (&[0x41, 0, 0, 0, 0, 0, 0, 0, 0], Sense::INVALID_FIELD),
            (&[0x93, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD),
            (&[0x41, 2, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD),
            (&[0x93, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD),
            (&[0x2F, 2, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD),
            (&[0x12, 0, 0x80, 0, 255], Sense::INVALID_FIELD),
            (&[0x12, 1, 0xB9, 0, 255], Sense::INVALID_FIELD),
            (&[0x1A, 0, 0x08 | 0xC0, 0, 255], Sense::NOT_SAVED),
            (&[0x1A, 0, 0x1C, 0, 255], Sense::INVALID_FIELD),
            (&[0x9E, 0x11], Sense::INVALID_FIELD),
            (&[0xFF], Sense::INVALID_COMMAND),
        ] {
            assert_eq!(ask(bytes), Err(sense), "{bytes:x?}");
        }
        let readonly = BlockInfo { readonly: true, discards: false, ..INFO };
        for (bytes, sense) in [
            (&[0x2A, 0, 0, 0, 0, 0, 0, 0, 1][..], Sense::PROTECTED),
            (&[0x93, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], Sense::PROTECTED),
            (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24], Sense::INVALID_COMMAND),
        ] {
            assert_eq!(ask_of(&readonly, bytes), Err(sense), "{bytes:x?}");
        }
    }

    #[test]
    fn attention_is_told_once_and_a_stopped_disk_waits() {
        let mut disk = Disk::default();
        let mut ask = |bytes: &[u8]| {
            let mut cdb = [0; 16];
            cdb[..bytes.len()].copy_from_slice(bytes);
            disk.begin(&Cdb(cdb), &INFO, "")
        };
        assert!(matches!(ask(&[0x12, 0, 0, 0, 36]), Ok(Step::Data(_))));
        assert_eq!(ask(&[0]), Err(Sense::RESET));
        assert_eq!(ask(&[0]), Ok(Step::Done));
        assert_eq!(ask(&[0x1B]), Ok(Step::Flush));
        assert_eq!(ask(&[0]), Err(Sense::STOPPED));
        assert_eq!(ask(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1]), Err(Sense::STOPPED));
        assert_eq!(ask(&[0x1B, 0, 0, 0, 1]), Ok(Step::Done));
        assert_eq!(ask(&[0]), Ok(Step::Done));
        let mut disk = Disk::default();
        let mut cdb = Cdb([0; 16]);
        (cdb.0[0], cdb.0[4]) = (3, 18);
        let sense = disk.begin(&cdb, &INFO, "");
        assert!(matches!(sense, Ok(Step::Data(data)) if data[2] == 6 && data[12] == 0x29));
        assert_eq!(disk.attention, None);
    }

    #[test]
    fn pages_describe_the_disk() {
        let standard = data(&[0x12, 0, 0, 0, 255]);
        assert_eq!((standard.len(), &standard[8..16]), (36, &b"TETRARCH"[..]));
        assert_eq!(data(&[0x12, 0, 0, 0, 5]).len(), 5);
        let pages = data(&[0x12, 1, 0, 0, 255]);
        for &page in &pages[4..] {
            let found = data(&[0x12, 1, page, 0, 255]);
            assert_eq!((found[1], found.len()), (page, 4 + usize::from(found[3])), "{page:x}");
        }
        assert_eq!(&data(&[0x12, 1, 0x80, 0, 255])[4..], b"disk0");
        assert_eq!(&data(&[0x12, 1, 0x83, 0, 255])[8..], b"TETRARCHdisk0");
        assert_eq!(data(&[0x12, 1, 0xB2, 0, 255])[4..], [0, 0xE0, 2, 0]);
        let caching = data(&[0x1A, 8, 0x08, 0, 255]);
        assert_eq!((caching[2], caching[4], caching[6]), (0x10, 8, 4));
        assert_eq!(usize::from(caching[0]) + 1, caching.len());
        let all = data(&[0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0]);
        assert_eq!(usize::from(u16::from_be_bytes([all[0], all[1]])) + 2, all.len());
        assert_eq!(all[8..16], [0, 0, 3, 0xE8, 0, 0, 2, 0]);
        assert_eq!(data(&[0x25])[..], [0, 0, 3, 0xE7, 0, 0, 2, 0]);
        let capacity = data(&[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32]);
        assert_eq!((capacity.len(), capacity[7], capacity[13], capacity[14]), (32, 0xE7, 3, 0x80));
    }

    #[test]
    fn ranges_to_unmap_are_inside_and_no_more_than_said() {
        assert_eq!(ask(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40]), Ok(Step::Unmap { length: 40 }));
        let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
        list.extend([0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0]);
        list.extend([0, 0, 0, 0, 0, 0, 3, 0xE7, 0, 0, 0, 1, 0, 0, 0, 0]);
        let both = [(8 * 512, 16 * 512), (999 * 512, 512)];
        assert_eq!(Disk::unmapped(&list, &INFO).unwrap(), both);
        assert_eq!(Disk::unmapped(&list[..39], &INFO).unwrap(), both[..1]);
        list[3] = 16;
        assert_eq!(Disk::unmapped(&list, &INFO).unwrap(), both[..1]);
        list[19] = 0xFF;
        list[18] = 0xFF;
        assert_eq!(Disk::unmapped(&list, &INFO), Err(Sense::OUT_OF_RANGE));
        assert_eq!(Disk::unmapped(&list[..7], &INFO), Err(Sense::LIST_LENGTH));
        let many = vec![0xFF; 8 + 16 * 300];
        assert_eq!(Disk::unmapped(&many, &INFO), Err(Sense::INVALID_PARAMETER));
    }
}
