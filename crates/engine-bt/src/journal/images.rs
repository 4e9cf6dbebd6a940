//! What a replay was at its checkpoints, to go back to.
//!
//! An image has the pages that were written since the one before it; what a page held at an
//! image is in the last one up to there that has it, or in the recording's start. Images are
//! made where the recorder had a checkpoint, since there it emptied the vCPU's tables too: a
//! guest that goes on from one finds them as they were.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;

use rustc_hash::FxHashMap;
use tetrarch_engine::EngineError;
use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SHIFT, PAGE_SIZE};

use super::pages::is_zero;
use super::player::Mark;

/// What all images together may hold: then some in the middle go.
const BYTES_MAX: usize = 1 << 30;

pub struct Image<M> {
    pub count: u64,
    /// The machine beside its memory.
    pub machine: M,
    /// Where the recording is read on.
    pub mark: Mark,
    /// By number: LZ4, or nothing for one of zeroes.
    pages: FxHashMap<u64, Box<[u8]>>,
}

pub struct Images<M> {
    images: Vec<Image<M>>,
    /// The last one that the machine has come past.
    at: usize,
    bytes: usize,
    bytes_max: usize,
}

impl<M> Images<M> {
    /// Begins with the start of the recording.
    pub fn new(machine: M, mark: Mark) -> Self {
        let start = Image { count: 0, machine, mark, pages: FxHashMap::default() };
        Self { images: vec![start], at: 0, bytes: 0, bytes_max: BYTES_MAX }
    }

    /// The machine is at a checkpoint, with these pages written since the last.
    pub fn add(
        &mut self,
        count: u64,
        memory: &GuestMemory,
        written: impl Iterator<Item = u64>,
        machine: impl FnOnce() -> (M, Mark),
    ) -> Result<(), EngineError> {
        let next = self.at + 1;
        if self.images.get(next).is_some_and(|image| image.count == count) {
            self.at = next;
            return Ok(());
        }
        let mut data = [0; PAGE_SIZE as usize];
        let mut pages = FxHashMap::default();
        for page in written {
            memory.read(GuestPhys(page << PAGE_SHIFT), &mut data)?;
            let zero = is_zero(&data);
            let packed = if zero { Vec::new() } else { lz4_flex::block::compress(&data) };
            self.bytes += packed.len();
            pages.insert(page, packed.into_boxed_slice());
        }
        let (machine, mark) = machine();
        self.images.insert(next, Image { count, machine, mark, pages });
        self.at = next;
        while self.bytes > self.bytes_max && self.thin() {}
        Ok(())
    }

    /// The last one up to a count.
    pub fn latest(&self, count: u64) -> usize {
        self.images.partition_point(|image| image.count <= count).saturating_sub(1)
    }

    pub fn get(&self, index: usize) -> &Image<M> {
        &self.images[index]
    }

    /// The pages that differ, or may, between the machine as it is, with these written since the
    /// last image, and as it was at another image.
    pub fn changed(&self, to: usize, written: impl Iterator<Item = u64>) -> BTreeSet<u64> {
        let between = self.at.min(to) + 1..=self.at.max(to);
        let images = self.images.get(between).unwrap_or_default();
        written.chain(images.iter().flat_map(|image| image.pages.keys().copied())).collect()
    }

    /// What a page held at an image; `None`: what it held at the start.
    pub fn page(&self, index: usize, page: u64) -> Result<Option<Vec<u8>>, EngineError> {
        let newest = self.images[..=index].iter().rev();
        let Some(packed) = newest.into_iter().find_map(|image| image.pages.get(&page)) else {
            return Ok(None);
        };
        if packed.is_empty() {
            return Ok(Some(vec![0; PAGE_SIZE as usize]));
        }
        let unpacked = lz4_flex::block::decompress(packed, PAGE_SIZE as usize);
        unpacked
            .map(Some)
            .map_err(|error| EngineError::Internal(format!("a page's image: {error}")))
    }

    /// The machine is as it was there.
    pub fn went(&mut self, to: usize) {
        self.at = to;
    }

