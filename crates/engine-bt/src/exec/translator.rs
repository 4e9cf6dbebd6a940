//! Translated code as the run loop uses it: find it, make it, run it, and tell
//! what it left for.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic};
use parking_lot::Mutex;
use tetrarch_engine::{EngineError, host_tsc};
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use super::access::{self, PlainMove, Then};
use super::rest::Rest;
use crate::cpu::mmu::Place;
use crate::cpu::{Cpu, Missed};
use crate::interp;
use crate::memory::code_map::{self, Written};
use crate::memory::rendezvous::{Order, Orders};
use crate::state::address::canonical;
use crate::state::block::branch_index;
use crate::state::fault::{Fault, vector};
use crate::state::mode;
use crate::state::{flag, reg};
use crate::translate::block::{
    Built, Link, MapEntry, PortAccess, Site, Source, What, decoder, rebased,
};
use crate::translate::builder::{Builder, MAX_BLOCK_CODE};
use crate::translate::cache::CodeCache;
use crate::translate::liveness::{ALL, FlagUse};
use crate::translate::sources::{Origin, Sources};
use crate::translate::stubs::{Calls, exit_kind};
use crate::translate::translations::{ExecPage, Key, Translations};

pub const CALLS: Calls = Calls { fill, tsc };

/// Called by translated code on a TLB miss. Returns whether to try again; if not,
/// [`Cpu::missed`] tells what was found.
extern "sysv64" fn fill(cpu: u64, linear: u64, write: u64) -> u64 {
    // SAFETY: `CpuState::cpu` is set to the vCPU's own `Cpu` before translated
    // code is entered, and nothing else borrows it while that code runs.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    let user = cpu.user();
    cpu.st.note_upper_halves();
    cpu.missed = Missed::Nothing;
    if cpu.tlb.lookup(linear, user, write != 0).is_some() {
        // The page is there: the access crosses its end.
        return 0;
    }
    match cpu.fill_tlb(linear, write != 0, user) {
        Ok(Place::Ram(_)) => return 1,
        Ok(Place::Code(..)) => {}
        Ok(Place::Device(address)) => cpu.missed = Missed::Device { linear, address },
        Err(fault) => cpu.missed = Missed::Fault { linear, fault },
    }
    0
}

/// Called by translated code that counts, for RDTSC: what it reads is the journal's.
extern "sysv64" fn tsc(cpu: u64) -> u64 {
    // SAFETY: as in `fill`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    cpu.st.note_upper_halves();
    cpu.tsc()
}

/// An instruction whose memory access once left translated code.
struct SlowSite {
    /// The host address by which it leaves.
    at: u64,
    /// Where it is mapped, if it is relative code.
    page: Option<u64>,
    rip: u64,
    saved: bool,
    /// Instructions that were counted and are not done.
    left: u8,
    /// The arithmetic flags that were not put aside, and where they are from.
    dead: u32,
    sources: Sources,
    instruction: Instruction,
    plain: Option<PlainMove>,
}

/// Bytes of an instruction that can lie on its second page, and one more.
const MAX_HEAD: usize = 15;

/// From here on 32-bit code is interpreted: what follows its last byte is at 0.
const LAST_PAGE32: u64 = u32::MAX as u64 - (PAGE_SIZE - 1);

/// Slots for [`SlowSite`]s: what a guest's drivers touch devices with.
const SLOW_SITES: usize = 64;

/// The translator's half of a vCPU.
pub struct Translator {
    cache: Arc<Mutex<CodeCache>>,
    /// Where it finds them, without the cache's lock.
    translations: Arc<Translations>,
    builder: Builder,
    enter: u64,
    slow_sites: Box<[Option<SlowSite>; SLOW_SITES]>,
    info: InstructionInfoFactory,
    rest: Rest,
    /// The vCPU's number in the code map.
    listener: usize,
}

fn broken(what: &str, number: u64) -> EngineError {
    EngineError::Internal(format!("translated code left at {what} {number:#x}, which is none"))
}

