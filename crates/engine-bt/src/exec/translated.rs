//! Translated code as the run loop uses it: find it, make it, run it, and serve
//! what it leaves for.

use std::cell::Cell;
use std::sync::Arc;

use iced_x86::Mnemonic;
use parking_lot::Mutex;
use tetrarch_engine::{EngineError, Exit};
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use super::{BtVcpu, rdtsc};
use crate::cpu::fault::Fault;
use crate::cpu::state::{flag, reg};
use crate::cpu::state_block::{branch_index, exec_index};
use crate::cpu::{Cpu, mode};
use crate::interp;
use crate::memory::code_map;
use crate::memory::mmu::{Place, canonical};
use crate::translate::builder::{Builder, Source};
use crate::translate::cache::{Cache, ExecPage};
use crate::translate::stubs::exit_kind;

/// The translator's half of a vCPU.
pub struct Translator {
    pub cache: Arc<Mutex<Cache>>,
    pub builder: Builder,
    pub enter: u64,
}

/// Called by translated code on a TLB miss. Returns whether to try again.
pub extern "sysv64" fn fill(cpu: u64, linear: u64, write: u64) -> u64 {
    // SAFETY: `CpuState::cpu` is set to the vCPU's own `Cpu` before translated
    // code is entered, and nothing else borrows it while that code runs.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    let user = cpu.user();
    cpu.st.note_upper_halves();
    if cpu.tlb.lookup(linear, user, write != 0).is_some() {
        // The page is there: the access crosses its end.
        return 0;
    }
    u64::from(matches!(cpu.fill_tlb(linear, write != 0, user), Ok(Place::Ram(_))))
}

impl BtVcpu {
    /// Where to enter translated code for RIP. `None`: to be interpreted.
    pub(super) fn host_entry(&mut self) -> Result<Option<u64>, Fault> {
        let rip = self.cpu.st.rip;
        let user = self.cpu.user();
        let known = self.cpu.tlb.block.branches(user)[branch_index(rip)];
        if known.target == rip {
            return Ok(Some(known.host));
        }
        let Some(index) = self.resolve(rip)? else { return Ok(None) };
        let Some(translator) = &self.translator else { return Ok(None) };
        let cache = translator.cache.lock();
        let (host, global) = (cache.indirect_entry(index), cache.is_global(index));
        drop(cache);
        self.cpu.tlb.fill_branch(rip, host, user, global);
        Ok(Some(host))
    }

    /// The block at `rip`, translated if need be. `None`: to be interpreted.
    fn resolve(&mut self, rip: u64) -> Result<Option<u32>, Fault> {
        self.cpu.counts.lookups += 1;
        let Some(id) = self.exec_id(rip)? else { return Ok(None) };
        let word = self.cpu.st.mode;
        let Some(translator) = &self.translator else { return Ok(None) };
        if let Some(index) = translator.cache.lock().find(rip, id, word) {
            return Ok(Some(index));
        }
        self.translate(rip, id)
    }

    /// The exec id of the page of `rip`, entered in the exec table. `None` for
    /// code outside RAM.
    fn exec_id(&mut self, rip: u64) -> Result<Option<u32>, Fault> {
        let user = self.cpu.user();
        let linear = rip & !0xFFF;
        let Some(translator) = &self.translator else { return Ok(None) };
        let id = self.cpu.tlb.exec_id(rip, user);
        if id != 0 {
            let known = translator.cache.lock().exec_page(id);
            if known.is_some_and(|page| page.linear == linear && page.user == user) {
                return Ok(Some(id));
            }
        }
        if !canonical(rip) {
            return Err(Fault::with_error(crate::cpu::fault::vector::GP, 0));
        }
        let (address, walk) = self.cpu.fetch_page(rip, user)?;
        let physical = address.0 & !0xFFF;
        if self.cpu.vm.memory.host(GuestPhys(physical), PAGE_SIZE).is_none() {
            return Ok(None);
        }
        if walk.size > PAGE_SIZE {
            self.cpu.tlb.note_large(rip, walk.size);
        }
        let Some(translator) = &self.translator else { return Ok(None) };
        let page = ExecPage { linear, physical, user };
        let id = translator.cache.lock().exec_id(page, walk.global);
        self.cpu.tlb.fill_exec(rip, id, user, walk.global);
        Ok(Some(id))
    }

