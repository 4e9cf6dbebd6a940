//! Filling and flushing the tables of a [`StateBlock`].
//!
//! Every fill is logged, global pages apart from the others, so a flush costs
//! what was filled since the last one and not the size of the table, and a
//! change of CR3 does not even look at the kernel's entries. A TLB entry is made
//! only for RAM, and for writing only where the page holds no translated code:
//! everything else (devices, code pages, page crossings) misses, takes the slow
//! path and is exact there.

use std::collections::HashSet;

use rustc_hash::FxHashMap;
use tetrarch_memory::GuestPhys;

use crate::state::block::{
    INVALID_BRANCH_0, INVALID_PAGE_0, StateBlock, TLB_ENTRIES, TlbEntry, branch_index, exec_index,
    tlb_index,
};

const PAGE_MASK: u64 = !0xFFF;
/// Beyond this many logged fills of one kind everything is flushed: the log
/// holds more duplicates than entries.
const LOG_LIMIT: usize = 2 * TLB_ENTRIES;
/// The sizes of large pages: 2 MiB, 4 MiB (32-bit paging) and 1 GiB.
const LARGE_SIZES: [u64; 3] = [2 << 20, 4 << 20, 1 << 30];
/// Chains by which the fills of one host page are found.
const CHAINS: usize = 1024;
const END: u32 = u32::MAX;

/// The fills of one TLB, chained by host page.
struct TlbLog {
    /// (linear page, previous fill of the chain)
    fills: Vec<(u64, u32)>,
    heads: Box<[u32]>,
}

impl Default for TlbLog {
    fn default() -> Self {
        Self { fills: Vec::new(), heads: vec![END; CHAINS].into() }
    }
}

impl TlbLog {
    fn chain(host: u64) -> usize {
        (host >> 12) as usize % CHAINS
    }

    fn push(&mut self, page: u64, host: u64) {
        let head = &mut self.heads[Self::chain(host)];
        self.fills.push((page, *head));
        *head = self.fills.len() as u32 - 1;
    }

    /// Invalidates every entry that was filled.
    fn drain(&mut self, table: &mut [TlbEntry]) {
        for (page, _) in self.fills.drain(..) {
            invalidate(table, page);
        }
        self.heads.fill(END);
    }

    /// Invalidates the entries that `goes` chooses by their page. The log keeps
    /// them: a fill whose entry has another page now counts for nothing.
    fn drop_pages(&self, table: &mut [TlbEntry], goes: impl Fn(u64) -> bool) {
        for &(page, _) in &self.fills {
            if goes(page) {
                invalidate(table, page);
            }
        }
    }

    /// Invalidates the entries of a host page.
    fn drop_host(&self, table: &mut [TlbEntry], host: u64) {
        let mut at = self.heads[Self::chain(host)];
        while let Some(&(page, previous)) = self.fills.get(at as usize) {
            let entry = &table[tlb_index(page)];
            if entry.page == page && entry.host == host {
                invalidate(table, page);
            }
            at = previous;
        }
    }
}

fn invalidate(table: &mut [TlbEntry], page: u64) {
    let index = tlb_index(page);
    if table[index].page == page {
        table[index].page = if index == 0 { INVALID_PAGE_0 } else { 0 };
    }
}

/// The fills of one scope: of global pages, or of the others.
#[derive(Default)]
struct Logs {
    /// Indexed by user * 2 + write.
    tlb: [TlbLog; 4],
    /// Executable pages, by user.
    exec: [Vec<u64>; 2],
    /// Branch targets, by user.
    branches: [Vec<u64>; 2],
}

impl Logs {
    fn len(&self) -> usize {
        let tlb = self.tlb.iter().map(|log| log.fills.len()).max().unwrap_or(0);
        tlb.max(self.exec[0].len()).max(self.exec[1].len())
    }

    fn drain_exec(&mut self, block: &mut StateBlock) {
        for user in [false, true] {
            let table = block.exec_mut(user);
            for page in self.exec[usize::from(user)].drain(..) {
                table[exec_index(page)] = 0;
            }
        }
    }