/// A block that is made, and what it was made of.
struct Draft<'a> {
    built: Built,
    /// Its page, as it was read.
    physical: GuestPhys,
    page: &'a [u8; PAGE_SIZE as usize],
    /// The lines of the page that it depends on.
    lines: u64,
    /// Of an instruction that crosses into another page.
    second: Option<Tail>,
}

struct Tail {
    physical: u64,
    /// How the page begins, of which `len` bytes count.
    head: [u8; MAX_HEAD],
    len: usize,
}

impl Draft<'_> {
    /// The pages that it depends on, and their lines.
    fn pages(&self) -> Vec<(GuestPhys, u64)> {
        let mut pages = vec![(self.physical, self.lines)];
        if let Some(second) = &self.second {
            let lines = code_map::lines(0, second.len as u64);
            pages.push((GuestPhys(second.physical), lines));
        }
        pages
    }

    /// Whether memory still holds what it was made of.
    fn is_as_read(&self, cpu: &Cpu) -> bool {
        is_unchanged(cpu, self.physical, self.page, self.lines)
            && self.second.as_ref().is_none_or(|second| {
                let mut now = [0; MAX_HEAD];
                cpu.vm.memory.read(GuestPhys(second.physical), &mut now).is_ok()
                    && now[..second.len] == second.head[..second.len]
            })
    }
}

impl Translator {
    pub fn new(cache: Arc<Mutex<CodeCache>>, listener: usize) -> Self {
        let (stubs, translations) = {
            let cache = cache.lock();
            (cache.stubs, Arc::clone(&cache.translations))
        };
        Self {
            cache,
            translations,
            builder: Builder::new(stubs),
            enter: stubs.enter,
            slow_sites: Box::new([const { None }; SLOW_SITES]),
            info: InstructionInfoFactory::new(),
            rest: Rest::default(),
            listener,
        }
    }

    pub fn used_bytes(&self) -> u64 {
        self.cache.lock().used_bytes() as u64
    }

    /// Goes on in translated code at RIP until it leaves.
    pub fn run(&mut self, cpu: &mut Cpu) -> Result<Then, EngineError> {
        match self.host_entry(cpu) {
            Ok(Some(entry)) => self.run_from(cpu, entry),
            Ok(None) => Ok(Then::Interpret),
            Err(fault) => Ok(Then::Raise(fault)),
        }
    }

    /// Where to enter translated code for RIP. `None`: to be interpreted.
    fn host_entry(&mut self, cpu: &mut Cpu) -> Result<Option<u64>, Fault> {
        let rip = cpu.st.rip;
        let user = cpu.user();
        let known = cpu.tlb.block.branches(user)[branch_index(rip)];
        if known.target == rip {
            return Ok(Some(known.host));
        }
        let Some(index) = self.resolve(cpu, rip, 0)? else { return Ok(None) };
        let Some((host, global)) = self.translations.indirect_entry(index) else { return Ok(None) };
        cpu.tlb.fill_branch(rip, host, user, global);
        Ok(Some(host))
    }

    /// The block at `rip` for flags of this origin, translated if need be. `None`: to be
    /// interpreted.
    fn resolve(&mut self, cpu: &mut Cpu, rip: u64, origin: u32) -> Result<Option<u32>, Fault> {
        cpu.counts.lookups += 1;
        if self.translations.is_closed() && !self.renew() {
            return Ok(None);
        }
        if cpu.st.mode & mode::CODE32 != 0 && rip >= LAST_PAGE32 {
            return Ok(None);
        }
        if cpu.breakpoints.contains(&rip) {
            return Ok(None);
        }
        let Some(id) = self.exec_id(cpu, rip)? else { return Ok(None) };
        let key = block_key(cpu, rip, id, origin);
        if let Some(index) = self.translations.find(&key) {
            return Ok(Some(index));
        }
        Ok(self.translate(cpu, rip, key))
    }

    /// Goes over to the translations that are made now. The vCPU's tables hold none of
    /// before: it was asked to forget them before there were these. False: the cache
    /// is still being cleared.
    fn renew(&mut self) -> bool {
        let cache = self.cache.lock();
        self.translations = Arc::clone(&cache.translations);
        !self.translations.is_closed()
    }

