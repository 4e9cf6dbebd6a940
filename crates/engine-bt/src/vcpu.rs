//! The run loop: translate, run, interpret, deliver, sleep.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use iced_x86::Mnemonic;
use parking_lot::Mutex;
use tetrarch_engine::{Counters, EngineError, Exit, Kick, Registers, Reply, SystemRegisters, Vcpu};
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use crate::block::{branch_index, exec_index};
use crate::codemap;
use crate::cpu::{Cpu, VmShared, mode};
use crate::exception;
use crate::fault::{Fault, Stop};
use crate::fpu;
use crate::interp::{self, native};
use crate::irqchip::Event;
use crate::mmu::{Place, canonical};
use crate::msr;
use crate::signals;
use crate::state::{flag, reg, seg};
use crate::timer::HostTimer;
use crate::translate::builder::{Builder, Source};
use crate::translate::cache::{Cache, ExecPage};
use crate::translate::stubs::exit_kind;
use crate::wake::Bell;

/// The translator's half of a vCPU.
struct Translator {
    cache: Arc<Mutex<Cache>>,
    builder: Builder,
    enter: u64,
}

pub struct BtVcpu {
    cpu: Box<Cpu>,
    translator: Option<Translator>,
    bell: Arc<Bell>,
    timer: Option<HostTimer>,
    listener: usize,
    /// An exit waits for its reply.
    waiting: Option<Exit>,
    shut_down: bool,
    nmi_pending: bool,
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
    pub fn new(
        id: usize,
        shared: Arc<VmShared>,
        cache: Option<Arc<Mutex<Cache>>>,
    ) -> Result<Self, EngineError> {
        let no_memory =
            |error| EngineError::Unavailable(format!("no memory for vCPU {id}: {error}"));
        let code = Arc::clone(&shared.code);
        let cpu = Box::new(Cpu::new(id, shared).map_err(no_memory)?);
        let bell = Arc::new(Bell::new(Arc::clone(&cpu.tlb.block)));
        let ring = Arc::clone(&bell);
        let listener = code.add_listener(Box::new(move || ring.ring()));
        let translator = cache.map(|cache| {
            let stubs = cache.lock().stubs;
            Translator { cache, builder: Builder::new(stubs), enter: stubs.enter }
        });
        signals::install();
        Ok(Self {
            cpu,
            translator,
            bell,
            timer: None,
            listener,
            waiting: None,
            shut_down: false,
            nmi_pending: false,
        })
    }

    pub fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    fn run_inside(&mut self) -> Result<Exit, EngineError> {
        loop {
            let shared = self.cpu.tlb.block.shared();
            if shared.request.load(Ordering::Relaxed) != 0
                && let Some(exit) = self.attend()
            {
                return Ok(exit);
            }
            // An instruction that waits for an answer goes first: interrupts come
            // at instruction boundaries.
            if self.cpu.replay.in_progress() {
                if let Some(exit) = self.step() {
                    return Ok(exit);
                }
                continue;
            }
            if self.cpu.st.halted != 0 && !(self.nmi_pending && self.cpu.st.nmi_blocked == 0) {
                if let Some(exit) = self.sleep() {
                    return Ok(exit);
                }
                continue;
            }
            if self.nmi_pending && self.cpu.st.nmi_blocked == 0 && self.cpu.st.shadow == 0 {
                if let Some(exit) = self.deliver_nmi() {
                    return Ok(exit);
                }
                continue;
            }
            if self.interrupt_ready() {
                self.deliver_interrupt();
                continue;
            }
            let deadline = self.cpu.vm.irqchip.next_deadline(self.cpu.id);
            if let Some(timer) = &mut self.timer {
                let cpu = &self.cpu;
                timer.arm(deadline, || cpu.now_ns());
            }
            let translate = self.cpu.st.mode & mode::TRANSLATE != 0
                && self.cpu.st.shadow == 0
                && self.translator.is_some();
            if !translate {
                if let Some(exit) = self.step() {
                    return Ok(exit);
                }
                continue;
            }
            match self.host_entry() {
                Ok(Some(entry)) => {
                    if let Some(exit) = self.run_translated(entry)? {
                        return Ok(exit);
                    }
                }
                Ok(None) => {
                    if let Some(exit) = self.step() {
                        return Ok(exit);
                    }
                }
                Err(fault) => {
                    if let Some(exit) = self.deliver(fault) {
                        return Ok(exit);
                    }
                }
            }
        }
    }