    fn drain_branches(&mut self, block: &mut StateBlock, user: bool) {
        for target in self.branches[usize::from(user)].drain(..) {
            invalidate_branch(block, target, user);
        }
    }

    fn drain(&mut self, block: &mut StateBlock) {
        for user in [false, true] {
            for write in [false, true] {
                let log = &mut self.tlb[usize::from(user) * 2 + usize::from(write)];
                log.drain(block.tlb_mut(user, write));
            }
        }
        self.drain_exec(block);
        self.drain_branches(block, false);
        self.drain_branches(block, true);
    }

    /// Drops the branch targets in the pages that `goes` chooses.
    fn drop_branches(&mut self, block: &mut StateBlock, user: bool, goes: impl Fn(u64) -> bool) {
        self.branches[usize::from(user)].retain(|&target| {
            let gone = goes(target & PAGE_MASK);
            if gone {
                invalidate_branch(block, target, user);
            }
            !gone
        });
    }

    fn drop_pages(&mut self, block: &mut StateBlock, goes: impl Fn(u64) -> bool + Copy) {
        for user in [false, true] {
            for write in [false, true] {
                let log = &self.tlb[usize::from(user) * 2 + usize::from(write)];
                log.drop_pages(block.tlb_mut(user, write), goes);
            }
            let table = block.exec_mut(user);
            for &page in self.exec[usize::from(user)].iter().filter(|&&page| goes(page)) {
                table[exec_index(page)] = 0;
            }
            self.drop_branches(block, user, goes);
        }
    }
}

fn invalidate_branch(block: &mut StateBlock, target: u64, user: bool) {
    let index = branch_index(target);
    let entry = &mut block.branches_mut(user)[index];
    if entry.target == target {
        entry.target = if index == 0 { INVALID_BRANCH_0 } else { 0 };
    }
}

/// Where the tables have a page of relative code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RelativePage {
    At(u64),
    Several,
}

/// A page of code as the interpreter reads it.
#[derive(Clone, Copy)]
pub struct FetchedPage {
    pub linear: u64,
    pub user: bool,
    pub host: *mut u8,
}

// SAFETY: the pointer is into guest memory, which outlives every vCPU.
unsafe impl Send for FetchedPage {}

/// A page outside RAM that an access was allowed to.
#[derive(Clone, Copy)]
struct DevicePage {
    linear: u64,
    write: bool,
    user: bool,
    physical: GuestPhys,
}

/// Pages of devices remembered: a driver has a few, and the local APIC's.
const DEVICE_PAGES: usize = 16;

pub struct Tlb {
    pub block: StateBlock,
    /// Of pages that are not global, and of global ones.
    logs: [Logs; 2],
    /// Large pages that may have entries, as (base, size): INVLPG must drop all
    /// of such a page.
    large: HashSet<(u64, u64)>,
    /// Where pages of relative code are, by their exec ids.
    relative: FxHashMap<u32, RelativePage>,
    /// The page that the interpreter last fetched from.
    pub fetched: Option<FetchedPage>,
    /// Device memory never has an entry that translated code could hit; this
    /// spares its accesses the page walk.
    devices: [Option<DevicePage>; DEVICE_PAGES],
    pub flushes: u64,
    /// Of guest memory, when what is RAM and where was last known to be as here.
    pub generation: u64,
}

impl Tlb {
    pub fn new() -> std::io::Result<Self> {
        let block = StateBlock::new()?;
        let logs = Default::default();
        Ok(Self {
            block,
            logs,
            large: HashSet::new(),
            relative: FxHashMap::default(),
            fetched: None,
            devices: [None; DEVICE_PAGES],
            flushes: 0,
            generation: 0,
        })
    }