    /// The exec id of the page of `rip`, entered in the exec table. `None` for
    /// code outside RAM, or while the cache is being cleared.
    fn exec_id(&mut self, cpu: &mut Cpu, rip: u64) -> Result<Option<u32>, Fault> {
        let user = cpu.user();
        let linear = rip & !0xFFF;
        let id = cpu.tlb.exec_id(rip, user);
        if id != 0 {
            let here = |page: ExecPage| match page.linear {
                ExecPage::ANYWHERE => cpu.tlb.relative_page(rip) == linear,
                known => known == linear,
            };
            let known = self.translations.exec_page(id);
            if known.is_some_and(|page| here(page) && page.user == user) {
                return Ok(Some(id));
            }
        }
        if !canonical(rip) {
            return Err(Fault::with_error(vector::GP, 0));
        }
        let (address, walk) = cpu.fetch_page(rip, user)?;
        let physical = address.0 & !0xFFF;
        if cpu.vm.memory.host(GuestPhys(physical), PAGE_SIZE).is_none() {
            return Ok(None);
        }
        if walk.size > PAGE_SIZE {
            cpu.tlb.note_large(rip, walk.size);
        }
        let relative = is_relative(rip, user);
        let linear = if relative { ExecPage::ANYWHERE } else { linear };
        let page = ExecPage { linear, physical, user };
        // It may be global in one address space and not in another.
        let global = walk.global && !relative;
        let id = match self.translations.exec_id(&page, global) {
            Some(id) => id,
            None => match self.new_exec_id(cpu, page, global) {
                Some(id) => id,
                None => return Ok(None),
            },
        };
        if relative {
            cpu.tlb.fill_relative(rip, id);
        } else {
            cpu.tlb.fill_exec(rip, id, user, global);
        }
        Ok(Some(id))
    }

    fn new_exec_id(&mut self, cpu: &mut Cpu, page: ExecPage, global: bool) -> Option<u32> {
        let mut cache = self.cache.lock();
        if !cache.takes(&self.translations) {
            return None;
        }
        let id = cache.exec_id(page, global);
        drop(cache);
        if id.is_none() {
            self.clear_cache(cpu);
        }
        id
    }

    fn translate(&mut self, cpu: &mut Cpu, rip: u64, key: Key) -> Option<u32> {
        let start = host_tsc();
        let physical = GuestPhys(self.translations.exec_page(key.id)?.physical);
        let mut page = [0u8; PAGE_SIZE as usize];
        cpu.vm.memory.read(physical, &mut page).ok()?;
        let draft = self.draft(cpu, rip, &key, physical, &page)?;
        let index = self.keep(cpu, key, draft);
        cpu.counts.translate_tsc += host_tsc().wrapping_sub(start);
        index
    }

