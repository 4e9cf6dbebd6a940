//! The code cache: translations, how they are found and how they die.
//!
//! A translation belongs to a guest linear address, the physical page that was
//! mapped there, and the mode word. The pair (linear page, physical page) at a
//! privilege has a number, its *exec id*; the vCPU's exec table holds the id of
//! what is mapped at each page now. A jump into another page is linked directly
//! and guarded by one compare of the exec table with the id it was linked for,
//! so links survive address-space switches and die with a change of mapping.
//! Dropping a page retires its ids: every link into it then misses by itself.
//! Relative code (see [`mode::RELATIVE`](crate::state::mode::RELATIVE)) has one id wherever its
//! page is mapped, and is entered from elsewhere by indirect branches alone.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tetrarch_memory::GuestPhys;

use super::block::{Built, Site, What};
use super::builder::MAX_INSTRUCTIONS;
use super::directory::Entry;
use super::sources::Origin;
use super::stubs::{self, Calls, Stubs};
use super::translations::{
    Block, ExecPage, Key, MAX_ORIGINS, MAX_RECORDS, MAX_SITES, Translations,
};
use crate::cpu::x87_pointers::CodePlaces;
use crate::host::code_memory::CodeMemory;
use crate::host::signals;

/// Room for translations. A full cache starts over.
#[derive(Clone, Copy)]
pub struct Room {
    pub bytes: usize,
    /// Guest instructions that are translated.
    pub instructions: usize,
}

impl Room {
    pub const USUAL: Self = Self { bytes: 192 << 20, instructions: usize::MAX };

    /// Of a machine that records or replays. Code that is replayed is longer than what was
    /// recorded, and the cache is to start over where it did then: it is full by a number of
    /// instructions alone, with which the bytes cannot have run out.
    pub const JOURNALLED: Self = Self {
        bytes: (1 << 20) * (MAX_BLOCK_BYTES / MAX_INSTRUCTIONS) + (1 << 20),
        instructions: 1 << 20,
    };
}

/// No translation is longer: 64 instructions with every part at its largest.
pub const MAX_BLOCK_BYTES: usize = 64 << 10;

/// No block has more: 64 instructions, with three ways out at most.
const MAX_BLOCK_SITES: usize = 256;

#[derive(Default)]
struct CodePage {
    blocks: Vec<u32>,
    ids: Vec<u32>,
    /// No vCPU writes to the page but where it is seen.
    protected: bool,
}

pub struct CodeCache {
    memory: CodeMemory,
    signal_slot: usize,
    pub stubs: Stubs,
    first: usize,
    next: usize,
    most_instructions: usize,
    instructions: usize,
    /// What is found without the lock.
    pub translations: Arc<Translations>,
    pages: FxHashMap<u64, CodePage>,
    origins: FxHashMap<Origin, u32>,
    /// The epoch of the code map in which a page was last dropped.
    dropped: FxHashMap<u64, u64>,
}

impl CodeCache {
    /// Whether the host gives executable memory.
    pub fn probe() -> std::io::Result<()> {
        CodeMemory::new("tetrarch-code", 4096).map(drop)
    }