    /// Takes the image away that leaves the shortest way between its neighbours. False where
    /// there is none but the first, the last and where the machine is.
    fn thin(&mut self) -> bool {
        let between = 1..self.images.len().saturating_sub(1);
        let way = |index: &usize| self.images[index + 1].count - self.images[index - 1].count;
        let Some(index) = between.filter(|&index| index != self.at).min_by_key(way) else {
            return false;
        };
        let gone = self.images.remove(index);
        let heir = &mut self.images[index].pages;
        for (page, packed) in gone.pages {
            match heir.entry(page) {
                Entry::Occupied(_) => self.bytes -= packed.len(),
                Entry::Vacant(place) => drop(place.insert(packed)),
            }
        }
        if self.at > index {
            self.at -= 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    fn write(memory: &GuestMemory, page: u64, byte: u8) {
        memory.write(GuestPhys(page << PAGE_SHIFT), &[byte; PAGE]).unwrap();
    }

    fn first(images: &Images<u32>, index: usize, page: u64) -> Option<u8> {
        images.page(index, page).unwrap().map(|data| data[PAGE - 1])
    }

    /// Images at 10, 20, 30 … of a page that all write, and of one that each writes alone.
    fn filled(count: u64) -> (GuestMemory, Images<u32>) {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut images = Images::new(0, Mark::default());
        for number in 1..=count {
            write(&memory, 1, number as u8);
            write(&memory, 10 + number, number as u8);
            let written = [1, 10 + number].into_iter();
            images.add(10 * number, &memory, written, || (number as u32, Mark::default())).unwrap();
        }
        (memory, images)
    }

    #[test]
    fn a_page_is_what_it_was_at_an_image() {
        let (memory, mut images) = filled(4);
        assert_eq!([0, 9, 10, 39, 40, 99].map(|count| images.latest(count)), [0, 0, 1, 3, 4, 4]);
        assert_eq!(first(&images, 0, 1), None, "the start has it");
        assert_eq!(first(&images, 2, 1), Some(2));
        assert_eq!(first(&images, 3, 11), Some(1), "it was written before");
        let pages = |set: BTreeSet<u64>| set.into_iter().collect::<Vec<_>>();
        assert_eq!(pages(images.changed(2, [99].into_iter())), [1, 13, 14, 99]);
        images.went(2);
        assert_eq!(pages(images.changed(4, [].into_iter())), [1, 13, 14], "forward as well");
        assert_eq!(pages(images.changed(2, [7].into_iter())), [7]);
        // Once more past the third: it is known.
        images.add(30, &memory, [1, 13].into_iter(), || panic!("it is there")).unwrap();
        assert_eq!(images.at, 3);
    }

    #[test]
    fn pages_of_zeroes_come_back() {
        let (memory, mut images) = filled(1);
        write(&memory, 1, 0);
        images.add(20, &memory, [1].into_iter(), || (2, Mark::default())).unwrap();
        assert_eq!(first(&images, 2, 1), Some(0));
    }

    #[test]
    fn where_there_are_too_many_some_in_the_middle_go() {
        let (_, mut images) = filled(9);
        let before: Vec<_> = (0..10).map(|at| images.get(at).machine).collect();
        assert_eq!(before, (0..10).collect::<Vec<_>>());
        assert!(images.thin() && images.thin() && images.thin());
        assert_eq!(images.images.len(), 7);
        assert_eq!((images.get(0).count, images.get(6).count, images.at), (0, 90, 6));
        for at in 1..images.images.len() {
            let number = images.get(at).machine;
            assert_eq!(images.latest(u64::from(number) * 10), at);
            for page in 1..=number {
                let expected = Some(page as u8);
                assert_eq!(first(&images, at, 10 + u64::from(page)), expected, "at {number}");
            }
            assert_eq!(first(&images, at, 1), Some(number as u8));
        }
        while images.thin() {}
        assert_eq!(images.images.len(), 2);
    }

    #[test]
    fn what_they_hold_together_is_bounded() {
        let (memory, mut images) = filled(6);
        images.bytes_max = images.bytes / 2;
        for number in 7..=9 {
            write(&memory, 1, number as u8);
            let count = 10 * number;
            images
                .add(count, &memory, [1].into_iter(), || (number as u32, Mark::default()))
                .unwrap();
            // An image less is a page less, where a later one has it too; that of the first six
            // which each has alone stay, and are more than the half.
            assert_eq!(images.images.len(), 2, "all but the start and the last are gone");
            assert_eq!(first(&images, 1, 1), Some(number as u8));
            assert_eq!(first(&images, 1, 13), Some(3));
        }
        let held = images.images.iter().flat_map(|image| image.pages.values());
        assert_eq!(images.bytes, held.map(|packed| packed.len()).sum::<usize>());
    }
}
