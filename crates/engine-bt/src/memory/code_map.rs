//! Which guest memory has been translated.
//!
//! One word a guest page, one bit for each 64 bytes of it. A write that meets a
//! set bit makes the translations of the page invalid; who writes only notes
//! the page here, and each vCPU drops its translations before it goes on.
//!
//! Who translates marks, has all vCPUs end their direct writes to the page (see
//! [`rendezvous`](super::rendezvous)) and then compares the bytes with what it read.
//! Who writes does so and then looks at the marks: one of the two sees the other.
//! Marking and clearing exclude each other by the lock of the code cache.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tetrarch_memory::{
    GuestMemory, GuestPhys, MemoryObserver, PAGE_SHIFT, PAGE_SIZE, Refusal, Region,
};

use crate::state::address::PHYS_BITS;

/// Bytes that one bit stands for.
pub const LINE: usize = 64;

/// Pages of one chunk of the map: 128 MiB of guest memory.
const CHUNK_PAGES: u64 = 1 << 15;

/// The lines of each page of a chunk.
type Chunk = Box<[AtomicU64]>;

pub struct CodeMap {
    /// By guest physical address. A chunk is there from the first region on that
    /// reaches into it, and stays: regions come and go while others are looked up.
    chunks: Box<[OnceLock<Chunk>]>,
    listeners: Mutex<Vec<Listener>>,
    /// How often translations of a page were dropped.
    drops: AtomicU64,
}

/// A page whose translations were written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub page: u64,
    /// How many drops there had been by then: a later one of this page has seen to
    /// the write, and what was translated since is current.
    pub epoch: u64,
}

/// A vCPU that runs translations.
struct Listener {
    written: Vec<Written>,
    /// Raises the vCPU's request flag.
    notify: Box<dyn Fn() + Send + Sync>,
}