    pub fn new(room: Room, calls: &Calls) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new("tetrarch-code", room.bytes)?;
        let avx = crate::cpu::fpu::host_avx();
        let (bytes, stubs) =
            stubs::assemble(memory.run_address(0), avx, calls).map_err(std::io::Error::other)?;
        memory.write(0, &bytes);
        let first = bytes.len().next_multiple_of(64);
        // A fault in the stubs themselves is ours and must not look like a guest's.
        let (start, end) = (memory.run_address(first), memory.run_address(memory.len()));
        let signal_slot = signals::add_code(start, end, stubs.leave_signal)
            .ok_or_else(|| std::io::Error::other("too many VMs in one process"))?;
        let run = memory.run_address(0)..end;
        Ok(Self {
            memory,
            signal_slot,
            stubs,
            first,
            next: first,
            most_instructions: room.instructions,
            instructions: 0,
            translations: Arc::new(Translations::new(0, run)),
            pages: FxHashMap::default(),
            origins: FxHashMap::default(),
            dropped: FxHashMap::default(),
        })
    }

    /// True if a block may not fit any more.
    pub fn is_full(&self) -> bool {
        self.memory.len() - self.next < MAX_BLOCK_BYTES
            || self.instructions.saturating_add(MAX_INSTRUCTIONS) > self.most_instructions
            || self.translations.blocks.len() >= MAX_RECORDS
            || MAX_SITES - self.translations.sites.len() < MAX_BLOCK_SITES
            || self.translations.pages.len() >= MAX_RECORDS
            || MAX_ORIGINS - self.translations.origins.len() < MAX_BLOCK_SITES
    }

    /// Whether more translations can join these.
    pub fn takes(&self, translations: &Arc<Translations>) -> bool {
        Arc::ptr_eq(&self.translations, translations) && !translations.is_closed()
    }

    /// Begins to forget everything: from now on nothing is found and nothing comes
    /// in. Once no vCPU can run what is there, [`clear`](Self::clear) makes room.
    pub fn close(&self) {
        self.translations.close();
    }

    /// Returns the physical pages that held code. Nobody runs any, and no vCPU's
    /// tables lead there.
    pub fn clear(&mut self) -> Vec<u64> {
        self.memory.give_back(self.first, self.next);
        self.next = self.first;
        self.instructions = 0;
        self.origins.clear();
        let generation = self.translations.generation + 1;
        let run = self.memory.run_address(0)..self.memory.run_address(self.memory.len());
        self.translations = Arc::new(Translations::new(generation, run));
        self.pages.drain().map(|(page, _)| page).collect()
    }

    /// The id of a page as mapped now; `None` if there is no room.
    pub fn exec_id(&mut self, page: ExecPage, global: bool) -> Option<u32> {
        if let Some(id) = self.translations.exec_id(&page, global) {
            return Some(id);
        }
        let number = self.translations.pages.insert(page, AtomicBool::new(global))?;
        self.pages.entry(page.physical >> 12).or_default().ids.push(number);
        Some(number + 1)
    }

    fn origin_number(&mut self, origin: Origin) -> Option<u32> {
        if let Some(&number) = self.origins.get(&origin) {
            return Some(number);
        }
        let number = self.translations.origins.push(origin.clone())? + 1;
        self.origins.insert(origin, number);
        Some(number)
    }

    /// Stores a translation. `second` is the physical page of the tail of an
    /// instruction that crosses pages. `None` if there is no room.
    pub fn insert(&mut self, key: Key, built: &mut Built, second: Option<u64>) -> Option<u32> {
        let id = key.id;
        let translations = Arc::clone(&self.translations);
        let physical = translations.exec_page(id)?.physical;
        let start = self.next;
        let base = self.memory.run_address(start);
        for &(place, target) in &built.outward {
            let relative = target.wrapping_sub(base + u64::from(place) + 4) as u32;
            let place = place as usize;
            built.code[place..place + 4].copy_from_slice(&relative.to_le_bytes());
        }
        let first_site = translations.sites.len() as u32;
        for place in &built.site_numbers {
            let place = *place as usize;
            let mut number = [0; 4];
            number.copy_from_slice(&built.code[place..place + 4]);
            let number = u32::from_le_bytes(number) + first_site;
            built.code[place..place + 4].copy_from_slice(&number.to_le_bytes());
        }
        let origins = built.origins.drain(..).map(|origin| self.origin_number(origin));
        let origins = origins.collect::<Option<Vec<u32>>>()?;
        let Translations { interpreted, ports, .. } = &*translations;
        let (first_interpreted, first_port) = (interpreted.len() as u32, ports.len() as u32);
        for instruction in built.interpreted.drain(..) {
            interpreted.push(instruction)?;
        }
        for access in built.ports.drain(..) {
            ports.push(access)?;
        }
        for site in &built.sites {
            let mut site = *site;
            site.block = start as u32;
            match &mut site.what {
                What::Link(link) => {
                    if let Some(index) = link.origin.checked_sub(1) {
                        link.origin = origins[index as usize];
                    }
                    link.jump += start as u32;
                    link.guard = link.guard.and_then(|guard| guard.checked_add(start as u32));
                }
                What::Instruction(number) => *number += first_interpreted,
                What::Port(number) => *number += first_port,
                What::Nothing | What::Branch | What::Straddles(_) => {}
            }
            translations.sites.push(site)?;
        }
        self.memory.write(start, &built.code);
        self.next = (start + built.code.len()).next_multiple_of(16);
        self.instructions += built.instructions as usize;

        let block = Block {
            start: start as u32,
            saved_entry: built.saved_entry,
            entry: built.entry,
            flags_in: built.flags_in,
            map: built.map.as_slice().into(),
        };
        let index = translations.blocks.insert(key, block)?;
        self.pages.entry(physical >> 12).or_default().blocks.push(index);
        if let Some(second) = second {
            self.pages.entry(second >> 12).or_default().blocks.push(index);
        }
        Some(index)
    }

    /// Lets a direct branch go to `target` by itself from now on.
    pub fn link(&mut self, site: &Site, target: u32) {
        let What::Link(link) = site.what else { return };
        let Some(Entry { key, value: block, .. }) = self.translations.blocks.get(target) else {
            return;
        };
        if u32::from(link.dead) & block.flags_in != 0 {
            return;
        }
        if site.relative || key.relative() {
            // The target knows where it is mapped from what came before it in its page.
            let from = self.translations.block_at(site.block);
            if from.is_none_or(|(from, _)| from.id != key.id) {
                return;
            }
        }
        let entry = if site.saved { block.saved_entry } else { block.entry };
        let to = block.start + entry;
        let id = key.id;
        // The guard comes last: until it matches, the jump is not reached.
        self.memory.patch(link.jump as usize, to.wrapping_sub(link.jump + 4));
        if let Some(guard) = link.guard {
            self.memory.patch(guard.get() as usize, id);
        }
    }

    /// Drops the translations of a physical page. `gone` sees the key of each; the
    /// result is the mappings that were retired, with their exec ids. What a vCPU's tables
    /// hold of either must go.
    pub fn drop_page(&mut self, page: u64, mut gone: impl FnMut(&Key)) -> Vec<(u32, ExecPage)> {
        let Some(code) = self.pages.remove(&page) else { return Vec::new() };
        let Translations { blocks, pages, .. } = &*self.translations;
        for index in code.blocks {
            if let Some(block) = blocks.get(index) {
                blocks.remove(index);
                gone(&block.key);
            }
        }
        for &number in &code.ids {
            pages.remove(number);
        }
        code.ids.iter().filter_map(|&number| Some((number + 1, pages.get(number)?.key))).collect()
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
    pub fn forget(&mut self, key: &Key) {
        if let Some(index) = self.translations.find(key) {
            self.translations.blocks.remove(index);
        }
    }

    pub fn used_bytes(&self) -> usize {
        self.next - self.first
    }
}

impl CodePlaces for Mutex<CodeCache> {
    fn rip_of(&self, host: u32, page: u64) -> Option<u64> {
        self.lock().translations.rip_of(host, page)
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        signals::remove_code(self.signal_slot);
    }
}