    /// Makes a block of what is read of its page.
    fn draft<'a>(
        &mut self,
        cpu: &mut Cpu,
        rip: u64,
        key: &Key,
        physical: GuestPhys,
        page: &'a [u8; PAGE_SIZE as usize],
    ) -> Option<Draft<'a>> {
        let translations = Arc::clone(&self.translations);
        let offset = (rip & 0xFFF) as usize;
        let (vm, breakpoints) = (Arc::clone(&cpu.vm), Arc::clone(&cpu.breakpoints));
        let source = Source {
            rip: key.rip,
            bytes: &page[offset..],
            mode: key.mode,
            second: None,
            page,
            looked: Cell::new(0),
            cpuid: &vm.cpuid,
            yields: vm.crowded,
            counting: cpu.counting,
            breakpoints: &breakpoints,
            origin: translations.origin(key.origin)?,
        };
        let (built, second) = match self.builder.build(&source) {
            Some(built) => (built, None),
            None => {
                let (built, second) = self.build_straddling(cpu, rip, key, &page[offset..])?;
                (built, Some(second))
            }
        };
        let in_first = u64::from(built.len).min(PAGE_SIZE - offset as u64);
        let lines = code_map::lines(offset as u64, in_first) | source.looked.get();
        let rest = (u64::from(built.len) - in_first).max(1) as usize;
        let second = second.map(|(physical, head)| Tail { physical, head, len: rest });
        Some(Draft { built, physical, page, lines, second })
    }

    /// Lets a block be found, if its code is still what it was made of.
    fn keep(&mut self, cpu: &mut Cpu, key: Key, mut draft: Draft<'_>) -> Option<u32> {
        let pages = draft.pages();
        let mut cache = self.cache.lock();
        if !cache.are_protected(&pages) {
            drop(cache);
            self.end_direct_writes(cpu, &pages);
            cache = self.cache.lock();
            if !cache.are_protected(&pages) {
                // A write came first.
                return None;
            }
        }
        if !cache.takes(&self.translations) {
            return None;
        }
        if cache.is_full() {
            drop(cache);
            self.clear_cache(cpu);
            return None;
        }
        if let Some(index) = self.translations.find(&key) {
            // Another vCPU has made the same.
            return Some(index);
        }
        for &(page, lines) in &pages {
            cpu.vm.code.mark(page.page(), lines);
        }
        if !draft.is_as_read(cpu) {
            // Somebody wrote between the reading and the marking, unnoticed.
            return None;
        }
        cpu.counts.blocks += 1;
        cpu.counts.instructions += u64::from(draft.built.instructions);
        let second = draft.second.as_ref().map(|second| second.physical);
        cache.insert(key, &mut draft.built, second)
    }

    /// Has every vCPU write to these pages, whose lines are about to be translated,
    /// where it is seen. A page that is written to meanwhile stays as it was.
    fn end_direct_writes(&mut self, cpu: &mut Cpu, pages: &[(GuestPhys, u64)]) {
        let vm = Arc::clone(&cpu.vm);
        for &(page, lines) in pages {
            let cache = self.cache.lock();
            vm.code.mark(page.page(), lines);
            let drops = cache.drops_of(page);
            drop(cache);
            let Some(host) = vm.memory.host(page, PAGE_SIZE) else { return };
            let order = Order::ProtectPage(host as usize);
            vm.rendezvous.ask(order, Some(cpu.id), |orders| self.obey(cpu, orders));
            let mut cache = self.cache.lock();
            if cache.takes(&self.translations) && cache.drops_of(page) == drops {
                cache.set_protected(page);
            }
        }
    }

    /// A block of the one instruction at `rip` that crosses into the next page.
    fn build_straddling(
        &mut self,
        cpu: &mut Cpu,
        rip: u64,
        key: &Key,
        tail: &[u8],
    ) -> Option<(Built, (u64, [u8; MAX_HEAD]))> {
        if tail.len() >= MAX_HEAD {
            return None;
        }
        let next = (rip | 0xFFF).wrapping_add(1);
        // A fault there is the instruction's own only if it needs the bytes: the
        // interpreter finds out.
        let second = self.exec_id(cpu, next).ok()??;
        let page = self.translations.exec_page(second)?;
        if key.relative() != (page.linear == ExecPage::ANYWHERE) {
            return None;
        }
        let mut bytes = [0u8; 2 * MAX_HEAD];
        let mut head = [0; MAX_HEAD];
        cpu.vm.memory.read(GuestPhys(page.physical), &mut head).ok()?;
        bytes[..tail.len()].copy_from_slice(tail);
        bytes[tail.len()..tail.len() + MAX_HEAD].copy_from_slice(&head);
        let source = Source {
            rip: key.rip,
            bytes: &bytes[..tail.len() + MAX_HEAD],
            mode: key.mode,
            second: Some(second),
            page: &[],
            looked: Cell::new(0),
            cpuid: &cpu.vm.cpuid,
            yields: cpu.vm.crowded,
            counting: cpu.counting,
            breakpoints: &cpu.breakpoints,
            origin: &Origin::Saved,
        };
        let built = self.builder.build(&source)?;
        (built.len as usize > tail.len()).then_some((built, (page.physical, head)))
    }

    /// Does what is asked of the vCPU's tables.
    pub fn obey(&mut self, cpu: &mut Cpu, orders: &Orders) {
        if orders.code {
            cpu.tlb.flush_exec();
            cpu.settle_x87_pointers();
            self.slow_sites.fill_with(|| None);
            // Other code comes to where this CPU may have fetched some already (Intel
            // SDM 3A, 8.1.3): CPUID serialises.
            std::arch::x86_64::__cpuid(0);
        }
        cpu.obey(orders);
    }

    /// Empties the cache, once no vCPU runs what is in it.
    pub fn clear_cache(&mut self, cpu: &mut Cpu) {
        let cache = self.cache.lock();
        if !cache.takes(&self.translations) {
            // Another vCPU was first.
            return;
        }
        cache.close();
        drop(cache);
        cpu.counts.cache_flushes += 1;
        let vm = Arc::clone(&cpu.vm);
        vm.rendezvous.ask(Order::ForgetCode, Some(cpu.id), |orders| self.obey(cpu, orders));
        let mut cache = self.cache.lock();
        for page in cache.clear() {
            vm.code.clear(page);
        }
        self.translations = Arc::clone(&cache.translations);
    }

    /// The vCPU is about to rest, for as long as `timeout` if it is known. Times are the
    /// machine's, in nanoseconds.
    pub fn rest(&mut self, cpu: &mut Cpu, now: u64, timeout: Option<Duration>) {
        let (now, halted) = (Duration::from_nanos(now), Duration::from_nanos(cpu.counts.halted_ns));
        let cache = Arc::clone(&self.cache);
        if self.rest.is_long_enough(now, timeout, halted, || cache.lock().used_bytes() as u64) {
            self.clear_cache(cpu);
            crate::host::heap::give_back();
        }
    }

    pub fn drop_written_code(&mut self, cpu: &mut Cpu) {
        let pages = cpu.vm.code.take_written(self.listener);
        if pages.is_empty() {
            return;
        }
        let mut cache = self.cache.lock();
        for Written { page, epoch } in pages {
            cpu.counts.invalidations += 1;
            if cache.dropped_since(page, epoch) {
                // Another vCPU was first, and the page may have been translated
                // anew: what must go is in this one's tables alone.
                cpu.tlb.flush_exec();
                continue;
            }
            let tlb = &mut cpu.tlb;
            let retired = cache.drop_page(page, |block| {
                if block.relative() {
                    tlb.drop_relative_block(block.id, block.rip);
                } else {
                    tlb.drop_block(block.rip, block.mode & mode::USER != 0);
                }
            });
            for (id, gone) in retired {
                if gone.linear == ExecPage::ANYWHERE {
                    tlb.drop_relative(id);
                } else {
                    tlb.drop_exec(gone.linear, gone.user);
                }
            }
            let epoch = cpu.vm.code.clear(page);
            cache.note_dropped(page, epoch);
        }
    }

    /// Runs translated code from `entry` until it leaves, and takes over from it.
    fn run_from(&mut self, cpu: &mut Cpu, mut entry: u64) -> Result<Then, EngineError> {
        loop {
            self.enter(cpu, entry);
            match cpu.st.exit_kind {
                exit_kind::SLOW => return self.slow_access(cpu, cpu.st.address),
                exit_kind::SIGNAL => return self.host_exception(cpu, cpu.st.scratch[2]),
                _ => {}
            }
            let site = self.site(cpu)?;
            match cpu.st.exit_kind {
                exit_kind::BRANCH | exit_kind::REQUEST_BRANCH => {
                    let target = cpu.st.address;
                    if !canonical(target) && matches!(site.what, What::Branch) {
                        cpu.st.uncount(site.left);
                        return Ok(branch_to_nowhere(cpu, &site));
                    }
                    continue_at(cpu, target, true);
                    return Ok(Then::Continue);
                }
                exit_kind::LIMIT => {
                    cpu.st.uncount(site.left);
                    continue_at(cpu, site.rip, site.saved);
                    restore_at(&site, &self.translations, cpu, &mut self.info);
                    return Ok(Then::Limit(site.left));
                }
                _ => {
                    cpu.st.uncount(site.left);
                    continue_at(cpu, site.rip, site.saved);
                }
            }
            if let What::Link(link) = site.what
                && cpu.st.exit_kind == exit_kind::LINK
            {
                let before = Arc::clone(&self.translations);
                match self.link(cpu, &site, &link) {
                    // Flags that are not exact are the target's to make, as by the link.
                    Ok(next) => {
                        entry = next;
                        continue;
                    }
                    Err(then) => {
                        restore_at(&site, &before, cpu, &mut self.info);
                        return Ok(then);
                    }
                }
            }
            restore_at(&site, &self.translations, cpu, &mut self.info);
            return Ok(match site.what {
                What::Nothing | What::Branch | What::Link(_) => Then::Continue,
                What::Instruction(number) => {
                    let found = self.translations.interpreted.get(number);
                    let found = found.ok_or_else(|| broken("instruction", number.into()))?;
                    Then::Execute(placed(cpu, &site, found))
                }
                What::Port(number) => {
                    let found = self.translations.ports.get(number);
                    let found = found.ok_or_else(|| broken("port", number.into()))?;
                    let instruction = placed(cpu, &site, &found.instruction);
                    access::port(cpu, &PortAccess { instruction, ..*found })
                }
                What::Straddles(id) if self.goes_on_at(cpu, site.rip, id) => Then::Continue,
                What::Straddles(_) => Then::Interpret,
            });
        }
    }

    /// Where translated code has left.
    fn site(&self, cpu: &Cpu) -> Result<Site, EngineError> {
        let number = cpu.st.site;
        let site = self.translations.sites.get(number);
        let mut site = *site.ok_or_else(|| broken("site", number.into()))?;
        if site.relative {
            site.rip = site.rip.wrapping_add(cpu.st.code_page);
        }
        Ok(site)
    }

    /// Runs translated code from `entry`, which is for the guest's RIP, until it leaves.
    fn enter(&mut self, cpu: &mut Cpu, entry: u64) {
        let start = host_tsc();
        cpu.st.note_upper_halves();
        let flags = cpu.st.flags;
        cpu.st.saved_flags = ((flags & 0xD7) << 8 | flags >> 11 & 1) as u32;
        let address = &raw mut *cpu as u64;
        cpu.st.cpu = address;
        cpu.st.code_rsp = &raw const *cpu.st as u64;
        // SAFETY: `enter` is the stub assembled for this purpose; GS is this
        // vCPU's block (set in `run`); `entry` is a live translation for the
        // state in that block.
        unsafe {
            let enter: extern "sysv64" fn(u64) = std::mem::transmute(self.enter);
            enter(entry);
        }
        cpu.counts.entries += 1;
        cpu.counts.code_tsc += host_tsc().wrapping_sub(start);
    }

    /// A memory access missed and cannot hit.
    fn slow_access(&mut self, cpu: &mut Cpu, at: u64) -> Result<Then, EngineError> {
        cpu.counts.slow_accesses += 1;
        // Not every leave of this kind comes from a miss.
        let missed = std::mem::replace(&mut cpu.missed, Missed::Nothing);
        let slot = (at >> 2) as usize % SLOW_SITES;
        let here = |site: &SlowSite| {
            site.at == at && site.page.is_none_or(|page| page == cpu.st.code_page)
        };
        if let Some(site) = self.slow_sites[slot].as_ref().filter(|site| here(site)) {
            cpu.st.uncount(site.left);
        } else {
            self.slow_sites[slot] = None;
            let (block, place) = self.leave_at(cpu, at)?;
            let sources = sources(&mut self.info, cpu, &self.translations, &block, place.rip);
            let dead = ALL & !place.live();
            if let Some(sources) = &sources {
                sources.restore(cpu, dead);
            }
            let Ok(instruction) = interp::fetch(cpu) else { return Ok(Then::Interpret) };
            let Some(sources) = sources else { return Ok(Then::Execute(instruction)) };
            let (rip, saved, left) = (cpu.st.rip, place.saved(), place.left);
            let plain = PlainMove::of(&instruction);
            let page = block.relative().then_some(cpu.st.code_page);
            let site = SlowSite { at, page, rip, saved, left, dead, sources, instruction, plain };
            self.slow_sites[slot] = Some(site);
        }
        let Some(site) = &self.slow_sites[slot] else { return Ok(Then::Interpret) };
        continue_at(cpu, site.rip, site.saved);
        site.sources.restore(cpu, site.dead);
        Ok(match (site.plain, missed) {
            (Some(plain), Missed::Device { linear, address }) if plain.fits(linear) => {
                plain.make(cpu, address, site.instruction.next_ip())
            }
            (Some(plain), Missed::Fault { linear, fault })
                if plain.fits(linear) && fault.vector == vector::PF =>
            {
                Then::Raise(fault)
            }
            _ => Then::Execute(site.instruction),
        })
    }

    /// A host exception in a copied instruction: the interpreter finds the guest's.
    fn host_exception(&mut self, cpu: &mut Cpu, at: u64) -> Result<Then, EngineError> {
        cpu.counts.slow_accesses += 1;
        let (block, place) = self.leave_at(cpu, at)?;
        let (info, dead) = (&mut self.info, ALL & !place.live());
        restore_flags(info, cpu, &self.translations, &block, place.rip, dead);
        Ok(Then::Interpret)
    }

    /// Takes over from translated code at the instruction of a host address. Returns
    /// its block, and the place in it.
    fn leave_at(&self, cpu: &mut Cpu, at: u64) -> Result<(Key, MapEntry), EngineError> {
        let found = self.translations.instruction_at(at);
        let (&block, _, place) = found.ok_or_else(|| broken("address", at))?;
        cpu.st.uncount(place.left);
        continue_at(cpu, block.place(place.rip, cpu.st.code_page), place.saved());
        Ok((block, place))
    }

    /// Links a branch. Returns where its target is entered, which finds the flags and
    /// registers as the branch has left them.
    fn link(&mut self, cpu: &mut Cpu, site: &Site, link: &Link) -> Result<u64, Then> {
        cpu.counts.links += 1;
        let generation = self.translations.generation;
        let index = match self.resolve(cpu, site.rip, link.origin) {
            Ok(Some(index)) => index,
            Ok(None) => return Err(Then::Interpret),
            Err(fault) => return Err(Then::Raise(fault)),
        };
        // The site may be gone with what was before.
        if generation != self.translations.generation {
            return Err(Then::Continue);
        }
        let mut cache = self.cache.lock();
        if cache.takes(&self.translations) {
            cache.link(site, index);
        }
        drop(cache);
        let (entry, _) = self.translations.indirect_entry(index).ok_or(Then::Continue)?;
        Ok(entry)
    }

    /// Whether the instruction at `rip`, which crosses pages, goes on in the page of an exec
    /// id: the table did not have it yet. Where another page is mapped, the block goes.
    fn goes_on_at(&mut self, cpu: &mut Cpu, rip: u64, second: u32) -> bool {
        let next = (rip | 0xFFF).wrapping_add(1);
        let Ok(Some(now)) = self.exec_id(cpu, next) else { return false };
        if now != second
            && let Ok(Some(id)) = self.exec_id(cpu, rip)
        {
            self.cache.lock().forget(&block_key(cpu, rip, id, 0));
        }
        now == second
    }
}

