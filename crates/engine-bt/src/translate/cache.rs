//! The code cache: translations, how they are found and how they die.
//!
//! A translation belongs to a guest linear address, the physical page that was
//! mapped there, and the mode word. The pair (linear page, physical page) at a
//! privilege has a number, its *exec id*; the vCPU's exec table holds the id of
//! what is mapped at each page now. A jump into another page is linked directly
//! and guarded by one compare of the exec table with the id it was linked for,
//! so links survive address-space switches and die with a change of mapping.
//! Dropping a page retires its ids: every link into it then misses by itself.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tetrarch_memory::GuestPhys;

use super::block::{Built, MapEntry, Site, What};
use super::sites::{MAX_SITES, Sites};
use super::stubs::{self, Fill, Stubs};
use crate::cpu::x87_pointers::CodePlaces;
use crate::host::code_memory::CodeMemory;
use crate::host::signals;

/// Room for translations. A full cache starts over.
const CACHE_BYTES: usize = 192 << 20;

/// The most blocks, and the most mappings of pages with code, that are kept: a
/// guest of one-instruction blocks shall not fill the host's memory.
const MAX_RECORDS: usize = 1 << 20;

/// No translation is longer: 64 instructions with every part at its largest.
pub const MAX_BLOCK_BYTES: usize = 64 << 10;

/// No block has more: 64 instructions, with three ways out at most.
const MAX_BLOCK_SITES: usize = 256;

pub struct Block {
    pub rip: u64,
    pub id: u32,
    pub mode: u32,
    /// Offsets in the cache.
    pub start: u32,
    /// Entry with the flags put aside; the plain entry is `start + entry`.
    pub indirect_entry: u32,
    pub entry: u32,
    /// Arithmetic flags that the block needs on entry.
    pub flags_in: u32,
    pub map: Box<[MapEntry]>,
    pub live: bool,
}

/// A page of guest code as mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExecPage {
    pub linear: u64,
    pub physical: u64,
    pub user: bool,
}

#[derive(Default)]
struct CodePage {
    blocks: Vec<u32>,
    ids: Vec<u32>,
    /// No vCPU writes to the page but where it is seen.
    protected: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    rip: u64,
    id: u32,
    mode: u32,
}

pub struct CodeCache {
    memory: CodeMemory,
    signal_slot: usize,
    pub stubs: Stubs,
    first: usize,
    next: usize,
    blocks: Vec<Block>,
    pub sites: Arc<Sites>,
    // Keys are page numbers and addresses: a guest that makes them collide slows only
    // itself down.
    directory: FxHashMap<Key, u32>,
    pages: FxHashMap<u64, CodePage>,
    ids: FxHashMap<ExecPage, u32>,
    exec_pages: Vec<ExecPage>,
    /// The epoch of the code map in which a page was last dropped.
    dropped: FxHashMap<u64, u64>,
    /// Whether the guest mapped the page as global when it was last walked.
    global: Vec<bool>,
}

impl CodeCache {
    /// Whether the host gives executable memory.
    pub fn probe() -> std::io::Result<()> {
        CodeMemory::new("tetrarch-code", 4096).map(drop)
    }