    fn translate(&mut self, rip: u64, id: u32) -> Result<Option<u32>, Fault> {
        let start = rdtsc();
        let mut id = id;
        if self.translator.as_ref().is_some_and(|t| t.cache.lock().is_full()) {
            self.clear_cache();
            match self.exec_id(rip)? {
                Some(fresh) => id = fresh,
                None => return Ok(None),
            }
        }
        let Some(translator) = &mut self.translator else { return Ok(None) };
        let Some(page) = translator.cache.lock().exec_page(id) else { return Ok(None) };
        let mut bytes = [0u8; PAGE_SIZE as usize];
        let physical = GuestPhys(page.physical);
        if self.cpu.vm.memory.read(physical, &mut bytes).is_err() {
            return Ok(None);
        }
        let offset = (rip & 0xFFF) as usize;
        let vm = Arc::clone(&self.cpu.vm);
        let source = Source {
            rip,
            bytes: &bytes[offset..],
            mode: self.cpu.st.mode,
            second: None,
            page: &bytes,
            looked: Cell::new(0),
            cpuid: &vm.cpuid,
        };
        let (mut built, second) = match translator.builder.build(&source) {
            Some(built) => (built, None),
            None => match self.build_straddling(rip, &bytes[offset..])? {
                Some((built, second)) => (built, Some(second)),
                None => return Ok(None),
            },
        };
        let in_first = u64::from(built.len).min(PAGE_SIZE - offset as u64);
        let looked = source.looked.get();
        self.mark_code(physical, code_map::lines(offset as u64, in_first) | looked);
        if let Some(second) = second {
            let rest = u64::from(built.len) - in_first;
            self.mark_code(GuestPhys(second), code_map::lines(0, rest.max(1)));
        }
        let Some(translator) = &mut self.translator else { return Ok(None) };
        self.cpu.counts.blocks += 1;
        self.cpu.counts.instructions += u64::from(built.instructions);
        let index = translator.cache.lock().insert(id, self.cpu.st.mode, &mut built, second);
        self.cpu.counts.translate_tsc += rdtsc().wrapping_sub(start);
        Ok(Some(index))
    }

    /// A block of the one instruction at `rip` that crosses into the next page.
    #[allow(clippy::type_complexity)]
    fn build_straddling(
        &mut self,
        rip: u64,
        tail: &[u8],
    ) -> Result<Option<(crate::translate::builder::Built, u64)>, Fault> {
        if tail.len() >= 15 {
            return Ok(None);
        }
        let next = (rip | 0xFFF).wrapping_add(1);
        // A fault there is the instruction's own only if it needs the bytes: the
        // interpreter finds out.
        let Ok(Some(second)) = self.exec_id(next) else { return Ok(None) };
        let Some(translator) = &mut self.translator else { return Ok(None) };
        let Some(page) = translator.cache.lock().exec_page(second) else { return Ok(None) };
        let mut bytes = [0u8; 30];
        bytes[..tail.len()].copy_from_slice(tail);
        let head = &mut bytes[tail.len()..tail.len() + 15];
        if self.cpu.vm.memory.read(GuestPhys(page.physical), head).is_err() {
            return Ok(None);
        }
        let source = Source {
            rip,
            bytes: &bytes[..tail.len() + 15],
            mode: self.cpu.st.mode,
            second: Some(second),
            page: &[],
            looked: Cell::new(0),
            cpuid: &self.cpu.vm.cpuid,
        };
        let built = translator.builder.build(&source);
        Ok(built.filter(|b| b.len as usize > tail.len()).map(|built| (built, page.physical)))
    }

    /// Marks translated bytes; a page's first translation ends direct writes to it.
    fn mark_code(&mut self, physical: GuestPhys, lines: u64) {
        if self.cpu.vm.code.mark(physical.page(), lines)
            && let Some(host) = self.cpu.vm.memory.host(physical, PAGE_SIZE)
        {
            self.cpu.tlb.protect_host_page(host);
        }
    }

    fn clear_cache(&mut self) {
        self.cpu.counts.cache_flushes += 1;
        self.cpu.tlb.flush_exec();
        let Some(translator) = &self.translator else { return };
        for page in translator.cache.lock().clear() {
            self.cpu.vm.code.clear(page);
        }
    }

    pub(super) fn drop_written_code(&mut self) {
        let pages = self.cpu.vm.code.take_written(self.listener);
        if pages.is_empty() {
            return;
        }
        let Some(translator) = &self.translator else { return };
        let mut cache = translator.cache.lock();
        for page in pages {
            self.cpu.counts.invalidations += 1;
            let block_table = &self.cpu.tlb.block;
            let retired = cache.drop_page(page, |block| {
                let user = block.mode & mode::USER != 0;
                let index = branch_index(block.rip);
                let entry = &mut block_table.branches(user)[index];
                if entry.target == block.rip {
                    entry.target =
                        if index == 0 { crate::cpu::state_block::INVALID_BRANCH_0 } else { 0 };
                }
            });
            for gone in retired {
                self.cpu.tlb.block.exec(gone.user)[exec_index(gone.linear)] = 0;
            }
            self.cpu.vm.code.clear(page);
        }
    }

