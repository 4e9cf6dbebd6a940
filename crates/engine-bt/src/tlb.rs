//! Filling and flushing the tables of a [`StateBlock`].
//!
//! Every fill is logged, so a flush costs what was filled and not the size of
//! the table. A TLB entry is made only for RAM, and for writing only where the
//! page holds no translated code: everything else (devices, code pages, page
//! crossings) misses, takes the slow path and is exact there.

use std::sync::Arc;

use crate::block::{
    INVALID_BRANCH_0, INVALID_PAGE_0, StateBlock, branch_index, exec_index, tlb_index,
};

const PAGE_MASK: u64 = !0xFFF;

#[derive(Default)]
pub struct TlbLogs {
    /// Linear pages filled, bit 0: global. Indexed by user * 2 + write.
    tlb: [Vec<u64>; 4],
    /// Branch targets filled, by user.
    branches: [Vec<(u64, bool)>; 2],
    /// Executable pages filled, bit 0: global, by user.
    exec: [Vec<u64>; 2],
    /// Pages of 2 MiB or 1 GiB that have entries: INVLPG must drop all of them.
    large: Vec<(u64, u64)>,
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

pub struct Tlb {
    pub block: Arc<StateBlock>,
    logs: TlbLogs,
    /// The page that the interpreter last fetched from.
    pub fetched: Option<FetchedPage>,
    pub flushes: u64,
    pub fills: u64,
}

impl Tlb {
    pub fn new() -> std::io::Result<Self> {
        let block = Arc::new(StateBlock::new()?);
        Ok(Self { block, logs: TlbLogs::default(), fetched: None, flushes: 0, fills: 0 })
    }

    /// The host address of `linear`, if its page is in the TLB.
    #[inline]
    pub fn lookup(&self, linear: u64, user: bool, write: bool) -> Option<*mut u8> {
        let entry = &self.block.tlb(user, write)[tlb_index(linear)];
        (entry.page == linear & PAGE_MASK).then(|| (entry.host + (linear & 0xFFF)) as *mut u8)
    }

    /// Notes that `linear` lies in a large page of `size` bytes.
    pub fn note_large(&mut self, linear: u64, size: u64) {
        let range = (linear & !(size - 1), size);
        if self.logs.large.last() != Some(&range) && !self.logs.large.contains(&range) {
            self.logs.large.push(range);
        }
    }

    pub fn fill(&mut self, linear: u64, host: *mut u8, user: bool, write: bool, global: bool) {
        let entry = &mut self.block.tlb(user, write)[tlb_index(linear)];
        entry.page = linear & PAGE_MASK;
        entry.host = host as u64;
        self.fills += 1;
        let page = linear & PAGE_MASK | u64::from(global);
        self.logs.tlb[usize::from(user) * 2 + usize::from(write)].push(page);
    }

    pub fn fill_branch(&mut self, target: u64, host: u64, user: bool, global: bool) {
        let entry = &mut self.block.branches(user)[branch_index(target)];
        entry.target = target;
        entry.host = host;
        self.logs.branches[usize::from(user)].push((target, global));
    }

    pub fn exec_id(&self, linear: u64, user: bool) -> u32 {
        self.block.exec(user)[exec_index(linear)]
    }

    pub fn fill_exec(&mut self, linear: u64, id: u32, user: bool, global: bool) {
        self.block.exec(user)[exec_index(linear)] = id;
        self.logs.exec[usize::from(user)].push(linear & PAGE_MASK | u64::from(global));
    }