/// The lines that `len` bytes at `offset` of a page touch.
pub fn lines(offset: u64, len: u64) -> u64 {
    debug_assert!(len >= 1 && offset + len <= PAGE_SIZE);
    let (first, last) = (offset >> 6, (offset + len - 1) >> 6);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl CodeMap {
    pub fn new(memory: &GuestMemory) -> Self {
        let count = (1 << PHYS_BITS) / (CHUNK_PAGES * PAGE_SIZE);
        let chunks = (0..count).map(|_| OnceLock::new()).collect();
        let map = Self { chunks, listeners: Mutex::default(), drops: AtomicU64::new(0) };
        memory.regions().iter().for_each(|region| map.cover(region));
        map
    }

    /// Makes place for the lines of a region.
    fn cover(&self, region: &Region) {
        let last = region.start.offset(region.len - 1).page();
        for chunk in region.start.page() / CHUNK_PAGES..=last / CHUNK_PAGES {
            if let Some(chunk) = self.chunks.get(chunk as usize) {
                chunk.get_or_init(|| (0..CHUNK_PAGES).map(|_| AtomicU64::new(0)).collect());
            }
        }
    }

    /// Lets each vCPU drop the translations of a region that is no longer there.
    fn forget(&self, region: &Region) {
        let first = region.start.page();
        for page in first..first + (region.len >> PAGE_SHIFT) {
            self.wrote(GuestPhys(page << PAGE_SHIFT), PAGE_SIZE);
        }
    }

    /// Registers a vCPU: what raises its request flag. Returns its number here.
    pub fn add_listener(&self, notify: Box<dyn Fn() + Send + Sync>) -> usize {
        let mut listeners = self.listeners.lock();
        listeners.push(Listener { written: Vec::new(), notify });
        listeners.len() - 1
    }

    #[inline]
    fn page(&self, page: u64) -> Option<&AtomicU64> {
        let chunk = self.chunks.get((page / CHUNK_PAGES) as usize)?.get()?;
        chunk.get((page % CHUNK_PAGES) as usize)
    }

    /// Whether any byte of the page has been translated.
    #[inline]
    pub fn has_code(&self, address: GuestPhys) -> bool {
        self.page(address.page()).is_some_and(|lines| lines.load(Ordering::Acquire) != 0)
    }

    /// Marks lines as translated. The caller holds the lock of the code cache.
    pub fn mark(&self, page: u64, lines: u64) {
        if let Some(word) = self.page(page) {
            word.fetch_or(lines, Ordering::SeqCst);
        }
    }

    /// Forgets a page whose translations have been dropped. Returns the epoch that
    /// begins with that. The caller holds the lock of the code cache.
    pub fn clear(&self, page: u64) -> u64 {
        if let Some(word) = self.page(page) {
            word.store(0, Ordering::Release);
        }
        self.drops.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Notes a write of `len` bytes inside one page, after the bytes are there.
    #[inline]
    pub fn wrote(&self, address: GuestPhys, len: u64) {
        let Some(word) = self.page(address.page()) else { return };
        // The bytes are there before the marks are looked at; the processor would
        // have it the other way round.
        fence(Ordering::SeqCst);
        if word.load(Ordering::Acquire) & lines(address.page_offset(), len) != 0 {
            let mut listeners = self.listeners.lock();
            let page = address.page();
            let epoch = self.drops.load(Ordering::SeqCst);
            for listener in listeners.iter_mut() {
                match listener.written.last_mut() {
                    Some(last) if last.page == page => last.epoch = epoch,
                    _ => listener.written.push(Written { page, epoch }),
                }
                (listener.notify)();
            }
        }
    }

    /// Takes the pages whose translations are out of date for this listener.
    pub fn take_written(&self, listener: usize) -> Vec<Written> {
        let mut listeners = self.listeners.lock();
        listeners.get_mut(listener).map(|l| std::mem::take(&mut l.written)).unwrap_or_default()
    }
}

/// Tells the code map of what devices write, and of new memory.
pub struct MemoryChanges(pub Arc<CodeMap>);

impl MemoryObserver for MemoryChanges {
    fn mapped(&self, region: &Region) -> Result<(), Refusal> {
        self.0.cover(region);
        Ok(())
    }

    fn unmapped(&self, region: &Region) {
        self.0.forget(region);
    }

    fn written(&self, address: GuestPhys, length: u64) {
        let mut at = address;
        let mut left = length;
        while left > 0 {
            let len = left.min(PAGE_SIZE - at.page_offset());
            self.0.wrote(at, len);
            at = at.offset(len);
            left -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two vCPUs hear of a write. One drops the page and translates it anew; the
    /// other comes late, and must be able to tell.
    #[test]
    fn note_tells_whether_the_page_was_dropped_since() {
        let map = CodeMap::new(&GuestMemory::new(1 << 20).unwrap());
        let (first, second) =
            (map.add_listener(Box::new(|| ())), map.add_listener(Box::new(|| ())));
        map.mark(5, 1);
        map.wrote(GuestPhys(5 << PAGE_SHIFT), 1);
        let note = map.take_written(first);
        assert_eq!(note, [Written { page: 5, epoch: 0 }]);
        let dropped = map.clear(5);
        map.mark(5, 1);
        let late = map.take_written(second);
        assert!(dropped > late[0].epoch, "what is there now is newer than the write");
        // A write to the new translation is for both, the late one too.
        map.wrote(GuestPhys(5 << PAGE_SHIFT), 1);
        for listener in [first, second] {
            let note = map.take_written(listener);
            assert_eq!(note.len(), 1);
            assert!(note[0].epoch >= dropped);
        }
    }

    #[test]
    fn repeated_writes_leave_one_note_of_the_last() {
        let map = CodeMap::new(&GuestMemory::new(1 << 20).unwrap());
        let listener = map.add_listener(Box::new(|| ()));
        map.mark(5, u64::MAX);
        map.wrote(GuestPhys(5 << PAGE_SHIFT), 1);
        let epoch = map.clear(6);
        map.wrote(GuestPhys(5 << PAGE_SHIFT), 8);
        assert_eq!(map.take_written(listener), [Written { page: 5, epoch }]);
        assert!(map.take_written(listener).is_empty());
    }
}