    /// Serves what the request flag may stand for.
    fn attend(&mut self) -> Option<Exit> {
        self.cpu.tlb.block.shared().request.store(0, Ordering::SeqCst);
        self.drop_written_code();
        let deadline = self.cpu.vm.irqchip.next_deadline(self.cpu.id);
        if let Some(deadline) = deadline {
            let now = self.cpu.now_ns();
            if now >= deadline {
                let tsc = self.cpu.tsc();
                self.cpu.vm.irqchip.run_timers(self.cpu.id, now, tsc);
            }
            if let Some(timer) = &mut self.timer {
                timer.expired();
            }
        }
        if self.cpu.replay.in_progress() {
            // Events wait for the end of the instruction, kicks too.
            self.cpu.tlb.block.shared().request.store(1, Ordering::SeqCst);
            return None;
        }
        while let Some(event) = self.cpu.vm.irqchip.take_event(self.cpu.id) {
            match event {
                // One NMI is held while another is served (SDM 3A, 6.7.1).
                Event::Nmi => self.nmi_pending = true,
                Event::Init | Event::Sipi(_) => {
                    // Only application processors act on these once they run; the
                    // bootstrap processor takes INIT as a reset of itself.
                    if event == Event::Init {
                        self.cpu.reset();
                    }
                }
            }
        }
        self.bell.take_kick().then_some(Exit::Kicked)
    }

    /// Whether an external interrupt can be delivered now. Notes one that waits
    /// for IF, so that translated STI sees it.
    fn interrupt_ready(&mut self) -> bool {
        let pending = self.cpu.vm.irqchip.pending(self.cpu.id);
        let enabled = self.cpu.st.iflag != 0;
        let waits = u8::from(pending && !enabled);
        let cell = &self.cpu.tlb.block.shared().irq_wait;
        if cell.load(Ordering::Relaxed) != waits {
            cell.store(waits, Ordering::Relaxed);
        }
        pending && enabled && self.cpu.st.shadow == 0
    }

    fn deliver_nmi(&mut self) -> Option<Exit> {
        self.nmi_pending = false;
        self.cpu.st.halted = 0;
        self.cpu.counts.interrupts += 1;
        exception::nmi(&mut self.cpu).err().and_then(|stop| self.stopped(stop))
    }

    fn deliver_interrupt(&mut self) {
        let Some(vector) = self.cpu.vm.irqchip.accept(self.cpu.id) else { return };
        self.cpu.counts.interrupts += 1;
        self.cpu.st.halted = 0;
        if let Err(stop) = exception::interrupt(&mut self.cpu, vector) {
            // A stack in device memory: nothing sensible can be pushed there.
            self.shut_down |= !matches!(stop, Stop::Fault(_));
            if let Stop::Fault(fault) = stop {
                self.deliver(fault);
            }
        }
    }

    /// HLT: sleeps until an interrupt, a kick, or forever.
    fn sleep(&mut self) -> Option<Exit> {
        let pending = self.cpu.vm.irqchip.pending(self.cpu.id);
        if pending && self.cpu.st.iflag != 0 {
            self.cpu.st.halted = 0;
            return None;
        }
        if self.cpu.st.iflag == 0 {
            // Only an NMI could end this, and nothing here raises one by itself.
            return Some(Exit::Halt);
        }
        self.cpu.counts.halts += 1;
        let start = self.cpu.now_ns();
        let deadline = self.cpu.vm.irqchip.next_deadline(self.cpu.id);
        let timeout = deadline.map(|deadline| Duration::from_nanos(deadline.saturating_sub(start)));
        if timeout != Some(Duration::ZERO) {
            fpu::unload(&mut self.cpu.st);
            self.bell.sleep(timeout);
            fpu::load(&mut self.cpu.st);
        }
        let now = self.cpu.now_ns();
        self.cpu.counts.halted_ns += now - start;
        if deadline.is_some_and(|deadline| now >= deadline) {
            let tsc = self.cpu.tsc();
            self.cpu.vm.irqchip.run_timers(self.cpu.id, now, tsc);
        }
        None
    }

    /// Interprets one instruction.
    fn step(&mut self) -> Option<Exit> {
        match interp::step(&mut self.cpu) {
            Ok(()) => None,
            Err(stop) => self.stopped(stop),
        }
    }

