//! Which guest memory was written since the log was last taken.
//!
//! One bit a guest page. While the log is on, a page whose bit is clear has no
//! write entry in any TLB, so that a vCPU's first write to it comes to
//! [`Cpu::fill_tlb`](crate::cpu::Cpu::fill_tlb), which marks it; the writes after
//! that cost nothing. Who clears bits therefore has every vCPU drop its write
//! entries (see [`rendezvous`](super::rendezvous)), and returns when each has done
//! so: what was written until then is in memory, and its page in what was taken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tetrarch_engine::DirtyPages;
use tetrarch_memory::{GuestMemory, GuestPhys, MemoryObserver, PAGE_SHIFT, Refusal, Region};

use crate::memory::rendezvous::{Order, Rendezvous};
use crate::state::address::PHYS_BITS;

/// Pages of one word.
const WORD_PAGES: u64 = 64;
/// Pages of one chunk: 128 MiB of guest memory.
const CHUNK_PAGES: u64 = 1 << 15;

type Chunk = Box<[AtomicU64]>;

/// Lock: `changing`, then nothing.
pub struct DirtyLog {
    on: AtomicBool,
    /// By guest physical address, made with the first region that reaches into it.
    chunks: Box<[OnceLock<Chunk>]>,
    rendezvous: Arc<Rendezvous>,
    /// Held by who switches or takes the log.
    changing: Mutex<()>,
}

impl DirtyLog {
    pub fn new(memory: &GuestMemory, rendezvous: Arc<Rendezvous>) -> Self {
        let count = (1 << (PHYS_BITS - PAGE_SHIFT)) / CHUNK_PAGES;
        let log = Self {
            on: AtomicBool::new(false),
            chunks: (0..count).map(|_| OnceLock::new()).collect(),
            rendezvous,
            changing: Mutex::new(()),
        };
        memory.regions().iter().for_each(|region| log.cover(region));
        log
    }

    /// Makes place for the bits of a region.
    fn cover(&self, region: &Region) {
        let last = region.start.offset(region.len - 1).page();
        for chunk in region.start.page() / CHUNK_PAGES..=last / CHUNK_PAGES {
            if let Some(chunk) = self.chunks.get(chunk as usize) {
                chunk.get_or_init(|| {
                    (0..CHUNK_PAGES / WORD_PAGES).map(|_| AtomicU64::new(0)).collect()
                });
            }
        }
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        let chunk = self.chunks.get((page / CHUNK_PAGES) as usize)?.get()?;
        chunk.get((page % CHUNK_PAGES / WORD_PAGES) as usize)
    }

    /// Notes a write to the page of `address`: by a vCPU before it, as others wait
    /// for vCPUs; by everybody else behind it.
    #[inline]
    pub fn mark(&self, address: GuestPhys) {
        if self.on.load(Ordering::SeqCst) {
            self.mark_page(address.page());
        }
    }

    #[cold]
    fn mark_page(&self, page: u64) {
        if let Some(word) = self.word(page) {
            word.fetch_or(1 << (page % WORD_PAGES), Ordering::SeqCst);
        }
    }

    /// Whether the first write to the page is still to be seen.
    #[inline]
    pub fn waits_for(&self, address: GuestPhys) -> bool {
        self.on.load(Ordering::SeqCst) && !self.is_marked(address.page())
    }

    #[cold]
    fn is_marked(&self, page: u64) -> bool {
        let bit = page % WORD_PAGES;
        self.word(page).is_none_or(|word| word.load(Ordering::SeqCst) >> bit & 1 != 0)
    }

    /// Takes the bits of a range of pages.
    fn take_range(&self, start: GuestPhys, len: u64) -> DirtyPages {
        let mut taken = DirtyPages::new(start, len);
        let (first, end) = (start.page(), start.page() + (len >> PAGE_SHIFT));
        let mut page = first;
        while page < end {
            let base = page - page % WORD_PAGES;
            let next = (base + WORD_PAGES).min(end);
            let mask = u64::MAX >> (WORD_PAGES - (next - page)) << (page - base);
            let word = self.word(page).map_or(0, |word| {
                // Most words are clear: no write to their cache lines.
                if word.load(Ordering::SeqCst) & mask == 0 {
                    return 0;
                }
                word.fetch_and(!mask, Ordering::SeqCst) & mask
            });
            for bit in (0..WORD_PAGES).filter(|bit| word >> bit & 1 != 0) {
                taken.mark(base + bit - first);
            }
            page = next;
        }
        taken
    }