    /// `fill` is what translated code calls on a TLB miss.
    pub fn new(fill: Fill) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new("tetrarch-code", CACHE_BYTES)?;
        let avx = crate::cpu::fpu::host_avx();
        let (bytes, stubs) =
            stubs::assemble(memory.run_address(0), avx, fill).map_err(std::io::Error::other)?;
        memory.write(0, &bytes);
        let first = bytes.len().next_multiple_of(64);
        // A fault in the stubs themselves is ours and must not look like a guest's.
        let (start, end) = (memory.run_address(first), memory.run_address(memory.len()));
        let signal_slot = signals::add_code(start, end, stubs.leave_signal)
            .ok_or_else(|| std::io::Error::other("too many VMs in one process"))?;
        let none = ExecPage { linear: u64::MAX, physical: u64::MAX, user: false };
        Ok(Self {
            memory,
            signal_slot,
            stubs,
            first,
            next: first,
            blocks: Vec::new(),
            sites: Arc::new(Sites::new()),
            // Keys are page numbers and addresses: a guest that makes them collide slows only
            // itself down.
            directory: FxHashMap::default(),
            pages: FxHashMap::default(),
            ids: FxHashMap::default(),
            exec_pages: vec![none],
            dropped: FxHashMap::default(),
            global: vec![false],
        })
    }

    /// True if a block may not fit any more: the caller must `clear` first.
    pub fn is_full(&self) -> bool {
        self.memory.len() - self.next < MAX_BLOCK_BYTES
            || self.blocks.len() >= MAX_RECORDS
            || MAX_SITES - self.sites.len() < MAX_BLOCK_SITES
            || self.exec_pages.len() >= MAX_RECORDS
    }

    /// Forgets everything. The caller has made sure that nobody runs in it and
    /// flushes its own tables. Returns the physical pages that held code.
    pub fn clear(&mut self) -> Vec<u64> {
        self.next = self.first;
        self.blocks.clear();
        self.sites = Arc::new(Sites::new());
        self.directory.clear();
        self.ids.clear();
        self.exec_pages.truncate(1);
        self.global.truncate(1);
        self.pages.drain().map(|(page, _)| page).collect()
    }

    pub fn exec_page(&self, id: u32) -> Option<ExecPage> {
        self.exec_pages.get(id as usize).copied()
    }

    /// The id of a page as mapped now.
    pub fn exec_id(&mut self, page: ExecPage, global: bool) -> u32 {
        if let Some(&id) = self.ids.get(&page) {
            self.global[id as usize] = global;
            return id;
        }
        let id = self.exec_pages.len() as u32;
        self.exec_pages.push(page);
        self.global.push(global);
        self.ids.insert(page, id);
        self.pages.entry(page.physical >> 12).or_default().ids.push(id);
        id
    }

    /// Whether a block's page is a global one, which a change of CR3 keeps.
    pub fn is_global(&self, index: u32) -> bool {
        self.global[self.block(index).id as usize]
    }

    pub fn find(&self, rip: u64, id: u32, mode: u32) -> Option<u32> {
        self.directory.get(&Key { rip, id, mode }).copied()
    }

    pub fn block(&self, index: u32) -> &Block {
        &self.blocks[index as usize]
    }

    /// Where the block is entered with the flags in `saved_flags`.
    pub fn indirect_entry(&self, index: u32) -> u64 {
        self.entry_of(self.block(index))
    }

    /// The same.
    pub fn entry_of(&self, block: &Block) -> u64 {
        self.memory.run_address((block.start + block.indirect_entry) as usize)
    }

    /// Stores a translation. `second` is the physical page of the tail of an
    /// instruction that crosses pages.
    pub fn insert(&mut self, id: u32, mode: u32, built: &mut Built, second: Option<u64>) -> u32 {
        let start = self.next;
        let base = self.memory.run_address(start);
        for &(place, target) in &built.outward {
            let relative = target.wrapping_sub(base + u64::from(place) + 4) as u32;
            let place = place as usize;
            built.code[place..place + 4].copy_from_slice(&relative.to_le_bytes());
        }
        let first_site = self.sites.len() as u32;
        for place in &built.site_numbers {
            let place = *place as usize;
            let mut number = [0; 4];
            number.copy_from_slice(&built.code[place..place + 4]);
            let number = u32::from_le_bytes(number) + first_site;
            built.code[place..place + 4].copy_from_slice(&number.to_le_bytes());
        }
        for site in &built.sites {
            let mut site = *site;
            if let What::Link(link) = &mut site.what {
                link.jump += start as u32;
                link.guard = link.guard.map(|guard| guard + start as u32);
            }
            self.sites.push(site);
        }
        self.memory.write(start, &built.code);
        self.next = (start + built.code.len()).next_multiple_of(16);

        let index = self.blocks.len() as u32;
        let physical = self.exec_pages[id as usize].physical;
        self.blocks.push(Block {
            rip: built.rip,
            id,
            mode,
            start: start as u32,
            indirect_entry: built.indirect_entry,
            entry: built.entry,
            flags_in: built.flags_in,
            map: built.map.as_slice().into(),
            live: true,
        });
        self.directory.insert(Key { rip: built.rip, id, mode }, index);
        self.pages.entry(physical >> 12).or_default().blocks.push(index);
        if let Some(second) = second {
            self.pages.entry(second >> 12).or_default().blocks.push(index);
        }
        index
    }

    /// Lets a direct branch go to `target` by itself from now on.
    pub fn link(&mut self, site: &Site, target: u32) {
        let What::Link(link) = site.what else { return };
        let block = self.block(target);
        if link.dead & block.flags_in != 0 {
            return;
        }
        let entry = if site.saved { block.indirect_entry } else { block.entry };
        let to = block.start + entry;
        let id = block.id;
        // The guard comes last: until it matches, the jump is not reached.
        self.memory.patch(link.jump as usize, to.wrapping_sub(link.jump + 4));
        if let Some(guard) = link.guard {
            self.memory.patch(guard as usize, id);
        }
    }

    /// The block and the instruction that a host address belongs to.
    pub fn instruction_at(&self, address: u64) -> Option<(&Block, MapEntry)> {
        let offset = self.memory.offset_of(address)? as u32;
        let index = self.blocks.partition_point(|block| block.start <= offset).checked_sub(1)?;
        let block = &self.blocks[index];
        let inside = offset - block.start;
        let entry = block.map.partition_point(|entry| entry.offset <= inside).checked_sub(1)?;
        Some((block, block.map[entry]))
    }

    /// Drops the translations of a physical page. `gone` sees each block; the
    /// result is the mappings that were retired. What a vCPU's tables hold of
    /// either must go.
    pub fn drop_page(&mut self, page: u64, mut gone: impl FnMut(&Block)) -> Vec<ExecPage> {
        let Some(code) = self.pages.remove(&page) else { return Vec::new() };
        for index in code.blocks {
            let block = &mut self.blocks[index as usize];
            if !std::mem::take(&mut block.live) {
                continue;
            }
            let key = Key { rip: block.rip, id: block.id, mode: block.mode };
            if self.directory.get(&key) == Some(&index) {
                self.directory.remove(&key);
            }
            gone(block);
        }
        let retired = code.ids.iter().map(|&id| self.exec_pages[id as usize]);
        retired
            .inspect(|page| {
                self.ids.remove(page);
            })
            .collect()
    }

    /// Whether all writes to these pages are seen.
    pub fn are_protected(&self, pages: &[(GuestPhys, u64)]) -> bool {
        pages.iter().all(|(page, _)| self.pages.get(&page.page()).is_some_and(|p| p.protected))
    }

    pub fn set_protected(&mut self, page: GuestPhys) {
        self.pages.entry(page.page()).or_default().protected = true;
    }

    /// A number that changes when the page is dropped.
    pub fn drops_of(&self, page: GuestPhys) -> u64 {
        self.dropped.get(&page.page()).copied().unwrap_or(0)
    }

    /// Whether a page was dropped after the epoch of the code map.
    pub fn dropped_since(&self, page: u64, epoch: u64) -> bool {
        self.dropped.get(&page).is_some_and(|&dropped| dropped > epoch)
    }

    /// Notes the epoch that began when the page was dropped.
    pub fn note_dropped(&mut self, page: u64, epoch: u64) {
        self.dropped.insert(page, epoch);
    }

    /// Drops one block from the directory: it can no longer be found.
    pub fn forget(&mut self, rip: u64, id: u32, mode: u32) {
        self.directory.remove(&Key { rip, id, mode });
    }

    pub fn used_bytes(&self) -> usize {
        self.next - self.first
    }
}

impl CodePlaces for Mutex<CodeCache> {
    fn rip_of(&self, host: u32) -> Option<u64> {
        let cache = self.lock();
        let base = cache.memory.run_address(0);
        let address = base + u64::from(host.wrapping_sub(base as u32));
        let (block, entry) = cache.instruction_at(address)?;
        Some(block.rip.wrapping_add(u64::from(entry.rip)))
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        signals::remove_code(self.signal_slot);
    }
}