/// Whether user code at `rip` is translated without its address: programs and libraries that
/// Linux maps somewhere else each time, and not those that are linked for one place.
fn is_relative(rip: u64, user: bool) -> bool {
    user && rip > u32::MAX.into()
}

fn block_key(cpu: &Cpu, rip: u64, id: u32, origin: u32) -> Key {
    let mode = cpu.st.mode;
    if is_relative(rip, cpu.user()) {
        return Key { rip: rip & (PAGE_SIZE - 1), id, mode: mode | mode::RELATIVE, origin };
    }
    Key { rip, id, mode, origin }
}

/// An instruction that a site leaves for, as it stands where it is mapped.
fn placed(cpu: &Cpu, site: &Site, instruction: &Instruction) -> Instruction {
    if site.relative { rebased(*instruction, cpu.st.code_page) } else { *instruction }
}

/// A near branch to an address that is not canonical faults itself (SDM 2, RET,
/// CALL, JMP), but translated code has moved RSP already.
fn branch_to_nowhere(cpu: &mut Cpu, site: &Site) -> Then {
    continue_at(cpu, site.rip, true);
    let Ok(i) = interp::fetch(cpu) else { return Then::Interpret };
    let moved = match i.mnemonic() {
        Mnemonic::Ret if i.op_count() == 1 => 8 + u64::from(i.immediate16()),
        Mnemonic::Ret => 8,
        _ => 0,
    };
    let rsp = &mut cpu.st.gpr[reg::RSP];
    *rsp = rsp.wrapping_sub(moved);
    Then::Execute(i)
}