    /// The host address of `linear`, if its page is in the TLB.
    #[inline]
    pub fn lookup(&self, linear: u64, user: bool, write: bool) -> Option<*mut u8> {
        let entry = &self.block.tlb(user, write)[tlb_index(linear)];
        (entry.page == linear & PAGE_MASK).then(|| (entry.host + (linear & 0xFFF)) as *mut u8)
    }

    /// The linear address of a byte of RAM, by the low half of its host address: the
    /// user's, if it is the user's too.
    pub fn linear_of(&self, host: u32) -> Option<u64> {
        let page = host & PAGE_MASK as u32;
        [(true, true), (true, false), (false, true), (false, false)].iter().find_map(
            |&(user, write)| {
                let table = self.block.tlb(user, write);
                let found = table.iter().enumerate().find(|(index, entry)| {
                    entry.host as u32 == page
                        && entry.page & !PAGE_MASK == 0
                        && tlb_index(entry.page) == *index
                });
                found.map(|(_, entry)| entry.page | u64::from(host & 0xFFF))
            },
        )
    }

    /// The physical address of `linear`, if its page is a device's.
    #[inline]
    pub fn device(&self, linear: u64, write: bool, user: bool) -> Option<GuestPhys> {
        let known = self.devices[Self::device_slot(linear, write)]?;
        let same = known.linear == linear & PAGE_MASK && known.write == write && known.user == user;
        same.then(|| known.physical.offset(linear & 0xFFF))
    }

    pub fn fill_device(&mut self, linear: u64, physical: GuestPhys, write: bool, user: bool) {
        let page = DevicePage { linear: linear & PAGE_MASK, write, user, physical };
        self.devices[Self::device_slot(linear, write)] = Some(page);
    }

    fn device_slot(linear: u64, write: bool) -> usize {
        ((linear >> 12) as usize * 2 + usize::from(write)) % DEVICE_PAGES
    }

    /// Notes that `linear` lies in a large page of `size` bytes.
    pub fn note_large(&mut self, linear: u64, size: u64) {
        if self.large.len() >= LOG_LIMIT {
            self.flush(true);
        }
        self.large.insert((linear & !(size - 1), size));
    }

    /// Enters a page of RAM. `host` is where it begins.
    pub fn fill(&mut self, linear: u64, host: *mut u8, user: bool, write: bool, global: bool) {
        if self.logs[usize::from(global)].len() >= LOG_LIMIT {
            self.flush(true);
        }
        let page = linear & PAGE_MASK;
        self.block.tlb_mut(user, write)[tlb_index(linear)] = TlbEntry { page, host: host as u64 };
        let log =
            &mut self.logs[usize::from(global)].tlb[usize::from(user) * 2 + usize::from(write)];
        log.push(page, host as u64);
    }

    pub fn fill_branch(&mut self, target: u64, host: u64, user: bool, global: bool) {
        if self.logs[usize::from(global)].branches[usize::from(user)].len() >= LOG_LIMIT {
            self.flush_branches(user);
        }
        let entry = &mut self.block.branches_mut(user)[branch_index(target)];
        entry.target = target;
        entry.host = host;
        self.logs[usize::from(global)].branches[usize::from(user)].push(target);
    }

    pub fn exec_id(&self, linear: u64, user: bool) -> u32 {
        self.block.exec(user)[exec_index(linear)]
    }

    /// The linear page of the entry for the page of `linear`, where that is relative code.
    pub fn relative_page(&self, linear: u64) -> u64 {
        self.block.exec_pages()[exec_index(linear)]
    }

    /// Enters the exec id of a page of relative code.
    pub fn fill_relative(&mut self, linear: u64, id: u32) {
        let page = linear & PAGE_MASK;
        self.block.exec_pages_mut()[exec_index(page)] = page;
        let place = self.relative.entry(id).or_insert(RelativePage::At(page));
        if *place != RelativePage::At(page) {
            *place = RelativePage::Several;
        }
        self.fill_exec(linear, id, true, false);
    }

    pub fn fill_exec(&mut self, linear: u64, id: u32, user: bool, global: bool) {
        self.block.exec_mut(user)[exec_index(linear)] = id;
        self.logs[usize::from(global)].exec[usize::from(user)].push(linear & PAGE_MASK);
    }

