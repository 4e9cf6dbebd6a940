//! What vCPUs read of the code cache, without its lock: blocks, the pages they were
//! made from, and the places where they leave.
//!
//! All of it only grows, under the lock. When the cache is cleared, what is here is
//! closed: nobody takes anything from it any more, and the next translations are
//! others'. It goes when no vCPU has it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::Instruction;

use super::block::{MapEntry, PortAccess, Site};
use super::directory::{Directory, Entry};
use super::growing::Growing;
use super::sources::Origin;
use crate::state::mode;

/// The most blocks, and the most mappings of pages with code, that are kept: a
/// guest of one-instruction blocks shall not fill the host's memory.
pub const MAX_RECORDS: usize = 1 << 20;
/// The most sites that are kept; the code memory is mostly full before.
pub const MAX_SITES: usize = 8 << 20;
/// Chains of blocks and of pages, as powers of two: enough for a kernel and what
/// runs on it to have short ones.
const BLOCK_CHAINS: u32 = 17;
const PAGE_CHAINS: u32 = 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// In relative code the offset in its page.
    pub rip: u64,
    /// The exec id of its page.
    pub id: u32,
    pub mode: u32,
    /// The number of its [`Origin`].
    pub origin: u32,
}

impl Key {
    pub fn relative(&self) -> bool {
        self.mode & mode::RELATIVE != 0
    }

    /// The linear address of a place so many bytes behind the start of the block, which is
    /// mapped at `page` if it is relative.
    pub fn place(&self, run: u16, page: u64) -> u64 {
        let rip = self.rip.wrapping_add(u64::from(run));
        if self.relative() { rip.wrapping_add(page) } else { rip }
    }
}

pub struct Block {
    /// Offset in the cache. It is the entry of indirect branches and of Rust: the flags are put
    /// aside, and r13 is the guest's address.
    pub start: u32,
    /// Entries for branches in the page: with the flags put aside, and with them in the CPU.
    /// They count from `start`.
    pub saved_entry: u32,
    pub entry: u32,
    /// Arithmetic flags that the block needs on entry.
    pub flags_in: u32,
    pub map: Box<[MapEntry]>,
}

/// A page of guest code as mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExecPage {
    /// [`ANYWHERE`](Self::ANYWHERE) for relative code.
    pub linear: u64,
    pub physical: u64,
    pub user: bool,
}

impl ExecPage {
    pub const ANYWHERE: u64 = 1;
}

/// How many origins of flags are kept.
pub const MAX_ORIGINS: usize = 1 << 18;

pub struct Translations {
    /// Which one in the life of the cache.
    pub generation: u64,
    closed: AtomicBool,
    /// Where the code memory runs.
    run: Range<u64>,
    pub(super) blocks: Directory<Key, Block>,
    /// With each, whether the guest mapped it as global when it was last walked. The
    /// exec id of a page is its number here, and 1.
    pub(super) pages: Directory<ExecPage, AtomicBool>,
    pub sites: Growing<Site>,
    /// What sites leave for by its number.
    pub interpreted: Growing<Instruction>,
    pub ports: Growing<PortAccess>,
    /// All but [`Origin::Saved`], which is number 0.
    pub(super) origins: Growing<Origin>,
}

impl Translations {
    pub(super) fn new(generation: u64, run: Range<u64>) -> Self {
        Self {
            generation,
            closed: AtomicBool::new(false),
            run,
            blocks: Directory::new(MAX_RECORDS, BLOCK_CHAINS),
            pages: Directory::new(MAX_RECORDS, PAGE_CHAINS),
            sites: Growing::new(MAX_SITES),
            interpreted: Growing::new(MAX_SITES),
            ports: Growing::new(MAX_SITES),
            origins: Growing::new(MAX_ORIGINS),
        }
    }

    #[inline]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub fn exec_page(&self, id: u32) -> Option<ExecPage> {
        Some(self.pages.get(id.checked_sub(1)?)?.key)
    }

    /// The exec id of a page that has one, as mapped now.
    pub fn exec_id(&self, page: &ExecPage, global: bool) -> Option<u32> {
        let number = self.pages.find(page)?;
        let cell = &self.pages.get(number)?.value;
        if cell.load(Ordering::Relaxed) != global {
            cell.store(global, Ordering::Relaxed);
        }
        Some(number + 1)
    }

    #[inline]
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.blocks.find(key)
    }

    pub fn origin(&self, number: u32) -> Option<&Origin> {
        match number.checked_sub(1) {
            None => Some(&Origin::Saved),
            Some(index) => self.origins.get(index),
        }
    }

    /// Where a block is entered with the flags in `saved_flags`, and whether its page
    /// is a global one, which a change of CR3 keeps.
    pub fn indirect_entry(&self, block: u32) -> Option<(u64, bool)> {
        let Entry { key, value, .. } = self.blocks.get(block)?;
        let page = self.pages.get(key.id.checked_sub(1)?)?;
        let entry = self.run.start + u64::from(value.start);
        Some((entry, page.value.load(Ordering::Relaxed)))
    }

    /// The block and the instruction that a host address belongs to.
    pub fn instruction_at(&self, address: u64) -> Option<(&Key, &Block, MapEntry)> {
        if !self.run.contains(&address) {
            return None;
        }
        let offset = (address - self.run.start) as u32;
        let (key, block) = self.block_at(offset)?;
        let inside = offset - block.start;
        let entry = block.map.partition_point(|entry| entry.offset <= inside).checked_sub(1)?;
        Some((key, block, block.map[entry]))
    }

    /// The block that an offset in the cache belongs to.
    pub fn block_at(&self, offset: u32) -> Option<(&Key, &Block)> {
        // Blocks lie in the order in which they were made.
        let (mut first, mut end) = (0, self.blocks.len() as u32);
        while first < end {
            let middle = first + (end - first) / 2;
            if self.blocks.get(middle)?.value.start <= offset {
                first = middle + 1;
            } else {
                end = middle;
            }
        }
        let Entry { key, value, .. } = self.blocks.get(first.checked_sub(1)?)?;
        Some((key, value))
    }

    /// The instruction by the low half of its address. `page` is where it is mapped if it is
    /// relative.
    pub fn rip_of(&self, host: u32, page: u64) -> Option<u64> {
        let base = self.run.start;
        let address = base + u64::from(host.wrapping_sub(base as u32));
        let (key, _, entry) = self.instruction_at(address)?;
        Some(key.place(entry.rip, page))
    }
}