/// Takes over RIP and the arithmetic flags from translated code.
fn continue_at(cpu: &mut Cpu, rip: u64, saved: bool) {
    let st = &mut *cpu.st;
    st.rip = rip;
    let flags = if saved { st.flags_aside() } else { st.exit_flags };
    st.update_flags(flag::ARITH, flags);
}

/// Makes the arithmetic flags again that are exact in no place where a block has left.
fn restore_at(
    site: &Site,
    translations: &Translations,
    cpu: &mut Cpu,
    info: &mut InstructionInfoFactory,
) {
    if site.dead != 0
        && let Some((&block, _)) = translations.block_at(site.block)
    {
        restore_flags(info, cpu, translations, &block, site.run, site.dead.into());
    }
}

/// Makes arithmetic flags again that were not put aside, at a place so many bytes
/// behind the start of a block.
fn restore_flags(
    info: &mut InstructionInfoFactory,
    cpu: &mut Cpu,
    translations: &Translations,
    block: &Key,
    run: u16,
    dead: u32,
) {
    if dead != 0
        && let Some(sources) = sources(info, cpu, translations, block, run)
    {
        sources.restore(cpu, dead);
    }
}

/// Where the flags are from at a place so many bytes behind the start of a block.
fn sources(
    info: &mut InstructionInfoFactory,
    cpu: &Cpu,
    translations: &Translations,
    block: &Key,
    run: u16,
) -> Option<Sources> {
    let mut sources = Sources::new(translations.origin(block.origin)?);
    let page = translations.exec_page(block.id)?;
    let mut bytes = [0; MAX_BLOCK_CODE];
    let bytes = bytes.get_mut(..usize::from(run))?;
    let start = GuestPhys(page.physical | block.rip & (PAGE_SIZE - 1));
    cpu.vm.memory.read(start, bytes).ok()?;
    let counted = cpu.vm.journal.is_some();
    for i in &mut decoder(block.mode, bytes, block.rip, &cpu.vm.cpuid) {
        sources.pass(&i, &FlagUse::of(&i, counted), info);
    }
    Some(sources)
}

/// Whether the marked lines of a page are still as they were read.
fn is_unchanged(cpu: &Cpu, physical: GuestPhys, bytes: &[u8], lines: u64) -> bool {
    let mut now = [0; PAGE_SIZE as usize];
    let first = lines.trailing_zeros().min(u64::BITS - 1) as usize * code_map::LINE;
    let end = PAGE_SIZE as usize - lines.leading_zeros() as usize * code_map::LINE;
    let Some(marked) = now.get_mut(first..end) else { return true };
    let read = cpu.vm.memory.read(GuestPhys(physical.0 + first as u64), marked);
    let same = |line: usize| {
        let line = line * code_map::LINE..(line + 1) * code_map::LINE;
        now[line.clone()] == bytes[line]
    };
    read.is_ok()
        && (first / code_map::LINE..end / code_map::LINE)
            .all(|line| lines >> line & 1 == 0 || same(line))
}
