//! The sum of all memory, kept by the pages that were written.

use rustc_hash::FxHashMap;
use tetrarch_engine::{DirtyPages, EngineError};
use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SHIFT, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;

/// Pages that are not zero, by number, with the CRC of each.
#[derive(Default)]
pub struct Pages {
    sums: FxHashMap<u64, u32>,
    total: u64,
}

/// Looks at many bytes at a time: most of what is looked at is zero.
pub fn is_zero(data: &[u8]) -> bool {
    data.chunks(256).all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// One page's part of the sum (the finisher of SplitMix64): equal pages at two places differ.
fn part(page: u64, crc: u32) -> u64 {
    let mut z = page << 32 ^ u64::from(crc);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

impl Pages {
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Looks at a page anew. Returns its CRC, 0 for one of zeroes.
    pub fn look(&mut self, page: u64, data: &[u8]) -> u32 {
        let zero = is_zero(data);
        let crc = if zero { 0 } else { crc32fast::hash(data).max(1) };
        let before =
            if zero { self.sums.remove(&page) } else { self.sums.insert(page, crc) }.unwrap_or(0);
        if before != crc {
            for (crc, add) in [(before, false), (crc, true)] {
                let part = if crc == 0 { 0 } else { part(page, crc) };
                let total = self.total;
                self.total = if add { total.wrapping_add(part) } else { total.wrapping_sub(part) };
            }
        }
        crc
    }

    /// Looks at the written pages; gives the number and CRC of each.
    pub fn look_at(
        &mut self,
        memory: &GuestMemory,
        written: &[DirtyPages],
    ) -> Result<Vec<(u64, u32)>, EngineError> {
        let mut seen = Vec::new();
        let mut data = [0; PAGE];
        for address in written.iter().flat_map(DirtyPages::addresses) {
            memory.read(address, &mut data)?;
            seen.push((address.page(), self.look(address.page(), &data)));
        }
        Ok(seen)
    }
}

/// Runs of pages that are not zero: each page's number and bytes. What the host has no memory
/// for is left out unread.
pub fn each_page(
    memory: &GuestMemory,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let mut data = [0; PAGE];
    for region in memory.regions() {
        let end = region.start.page() + (region.len >> PAGE_SHIFT);
        let mut page = region.start.page();
        while page < end {
            let Some(next) = next_data(&region, (page - region.start.page()) << PAGE_SHIFT) else {
                break;
            };
            page = page.max(region.start.page() + (next >> PAGE_SHIFT));
            if page >= end {
                break;
            }
            memory.read(GuestPhys(page << PAGE_SHIFT), &mut data)?;
            if !is_zero(&data) {
                each(page, &data)?;
            }
            page += 1;
        }
    }
    Ok(())
}

/// Whether the host has no memory for any of a range.
pub fn is_hole(memory: &GuestMemory, address: u64, length: u64) -> bool {
    let found = memory.regions().into_iter().find(|r| address.wrapping_sub(r.start.0) < r.len);
    let Some(region) = found else { return false };
    let offset = address - region.start.0;
    offset + length <= region.len
        && next_data(&region, offset).is_none_or(|next| next >= offset + length)
}

/// Where the file of a region has data, from an offset in the region on; `None`: nowhere.
fn next_data(region: &tetrarch_memory::Region, offset: u64) -> Option<u64> {
    let Some(file) = region.file() else { return Some(offset) };
    let at = rustix::fs::SeekFrom::Data(file.start() + offset);
    match rustix::fs::seek(file.file(), at) {
        Ok(found) => Some(found - file.start()),
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_follows_what_is_written() {
        let memory = GuestMemory::new(64 << 20).unwrap();
        memory.write(GuestPhys(0x3000), b"here").unwrap();
        memory.write(GuestPhys(0x40_0000), b"there").unwrap();
        let sum = |memory: &GuestMemory| {
            let mut pages = Pages::default();
            each_page(memory, |page, data| {
                pages.look(page, data);
                Ok(())
            })
            .unwrap();
            pages
        };
        let mut pages = sum(&memory);
        assert_eq!(pages.sums.len(), 2);
        memory.write(GuestPhys(0x3000), &[0; 4]).unwrap();
        memory.write(GuestPhys(0x5000), b"here").unwrap();
        let mut written = DirtyPages::new(GuestPhys(0), 64 << 20);
        [3, 4, 5].into_iter().for_each(|page| written.mark(page));
        let seen = pages.look_at(&memory, &[written]).unwrap();
        assert_eq!(seen.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!((seen[0].1, seen[1].1), (0, 0));
        assert_eq!(pages.total(), sum(&memory).total());
        memory.write(GuestPhys(0x5000), &[0; 4]).unwrap();
        memory.write(GuestPhys(0x6000), b"here").unwrap();
        assert_ne!(pages.total(), sum(&memory).total(), "the same bytes elsewhere");
    }
}