    /// Drops what `drop` chooses among the logged (page, global) pairs.
    fn retain(&mut self, mut drop: impl FnMut(u64, bool) -> bool) {
        self.block.forget_stack();
        self.fetched = None;
        for user in [false, true] {
            for write in [false, true] {
                let table = self.block.tlb(user, write);
                self.logs.tlb[usize::from(user) * 2 + usize::from(write)].retain(|&logged| {
                    let (page, global) = (logged & PAGE_MASK, logged & 1 != 0);
                    let index = tlb_index(page);
                    if table[index].page != page {
                        return false; // replaced since
                    }
                    let goes = drop(page, global);
                    if goes {
                        table[index].page = if index == 0 { INVALID_PAGE_0 } else { 0 };
                    }
                    !goes
                });
            }
            let table = self.block.exec(user);
            self.logs.exec[usize::from(user)].retain(|&logged| {
                let (page, global) = (logged & PAGE_MASK, logged & 1 != 0);
                let goes = drop(page, global);
                if goes {
                    table[exec_index(page)] = 0;
                }
                !goes
            });
            let table = self.block.branches(user);
            self.logs.branches[usize::from(user)].retain(|&(target, global)| {
                let entry = &mut table[branch_index(target)];
                if entry.target != target {
                    return false;
                }
                let goes = drop(target & PAGE_MASK, global);
                if goes {
                    entry.target = if branch_index(target) == 0 { INVALID_BRANCH_0 } else { 0 };
                }
                !goes
            });
        }
    }

    /// Drops everything, with or without global pages.
    pub fn flush(&mut self, global_too: bool) {
        self.flushes += 1;
        self.retain(|_, global| global_too || !global);
        if global_too {
            self.logs.large.clear();
        }
    }

    /// Drops the page of `linear`, or the whole large page it lies in.
    pub fn flush_page(&mut self, linear: u64) {
        let large = self.logs.large.iter().find(|(base, size)| linear.wrapping_sub(*base) < *size);
        if let Some(&(base, size)) = large {
            self.retain(|page, _| page.wrapping_sub(base) < size);
            return;
        }
        self.block.forget_stack();
        self.fetched = None;
        let page = linear & PAGE_MASK;
        let index = tlb_index(page);
        for user in [false, true] {
            for write in [false, true] {
                let entry = &mut self.block.tlb(user, write)[index];
                if entry.page == page {
                    entry.page = if index == 0 { INVALID_PAGE_0 } else { 0 };
                }
            }
            // The branch table is indexed by the whole target: drop those of the
            // page only where code of the page has run at all.
            let exec = &mut self.block.exec(user)[exec_index(page)];
            if *exec != 0 {
                *exec = 0;
                let table = self.block.branches(user);
                self.logs.branches[usize::from(user)].retain(|&(target, _)| {
                    let entry = &mut table[branch_index(target)];
                    let goes = target & PAGE_MASK == page;
                    if goes && entry.target == target {
                        entry.target = if branch_index(target) == 0 { INVALID_BRANCH_0 } else { 0 };
                    }
                    !goes
                });
            }
        }
    }

    /// Drops every write entry of the host page: it now holds translated code.
    pub fn protect_host_page(&mut self, host: *mut u8) {
        self.block.forget_stack();
        for user in [false, true] {
            let table = self.block.tlb(user, true);
            self.logs.tlb[usize::from(user) * 2 + 1].retain(|&logged| {
                let page = logged & PAGE_MASK;
                let entry = &mut table[tlb_index(page)];
                if entry.page != page {
                    return false;
                }
                let goes = entry.host == host as u64;
                if goes {
                    entry.page = if tlb_index(page) == 0 { INVALID_PAGE_0 } else { 0 };
                }
                !goes
            });
        }
    }

    /// Drops every indirect branch target: translations have been freed.
    pub fn flush_branches(&mut self) {
        for user in [false, true] {
            let table = self.block.branches(user);
            for (target, _) in self.logs.branches[usize::from(user)].drain(..) {
                let index = branch_index(target);
                table[index].target = if index == 0 { INVALID_BRANCH_0 } else { 0 };
            }
        }
    }

    /// Drops every executable page and branch target.
    pub fn flush_exec(&mut self) {
        self.flush_branches();
        for user in [false, true] {
            let table = self.block.exec(user);
            for page in self.logs.exec[usize::from(user)].drain(..) {
                table[exec_index(page)] = 0;
            }
        }
    }
}