    fn stopped(&mut self, stop: Stop) -> Option<Exit> {
        match stop {
            Stop::Fault(fault) => self.deliver(fault),
            Stop::Exit(exit) => {
                self.waiting = Some(exit);
                Some(exit)
            }
            Stop::Shutdown => {
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
        }
    }

    fn deliver(&mut self, fault: Fault) -> Option<Exit> {
        self.cpu.replay.clear();
        self.cpu.counts.exceptions += 1;
        if fault.vector == crate::fault::vector::PF {
            self.cpu.counts.page_faults += 1;
        }
        match exception::deliver(&mut self.cpu, fault) {
            Ok(()) => None,
            Err(Stop::Fault(_) | Stop::Shutdown) => {
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
            Err(stop) => self.stopped(stop),
        }
    }

    // --- translated code ---

    /// Where to enter translated code for RIP. `None`: to be interpreted.
    fn host_entry(&mut self) -> Result<Option<u64>, Fault> {
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
            return Err(Fault::with_error(crate::fault::vector::GP, 0));
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
        self.mark_code(physical, codemap::lines(offset as u64, in_first) | looked);
        if let Some(second) = second {
            let rest = u64::from(built.len) - in_first;
            self.mark_code(GuestPhys(second), codemap::lines(0, rest.max(1)));
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

    fn drop_written_code(&mut self) {
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
                    entry.target = if index == 0 { crate::block::INVALID_BRANCH_0 } else { 0 };
                }
            });
            for gone in retired {
                self.cpu.tlb.block.exec(gone.user)[exec_index(gone.linear)] = 0;
            }
            self.cpu.vm.code.clear(page);
        }
    }

    /// Runs translated code from `entry` until it leaves, and serves the leave.
    fn run_translated(&mut self, entry: u64) -> Result<Option<Exit>, EngineError> {
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
            exit_kind::BRANCH => {
                let target = self.cpu.st.address;
                if !canonical(target) {
                    let exit = translator.cache.lock().exits[self.cpu.st.site as usize];
                    return Ok(self.branch_to_nowhere(exit.rip));
                }
                self.continue_at(target, true);
                Ok(None)
            }
            exit_kind::REQUEST_BRANCH => {
                self.continue_at(self.cpu.st.address, true);
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

fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        if self.waiting.is_some_and(wants_value) && self.cpu.replay.unanswered() {
            return Err(EngineError::Refused("the last exit was not answered".into()));
        }
        if self.shut_down {
            return Ok(Exit::Shutdown);
        }
        self.waiting = None;
        if self.timer.as_ref().is_none_or(|timer| !timer.is_here()) {
            self.timer = None;
            let timer = HostTimer::new(&self.cpu.tlb.block);
            self.timer = Some(timer.map_err(|error| {
                EngineError::Unavailable(format!("the host gives no timer: {error}"))
            })?);
        }
        signals::thread_init();
        let start = rdtsc();
        // SAFETY: nothing else in a Rust or Python process uses GS on x86-64 Linux.
        unsafe { native::set_gs_base(self.cpu.tlb.block.base()) };
        fpu::load(&mut self.cpu.st);
        let result = self.run_inside();
        fpu::unload(&mut self.cpu.st);
        self.cpu.counts.run_tsc += rdtsc().wrapping_sub(start);
        if let Ok(exit) = result {
            self.waiting = Some(exit);
        }
        result
    }

    fn reply(&mut self, reply: Reply) {
        let value = match reply {
            Reply::Done => 0,
            Reply::Value(value) => value,
        };
        self.cpu.replay.answer(value);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.bell) as Arc<dyn Kick>
    }

    fn registers(&self) -> Registers {
        let st = &self.cpu.st;
        Registers { gpr: st.gpr, rip: st.rip, rflags: st.rflags() }
    }

    fn set_registers(&mut self, registers: &Registers) {
        let st = &mut self.cpu.st;
        st.gpr = registers.gpr;
        st.rip = registers.rip;
        st.set_rflags(registers.rflags);
        self.forget_progress();
    }