    /// Switches the log; it begins empty.
    pub fn set(&self, memory: &GuestMemory, on: bool) {
        let _guard = self.changing.lock();
        if self.on.load(Ordering::SeqCst) == on {
            return;
        }
        if !on {
            self.on.store(false, Ordering::SeqCst);
            return;
        }
        for region in memory.regions() {
            self.take_range(region.start, region.len);
        }
        self.on.store(true, Ordering::SeqCst);
        self.rendezvous.ask(Order::ProtectAll, None, |_| ());
    }

    /// What was written since the last call, by region; nothing while the log is off.
    pub fn take(&self, memory: &GuestMemory) -> Vec<DirtyPages> {
        let _guard = self.changing.lock();
        let regions = memory.regions();
        if !self.on.load(Ordering::SeqCst) {
            return regions
                .iter()
                .map(|region| DirtyPages::new(region.start, region.len))
                .collect();
        }
        let taken =
            regions.iter().map(|region| self.take_range(region.start, region.len)).collect();
        self.rendezvous.ask(Order::ProtectAll, None, |_| ());
        taken
    }
}

/// Tells the log of what devices write, and of memory that comes and goes.
pub struct DeviceWrites(pub Arc<DirtyLog>);

impl MemoryObserver for DeviceWrites {
    fn written(&self, address: GuestPhys, length: u64) {
        // The bytes are there before the log is looked at.
        fence(Ordering::SeqCst);
        if !self.0.on.load(Ordering::SeqCst) {
            return;
        }
        let Some(last) = length.checked_sub(1) else { return };
        for page in address.page()..=address.offset(last).page() {
            self.0.mark_page(page);
        }
    }

    fn mapped(&self, region: &Region) -> Result<(), Refusal> {
        self.0.cover(region);
        Ok(())
    }

    /// What comes to lie there next is another region, and not written yet.
    fn unmapped(&self, region: &Region) {
        self.0.take_range(region.start, region.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::Wake;

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self, _: usize) {}
    }

    /// Regions begin and end inside words, and share them.
    #[test]
    fn neighbours_bits_stay() {
        let memory = GuestMemory::new(70 << PAGE_SHIFT).unwrap();
        let log = DirtyLog::new(&memory, Arc::new(Rendezvous::new(0, Arc::new(Nobody))));
        log.set(&memory, true);
        for page in [0, 63, 64, 69] {
            log.mark(GuestPhys(page << PAGE_SHIFT));
        }
        let part = log.take_range(GuestPhys(63 << PAGE_SHIFT), 2 << PAGE_SHIFT);
        assert_eq!(part.bitmap, [3]);
        let rest = log.take(&memory);
        assert_eq!(rest[0].bitmap, [1, 1 << 5]);
        assert_eq!(log.take(&memory)[0].count(), 0);
    }

    #[test]
    fn taking_waits_for_a_vcpu_that_runs_and_for_no_other() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let vcpus = Arc::new(Rendezvous::new(2, Arc::new(Nobody)));
        let log = DirtyLog::new(&memory, Arc::clone(&vcpus));
        log.set(&memory, true);
        vcpus.enter(0);
        let (orders, number) = vcpus.take(0).unwrap();
        assert!(orders.all_pages);
        vcpus.done(0, number);
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| log.take(&memory));
            let number = loop {
                if let Some((_, number)) = vcpus.take(0) {
                    break number;
                }
                std::thread::yield_now();
            };
            // A write by an entry of before.
            assert!(!taker.is_finished());
            vcpus.done(0, number);
            taker.join().unwrap();
        });
        assert!(vcpus.take(1).unwrap().0.all_pages);
    }
}
