//! Which pages were written.

use tetrarch_memory::{GuestPhys, PAGE_SHIFT};

/// Written pages of one region of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    pub start: GuestPhys,
    /// One bit a page, from the lowest.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// None of a region of `len` bytes.
    pub fn new(start: GuestPhys, len: u64) -> Self {
        let pages = (len >> PAGE_SHIFT) as usize;
        Self { start, bitmap: vec![0; pages.div_ceil(64)] }
    }

    /// Adds a page, counted from the region's first.
    pub fn mark(&mut self, page: u64) {
        if let Some(word) = self.bitmap.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    pub fn contains(&self, address: GuestPhys) -> bool {
        let page = address.0.wrapping_sub(self.start.0) >> PAGE_SHIFT;
        self.bitmap.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    pub fn count(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Where the written pages begin, from the lowest.
    pub fn addresses(&self) -> impl Iterator<Item = GuestPhys> + '_ {
        let pages = 0..self.bitmap.len() as u64 * 64;
        pages
            .map(|page| self.start.offset(page << PAGE_SHIFT))
            .filter(|&address| self.contains(address))
    }
}