    /// Runs translated code from `entry` until it leaves, and serves the leave.
    pub(super) fn run_translated(&mut self, entry: u64) -> Result<Option<Exit>, EngineError> {
        let Some(translator) = &self.translator else { return Ok(None) };
        let start = rdtsc();
        self.cpu.st.note_upper_halves();
        let flags = self.cpu.st.flags;
        self.cpu.st.saved_flags = ((flags & 0xD7) << 8 | flags >> 11 & 1) as u32;
        let address = &raw mut *self.cpu as u64;
        self.cpu.st.cpu = address;
        // SAFETY: `enter` is the stub assembled for this purpose; GS is this
        // vCPU's block (set in `run`); `entry` is a live translation for the
        // state in that block.
        unsafe {
            let enter: extern "sysv64" fn(u64) = std::mem::transmute(translator.enter);
            enter(entry);
        }
        self.cpu.counts.entries += 1;
        self.cpu.counts.code_tsc += rdtsc().wrapping_sub(start);
        match self.cpu.st.exit_kind {
            exit_kind::LINK => {
                let exit = translator.cache.lock().exits[self.cpu.st.site as usize];
                self.continue_at(exit.rip, exit.saved);
                self.link(&exit)
            }
            exit_kind::BRANCH | exit_kind::REQUEST_BRANCH => {
                let target = self.cpu.st.address;
                if !canonical(target) {
                    let exit = translator.cache.lock().exits[self.cpu.st.site as usize];
                    return Ok(self.branch_to_nowhere(exit.rip));
                }
                self.continue_at(target, true);
                Ok(None)
            }
            exit_kind::REQUEST => {
                let exit = translator.cache.lock().exits[self.cpu.st.site as usize];
                self.continue_at(exit.rip, exit.saved);
                Ok(None)
            }
            exit_kind::INTERPRET => {
                let exit = translator.cache.lock().exits[self.cpu.st.site as usize];
                self.continue_at(exit.rip, exit.saved);
                if exit.straddles {
                    self.refresh_straddling(exit.rip);
                }
                Ok(self.step())
            }
            kind => {
                let address = if kind == exit_kind::SLOW {
                    self.cpu.st.address
                } else {
                    self.cpu.st.scratch[2]
                };
                let found = translator.cache.lock().instruction_at(address);
                let Some((rip, saved)) = found else {
                    return Err(EngineError::Internal(format!(
                        "translated code left at {address:#x}, which belongs to no instruction"
                    )));
                };
                self.cpu.counts.slow_accesses += 1;
                self.continue_at(rip, saved);
                Ok(self.step())
            }
        }
    }

    /// A near branch to an address that is not canonical faults itself (SDM 2, RET,
    /// CALL, JMP), but translated code has moved RSP already.
    fn branch_to_nowhere(&mut self, rip: u64) -> Option<Exit> {
        self.continue_at(rip, true);
        if let Ok(i) = interp::fetch(&mut self.cpu) {
            let moved = match i.mnemonic() {
                Mnemonic::Ret if i.op_count() == 1 => 8 + u64::from(i.immediate16()),
                Mnemonic::Ret => 8,
                Mnemonic::Call => 8u64.wrapping_neg(),
                _ => 0,
            };
            let rsp = &mut self.cpu.st.gpr[reg::RSP];
            *rsp = rsp.wrapping_sub(moved);
        }
        self.step()
    }

    /// Takes over RIP and the arithmetic flags from translated code.
    fn continue_at(&mut self, rip: u64, saved: bool) {
        let st = &mut *self.cpu.st;
        st.rip = rip;
        let flags = if saved {
            let packed = u64::from(st.saved_flags);
            packed >> 8 & 0xD5 | (packed & 1) << 11
        } else {
            st.exit_flags
        };
        st.update_flags(flag::ARITH, flags);
    }

    fn link(&mut self, exit: &crate::translate::cache::Exit) -> Result<Option<Exit>, EngineError> {
        self.cpu.counts.links += 1;
        let flushes = self.cpu.counts.cache_flushes;
        match self.resolve(exit.rip) {
            Ok(Some(index)) => {
                if let Some(translator) = &self.translator
                    && flushes == self.cpu.counts.cache_flushes
                {
                    translator.cache.lock().link(exit, index);
                }
                Ok(None)
            }
            Ok(None) => Ok(self.step()),
            Err(fault) => Ok(self.deliver(fault)),
        }
    }

    /// The second page of a crossing instruction is not the one translated: the
    /// block goes if another page is mapped there now.
    fn refresh_straddling(&mut self, rip: u64) {
        let next = (rip | 0xFFF).wrapping_add(1);
        let Ok(Some(_)) = self.exec_id(next) else { return };
        let Ok(Some(id)) = self.exec_id(rip) else { return };
        let word = self.cpu.st.mode;
        if let Some(translator) = &self.translator {
            translator.cache.lock().forget(rip, id, word);
        }
    }
}