    fn system_registers(&self) -> SystemRegisters {
        let st = &self.cpu.st;
        SystemRegisters {
            es: st.seg[seg::ES],
            cs: st.seg[seg::CS],
            ss: st.seg[seg::SS],
            ds: st.seg[seg::DS],
            fs: st.seg[seg::FS],
            gs: st.seg[seg::GS],
            ldt: st.seg[seg::LDT],
            tr: st.seg[seg::TR],
            gdt: st.gdt,
            idt: st.idt,
            cr0: st.cr0,
            cr2: st.cr2,
            cr3: st.cr3,
            cr4: st.cr4,
            cr8: u64::from(self.cpu.vm.irqchip.cr8(self.cpu.id)),
            efer: st.efer,
            apic_base: self.cpu.vm.irqchip.apic_base(self.cpu.id),
        }
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), EngineError> {
        let st = &mut *self.cpu.st;
        st.seg = [
            registers.es,
            registers.cs,
            registers.ss,
            registers.ds,
            registers.fs,
            registers.gs,
            registers.ldt,
            registers.tr,
        ];
        st.gdt = registers.gdt;
        st.idt = registers.idt;
        st.cr0 = registers.cr0 | crate::state::cr::CR0_ET;
        st.cr2 = registers.cr2;
        st.cr3 = registers.cr3;
        st.cr4 = registers.cr4;
        st.efer = registers.efer;
        st.cpl = (registers.ss.attributes >> crate::state::attr::DPL_SHIFT & 3) as u8;
        let (id, irqchip) = (self.cpu.id, Arc::clone(&self.cpu.vm.irqchip));
        irqchip.set_cr8(id, registers.cr8 as u8);
        if registers.apic_base != irqchip.apic_base(id) {
            let (now, tsc) = (self.cpu.now_ns(), self.cpu.tsc());
            irqchip.apic_msr_write(id, 0x1B, registers.apic_base, now, tsc).map_err(|()| {
                EngineError::Refused(format!("APIC base {:#x} is not valid", registers.apic_base))
            })?;
        }
        self.forget_progress();
        Ok(())
    }

    fn xsave(&self) -> Vec<u8> {
        fpu::save_xsave(&self.cpu.st)
    }

    fn set_xsave(&mut self, image: &[u8]) -> Result<(), EngineError> {
        fpu::load_xsave(&mut self.cpu.st, image).map_err(EngineError::Refused)
    }

    fn msr(&mut self, index: u32) -> Option<u64> {
        msr::read(&mut self.cpu, index).ok()
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        msr::write(&mut self.cpu, index, value).is_ok()
    }

    fn peek(&mut self, linear: u64, data: &mut [u8]) -> usize {
        self.cpu.peek(linear, data)
    }

    fn counters(&self) -> Counters {
        let c = &self.cpu.counts;
        let ns = |tsc: u64| {
            (u128::from(tsc) * 1_000_000_000 / u128::from(self.cpu.vm.tsc_hz.max(1))) as u64
        };
        let cache_bytes =
            self.translator.as_ref().map_or(0, |t| t.cache.lock().used_bytes() as u64);
        vec![
            ("bt", "blocks", c.blocks),
            ("bt", "instructions_translated", c.instructions),
            ("bt", "code_bytes", cache_bytes),
            ("bt", "links", c.links),
            ("bt", "lookups", c.lookups),
            ("bt", "entries", c.entries),
            ("bt", "interpreted", c.interpreted),
            ("bt", "invalidated_pages", c.invalidations),
            ("bt", "cache_flushes", c.cache_flushes),
            ("bt", "tlb_misses", c.tlb_misses),
            ("bt", "tlb_flushes", self.cpu.tlb.flushes),
            ("bt", "slow_accesses", c.slow_accesses),
            ("bt", "exceptions", c.exceptions),
            ("bt", "page_faults", c.page_faults),
            ("bt", "interrupts", c.interrupts),
            ("bt", "halts", c.halts),
            ("time_ns", "halted", c.halted_ns),
            ("time_ns", "translating", ns(c.translate_tsc)),
            ("time_ns", "translated_code", ns(c.code_tsc)),
            ("time_ns", "engine", ns(c.run_tsc).saturating_sub(c.halted_ns)),
        ]
    }
}

impl BtVcpu {
    /// New registers: nothing of an instruction in progress counts any more.
    fn forget_progress(&mut self) {
        self.cpu.replay.clear();
        self.cpu.st.shadow = 0;
        self.cpu.st.halted = 0;
        self.shut_down = false;
        self.waiting = None;
        self.cpu.tlb.flush(true);
        self.cpu.update_mode();
    }
}

fn wants_value(exit: Exit) -> bool {
    matches!(exit, Exit::PortIn { .. } | Exit::MmioRead { .. })
}