    /// What copies entries of the tables goes whenever any entry may.
    fn forget_copies(&mut self) {
        self.block.forget_stack();
        self.fetched = None;
        self.devices = [None; DEVICE_PAGES];
    }

    /// Drops everything, with or without global pages.
    pub fn flush(&mut self, global_too: bool) {
        self.flushes += 1;
        self.forget_copies();
        let [local, global] = &mut self.logs;
        local.drain(&mut self.block);
        self.relative.clear();
        if global_too {
            global.drain(&mut self.block);
            self.large.clear();
        }
    }

    /// Drops the page of `linear`, or the whole large page it lies in.
    pub fn flush_page(&mut self, linear: u64) {
        self.forget_copies();
        for size in LARGE_SIZES {
            let base = linear & !(size - 1);
            if self.large.remove(&(base, size)) {
                for logs in &mut self.logs {
                    logs.drop_pages(&mut self.block, |page| page.wrapping_sub(base) < size);
                }
            }
        }
        let page = linear & PAGE_MASK;
        for user in [false, true] {
            for write in [false, true] {
                invalidate(self.block.tlb_mut(user, write), page);
            }
            // Branch targets are not found by their page: look for them only
            // where code of the page has run at all.
            let exec = &mut self.block.exec_mut(user)[exec_index(page)];
            if std::mem::take(exec) != 0 {
                for logs in &mut self.logs {
                    logs.drop_branches(&mut self.block, user, |target| target == page);
                }
            }
        }
    }

    /// Drops every write entry of the host page: it now holds translated code.
    pub fn protect_host_page(&mut self, host: usize) {
        self.block.forget_stack();
        for user in [false, true] {
            let table = self.block.tlb_mut(user, true);
            for logs in &self.logs {
                logs.tlb[usize::from(user) * 2 + 1].drop_host(table, host as u64);
            }
        }
    }

    /// Drops every write entry: each page's next write is to be seen.
    pub fn drop_writes(&mut self) {
        self.block.forget_stack();
        for user in [false, true] {
            let table = self.block.tlb_mut(user, true);
            for logs in &mut self.logs {
                logs.tlb[usize::from(user) * 2 + 1].drain(table);
            }
        }
    }

    /// Drops every indirect branch target of kernel or of user mode.
    pub fn flush_branches(&mut self, user: bool) {
        for logs in &mut self.logs {
            logs.drain_branches(&mut self.block, user);
        }
    }

    /// Drops what the tables hold of one translation, which is no more.
    pub fn drop_block(&mut self, target: u64, user: bool) {
        invalidate_branch(&mut self.block, target, user);
    }

    /// The same of a block of relative code, which is `offset` behind the start of its page.
    pub fn drop_relative_block(&mut self, id: u32, offset: u64) {
        match self.relative.get(&id) {
            Some(RelativePage::At(page)) => {
                invalidate_branch(&mut self.block, page | offset, true);
            }
            Some(RelativePage::Several) => self.flush_branches(true),
            None => {}
        }
    }

    /// Drops the mappings of a page of relative code that is no more.
    pub fn drop_relative(&mut self, id: u32) {
        match self.relative.remove(&id) {
            Some(RelativePage::At(page)) => self.drop_exec(page, true),
            Some(RelativePage::Several) => self.flush_exec(),
            None => {}
        }
    }

    /// Drops the mapping of an executable page that is no more.
    pub fn drop_exec(&mut self, linear: u64, user: bool) {
        self.block.exec_mut(user)[exec_index(linear)] = 0;
    }

    /// Drops every executable page and branch target.
    pub fn flush_exec(&mut self) {
        for logs in &mut self.logs {
            logs.drain_branches(&mut self.block, false);
            logs.drain_branches(&mut self.block, true);
            logs.drain_exec(&mut self.block);
        }
        self.relative.clear();
    }
}
