//! The run loop: translate, run, interpret, deliver, sleep.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use iced_x86::Instruction;
use parking_lot::Mutex;
use tetrarch_confine::{ThreadKind, enter_once};
use tetrarch_engine::{
    Counters, DebugStop, EngineError, Exit, GuestDebug, GuestFault, Halted, Kick, Registers, Reply,
    SystemRegisters, Trap, Unusable, Vcpu, VcpuState, host_tsc,
};
use tetrarch_memory::GuestPhys;

use crate::cpu::fpu;
use crate::cpu::msr;
use crate::cpu::x87_pointers::CodePlaces;
use crate::cpu::{Cpu, VmShared};
use crate::host::signals;
use crate::host::timer::HostTimer;
use crate::host::wake::Bell;
use crate::interp::exception;
use crate::interp::{self, Flow, thunk};
use crate::irqchip::{self, ProtectionFault};
use crate::journal::Journal;
use crate::memory::rendezvous::Orders;
use crate::state::fault::{Fault, Stop};
use crate::state::mode;
use crate::state::{reg, seg, shadow};
use crate::translate::cache::CodeCache;

mod access;
mod chaos;
mod journalled;
mod rest;
mod saved;
mod seek;
mod translator;

use access::{Access, Then};
use chaos::Chaos;
use journalled::Clocked;
use seek::Seeking;
pub use translator::CALLS;
use translator::Translator;

pub struct BtVcpu {
    cpu: Box<Cpu>,
    translator: Option<Translator>,
    bell: Arc<Bell>,
    timer: Option<HostTimer>,
    chaos: Option<Chaos>,
    /// What an answer of the machine goes to.
    unfinished: Unfinished,
    shut_down: bool,
    /// The vCPU's number among those that may be halted for good, and whether it has
    /// said that it is.
    number: usize,
    dead: bool,
    nmi_pending: bool,
    /// An event whose delivery waits for the machine's answer.
    delivering: Option<Interruption>,
    clocked: Clocked,
    seeking: Seeking,
}

/// How the code at RIP runs.
enum Tier<'a> {
    Interpret,
    Translate(&'a mut Translator),
}

/// An exit that has been handed out, and what its answer goes to.
#[derive(Clone, Copy)]
enum Unfinished {
    Nothing,
    /// The instruction, or the delivery of an event, starts again and finds the
    /// answer in [`Cpu::replay`].
    Replay,
    /// The same, with an answer that may be registers or a fault.
    Platform,
    Trap(Trap),
    /// Nothing, or an INT3 that is the guest's own.
    Debug,
    Access(Access),
    /// The answer is there: the next run begins with the end of the instruction.
    Answered(Access, u64),
}

/// What interrupts the guest.
#[derive(Clone, Copy)]
enum Interruption {
    Fault(Fault),
    Interrupt(u8),
    Nmi,
}

/// A vCPU inside [`Vcpu::run`]: who asks something of its tables waits for it, and the
/// host's FPU is its. Dropped, it is outside, also where a panic has ended the run.
struct Inside<'a>(&'a mut BtVcpu);

impl<'a> Inside<'a> {
    fn enter(vcpu: &'a mut BtVcpu) -> Self {
        vcpu.cpu.vm.rendezvous.enter(vcpu.cpu.id);
        Self(vcpu)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let cpu = &mut *self.0.cpu;
        fpu::leave(&mut cpu.st);
        cpu.vm.rendezvous.leave(cpu.id);
    }
}

impl<'a> Tier<'a> {
    fn of(translator: &'a mut Option<Translator>, cpu: &Cpu) -> Self {
        match translator {
            Some(translator) if cpu.st.mode & mode::TRANSLATE != 0 && cpu.st.shadow == 0 => {
                Self::Translate(translator)
            }
            _ => Self::Interpret,
        }
    }
}

impl BtVcpu {
    pub fn new(
        id: usize,
        shared: Arc<VmShared>,
        cache: Option<Arc<Mutex<CodeCache>>>,
    ) -> Result<Self, EngineError> {
        let no_memory =
            |error| Unusable::refused(&format!("no memory for vCPU {id}"), &error, "free some");
        let code = Arc::clone(&shared.code);
        let mut cpu = Box::new(Cpu::new(id, shared).map_err(no_memory)?);
        cpu.places = cache.clone().map(|cache| cache as Arc<dyn CodePlaces>);
        let bell = Arc::new(Bell::new(cpu.tlb.block.shared().clone()));
        let ring = Arc::clone(&bell);
        let listener = code.add_listener(Box::new(move || ring.ring()));
        let number = cpu.vm.halts.add();
        let chaos = cpu.vm.chaos.map(|seed| Chaos::new(seed, id));
        let translator = cache.map(|cache| Translator::new(cache, listener));
        signals::install();
        Ok(Self {
            cpu,
            translator,
            bell,
            timer: None,
            chaos,
            unfinished: Unfinished::Nothing,
            shut_down: false,
            number,
            dead: false,
            nmi_pending: false,
            delivering: None,
            clocked: Clocked::NOT,
            seeking: Seeking::NOT,
        })
    }

    pub fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    /// All of [`Vcpu::run`] that is done [`Inside`].
    fn enter_and_run(&mut self, now: u64) -> Result<Exit, EngineError> {
        self.serve();
        self.cpu.follow_memory();
        signals::look_again(now);
        // SAFETY: nothing else in a Rust or Python process uses GS on x86-64 Linux.
        unsafe { thunk::set_gs_base(self.cpu.tlb.block.base()) };
        self.take_outside()?;
        if let Unfinished::Answered(access, value) = self.unfinished {
            access.finish(&mut self.cpu, value);
            self.unfinished = Unfinished::Nothing;
        }
        fpu::enter(&mut self.cpu.st);
        self.cpu.return_to_guest();
        let result = self.run_to_exit();
        if matches!(result, Ok(Exit::Kicked)) {
            self.cpu.settle_eoi();
            self.cpu.leave_guest();
        }
        self.cpu.settle_x87_pointers();
        result
    }

    fn run_to_exit(&mut self) -> Result<Exit, EngineError> {
        loop {
            if let Some(exit) = self.take_turn()? {
                return Ok(exit);
            }
        }
    }

    /// One event, or guest code until something wants attention.
    #[inline]
    fn take_turn(&mut self) -> Result<Option<Exit>, EngineError> {
        let shared = self.cpu.tlb.block.shared();
        let wanted = shared.request.load(Ordering::Relaxed) != 0;
        if (wanted || self.cpu.st.count() >= self.clocked.next_stop)
            && let Some(exit) = self.attend()?
        {
            return Ok(Some(exit));
        }
        // What waits for an answer goes first: interrupts come at instruction
        // boundaries.
        if let Some(event) = self.delivering.take() {
            return Ok(self.enter_handler(event));
        }
        if self.cpu.replay.in_progress() {
            return Ok(self.step());
        }
        if self.cpu.st.pending_debug != 0 && self.cpu.st.shadow & shadow::MOV_SS == 0 {
            let causes = std::mem::take(&mut self.cpu.st.pending_debug);
            return Ok(self.deliver(Fault::debug(causes)));
        }
        let nmi_waits = self.nmi_pending && self.cpu.st.nmi_blocked == 0;
        if self.cpu.st.halted != 0 && !nmi_waits {
            return Ok(self.sleep());
        }
        if std::mem::take(&mut self.dead) {
            let halts = &self.cpu.vm.halts;
            halts.report(self.number, halts.round(), false);
        }
        let GuestDebug { step, block_interrupts, .. } = self.cpu.debugger;
        // One that ends HLT is needed.
        let blocked = step && block_interrupts && self.cpu.st.halted == 0;
        if nmi_waits && self.cpu.st.shadow == 0 && !blocked {
            return Ok(self.deliver_nmi());
        }
        if self.interrupt_ready() && !blocked {
            return Ok(self.deliver_interrupt());
        }
        self.run_code()
    }

    /// Runs guest code: translated until it leaves, or one instruction.
    #[inline]
    fn run_code(&mut self) -> Result<Option<Exit>, EngineError> {
        let mut deadline = self.cpu.vm.irqchip.next_deadline(self.cpu.id);
        if let Some(Chaos { next_ns, .. }) = self.chaos {
            deadline = Some(deadline.unwrap_or(u64::MAX).min(next_ns));
        }
        if let Some(timer) = &mut self.timer {
            let cpu = &self.cpu;
            timer.arm(deadline, || cpu.vm.clock.now_ns());
        }
        self.set_limit();
        let then = match Tier::of(&mut self.translator, &self.cpu) {
            _ if self.cpu.st.count() < self.clocked.interpret_until => Then::Interpret,
            Tier::Interpret => Then::Interpret,
            Tier::Translate(translator) => translator.run(&mut self.cpu)?,
        };
        Ok(match then {
            Then::Continue => None,
            Then::Limit(block) => {
                self.at_limit(block);
                None
            }
            Then::Interpret if self.cpu.breakpoints.is_empty() => self.step(),
            Then::Interpret => self.step_or_break(),
            Then::Execute(instruction) => self.execute(&instruction),
            Then::Raise(fault) => self.deliver(fault),
            Then::Ask(exit, access) => {
                self.unfinished = Unfinished::Access(access);
                Some(exit)
            }
        })
    }

    /// Does what others have asked of this vCPU's tables.
    fn serve(&mut self) {
        let id = self.cpu.id;
        if let Some((orders, number)) = self.cpu.vm.rendezvous.take(id) {
            self.obey(&orders);
            self.cpu.vm.rendezvous.done(id, number);
        }
        if self.cpu.vm.rendezvous.is_kept_out(id) {
            let vm = Arc::clone(&self.cpu.vm);
            vm.rendezvous.stand(id, |orders| self.obey(orders));
        }
    }

    fn obey(&mut self, orders: &Orders) {
        match &mut self.translator {
            Some(translator) => translator.obey(&mut self.cpu, orders),
            None => self.cpu.obey(orders),
        }
    }

    /// Serves what the request flag may stand for.
    fn attend(&mut self) -> Result<Option<Exit>, EngineError> {
        let in_progress = self.cpu.replay.in_progress() || self.delivering.is_some();
        let checkpoint = !in_progress && self.begin_stop();
        self.cpu.tlb.block.shared().request.store(0, Ordering::SeqCst);
        signals::look_again(host_tsc());
        if !in_progress && let Some(exit) = self.stand(checkpoint)? {
            return Ok(Some(exit));
        }
        self.serve();
        if let Some(translator) = &mut self.translator {
            translator.drop_written_code(&mut self.cpu);
        }
        if self.cpu.vm.journal.is_none()
            && let Some(deadline) = self.cpu.vm.irqchip.next_deadline(self.cpu.id)
        {
            let now = self.cpu.now_ns();
            if now >= deadline {
                let tsc = self.cpu.tsc();
                self.cpu.vm.irqchip.run_timers(self.cpu.id, now, tsc);
            }
            if let Some(timer) = &mut self.timer {
                timer.expired();
            }
        }
        if !in_progress {
            self.disturb();
        }
        if in_progress {
            // Events wait for the end of the instruction, kicks too.
            self.cpu.tlb.block.shared().request.store(1, Ordering::SeqCst);
            return Ok(None);
        }
        if self.cpu.vm.irqchip.has_event(self.cpu.id) {
            self.cpu.settle_eoi();
        }
        while let Some(event) = self.cpu.vm.irqchip.take_event(self.cpu.id) {
            match event {
                // One NMI is held while another is served (SDM 3A, 6.7.1).
                irqchip::Event::Nmi => self.nmi_pending = true,
                irqchip::Event::Init => {
                    self.nmi_pending = false;
                    self.cpu.init();
                }
                irqchip::Event::Sipi(page) => self.cpu.start_up(page),
            }
        }
        if let Some(exit) = self.arrive() {
            return Ok(Some(exit));
        }
        Ok(self.bell.take_kick().then_some(Exit::Kicked))
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
        self.enter_handler(Interruption::Nmi)
    }

    fn deliver_interrupt(&mut self) -> Option<Exit> {
        // What arrived a moment ago can be of a higher class than one that the guest has ended
        // by memory, which nobody would end at the local APIC later.
        self.cpu.settle_eoi();
        let vector = self.cpu.vm.irqchip.accept(self.cpu.id)?;
        self.cpu.counts.interrupts += 1;
        self.cpu.st.halted = 0;
        self.cpu.offer_quiet_eoi();
        self.cpu.update_steal_time();
        self.enter_handler(Interruption::Interrupt(vector))
    }

    /// Leads the guest into its handler. Where the way there goes through device
    /// memory, as with a stack in it, this is called again for each answer.
    fn enter_handler(&mut self, event: Interruption) -> Option<Exit> {
        self.cpu.replay.rewind();
        let result = match event {
            Interruption::Fault(fault) => exception::deliver(&mut self.cpu, fault),
            Interruption::Interrupt(vector) => exception::interrupt(&mut self.cpu, vector),
            Interruption::Nmi => exception::nmi(&mut self.cpu),
        };
        match result {
            Ok(()) => {
                self.cpu.st.count_one();
                self.stepped()
            }
            Err(Stop::Exit(exit)) => {
                self.delivering = Some(event);
                self.unfinished = Unfinished::Replay;
                Some(exit)
            }
            Err(Stop::Fault(_) | Stop::Alone | Stop::Shutdown) => {
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
        }
    }

    /// HLT: sleeps until an interrupt, a kick, or forever. An application processor
    /// that was not started has no halt to end.
    fn sleep(&mut self) -> Option<Exit> {
        let round = self.cpu.vm.halts.round();
        if self.cpu.vm.irqchip.waits_for_sipi(self.cpu.id) {
            return self.sleep_dead(round);
        }
        let pending = self.cpu.vm.irqchip.pending(self.cpu.id);
        if pending && self.cpu.st.iflag != 0 || self.cpu.vm.irqchip.take_unhalt(self.cpu.id) {
            self.cpu.st.halted = 0;
            self.cpu.st.count_one();
            return None;
        }
        if self.cpu.st.iflag == 0 {
            return self.sleep_dead(round);
        }
        self.cpu.counts.halts += 1;
        let start = self.cpu.vm.clock.now_ns();
        let deadline = self.cpu.vm.irqchip.next_deadline(self.cpu.id);
        let timeout = deadline.map(|deadline| Duration::from_nanos(deadline.saturating_sub(start)));
        let journalled = self.cpu.vm.journal.is_some();
        if !journalled && let Some(translator) = &mut self.translator {
            translator.rest(&mut self.cpu, start, timeout);
        }
        self.rest(timeout);
        let now = self.cpu.vm.clock.now_ns();
        self.cpu.counts.halted_ns += now - start;
        if journalled {
            // The next turn stands, and looks at the timers.
            self.cpu.tlb.block.shared().raise();
            return None;
        }
        if deadline.is_some_and(|deadline| now >= deadline) {
            let tsc = self.cpu.tsc();
            self.cpu.vm.irqchip.run_timers(self.cpu.id, now, tsc);
        }
        None
    }

    /// Sleeps where only another vCPU can end that; where none can, all have ended.
    fn sleep_dead(&mut self, round: u64) -> Option<Exit> {
        let vm = &self.cpu.vm;
        if vm.irqchip.has_event(self.cpu.id) {
            return None;
        }
        self.dead = true;
        match vm.halts.report(self.number, round, true) {
            Halted::ForGood => return Some(Exit::Halt),
            Halted::Perhaps => {
                vm.halts.next_round();
                vm.irqchip.wake_all();
            }
            Halted::Not => self.rest(None),
        }
        None
    }

    /// Gives the host's CPU away until the bell rings.
    fn rest(&mut self, timeout: Option<Duration>) {
        if timeout != Some(Duration::ZERO) {
            self.cpu.leave_guest();
            self.cpu.settle_x87_pointers();
            fpu::unload(&mut self.cpu.st);
            self.cpu.vm.rendezvous.leave(self.cpu.id);
            match self.cpu.vm.journal.as_deref() {
                Some(Journal::Record(recorder)) => recorder.asleep(|| self.bell.sleep(timeout)),
                // What ended the rest is due at once.
                Some(Journal::Replay(_)) => {}
                None => self.bell.sleep(timeout),
            }
            self.cpu.vm.rendezvous.enter(self.cpu.id);
            self.serve();
            self.cpu.return_to_guest();
        }
    }

    /// Interprets one instruction.
    fn step(&mut self) -> Option<Exit> {
        match interp::step(&mut self.cpu) {
            Ok(()) => self.stepped(),
            Err(stop) => self.stopped(stop),
        }
    }

    /// Interprets one instruction, unless there is a breakpoint of a replay before it.
    #[cold]
    fn step_or_break(&mut self) -> Option<Exit> {
        if self.cpu.st.count() >= self.clocked.next_stop {
            // Where no breakpoint is, code that is translated begins here, and stands.
            return None;
        }
        if let Some(exit) = self.meet_breakpoint() {
            return Some(exit);
        }
        let (rip, count) = (self.cpu.st.rip, self.cpu.st.count());
        let exit = self.step();
        self.go_on_within(rip, count);
        exit
    }

    /// Interprets the instruction at RIP, which is known.
    fn execute(&mut self, instruction: &Instruction) -> Option<Exit> {
        match interp::step_decoded(&mut self.cpu, instruction) {
            Ok(()) => self.stepped(),
            Err(stop) => self.stopped(stop),
        }
    }

    /// Interprets one instruction while all other vCPUs stand.
    #[cold]
    fn step_alone(&mut self) -> Option<Exit> {
        let vm = Arc::clone(&self.cpu.vm);
        let alone = vm.rendezvous.alone(self.cpu.id, |orders| self.obey(orders));
        self.cpu.alone = true;
        let result = interp::step(&mut self.cpu);
        self.cpu.alone = false;
        drop(alone);
        match result {
            Ok(()) => self.stepped(),
            Err(stop) => self.stopped(stop),
        }
    }

    /// The end of what the debugger calls a step.
    #[inline]
    fn stepped(&mut self) -> Option<Exit> {
        self.cpu.debugger.step.then(|| {
            self.unfinished = Unfinished::Debug;
            Exit::Debug(DebugStop::Step)
        })
    }

    fn stopped(&mut self, stop: Stop) -> Option<Exit> {
        match stop {
            Stop::Fault(fault) => self.deliver(fault),
            Stop::Exit(Exit::Debug(stop)) if !self.is_told(stop) => None,
            Stop::Exit(exit) => {
                self.unfinished = match exit {
                    Exit::Trap(trap) => Unfinished::Trap(trap),
                    Exit::Debug(_) => Unfinished::Debug,
                    Exit::Hypercall { .. }
                    | Exit::MsrRead { .. }
                    | Exit::MsrWrite { .. }
                    | Exit::PortWithRegisters { .. } => Unfinished::Platform,
                    _ => Unfinished::Replay,
                };
                Some(exit)
            }
            Stop::Alone => self.step_alone(),
            Stop::Shutdown => {
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
        }
    }

    fn deliver(&mut self, fault: Fault) -> Option<Exit> {
        self.cpu.replay.clear();
        if self.cpu.st.cpl == 3 && self.cpu.vm.platform.traps.exception(fault.vector) {
            let Fault { vector, error, address } = fault;
            return self.trap(Trap::Exception(GuestFault { vector, error, address }));
        }
        self.cpu.counts.exceptions += 1;
        if fault.vector == crate::state::fault::vector::PF {
            self.cpu.counts.page_faults += 1;
        }
        self.enter_handler(Interruption::Fault(fault))
    }
}

/// Events of a deprivileged guest, which the platform takes.
impl BtVcpu {
    fn trap(&mut self, trap: Trap) -> Option<Exit> {
        self.unfinished = Unfinished::Trap(trap);
        Some(Exit::Trap(trap))
    }

    fn trap_answered(&mut self, trap: Trap, reply: Reply) {
        let cpu = &mut self.cpu;
        if let Trap::Syscall { next } = trap {
            let put = |cpu: &mut Cpu, value| cpu.st.gpr[reg::RAX] = value;
            match interp::platform::complete(cpu, reply, put) {
                Ok(Flow::Next) => cpu.st.rip = next,
                Ok(Flow::Jump) => {}
                Err(Stop::Fault(fault)) => self.delivering = Some(Interruption::Fault(fault)),
                Err(Stop::Exit(_) | Stop::Alone | Stop::Shutdown) => {}
            }
            return;
        }
        match reply {
            Reply::Done | Reply::Value(_) => {}
            Reply::Registers(registers) => {
                interp::platform::replace(cpu, &registers);
            }
            Reply::Fault(fault) => self.delivering = Some(Interruption::Fault(fault.into())),
        }
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        if !matches!(self.unfinished, Unfinished::Nothing | Unfinished::Answered(..)) {
            return Err(EngineError::Refused("the last exit was not answered".into()));
        }
        if self.shut_down {
            return Ok(Exit::Shutdown);
        }
        if self.timer.as_ref().is_none_or(|timer| !timer.is_here()) {
            self.timer = None;
            self.cpu.kvm.steal_time.thread_changed();
            let timer = HostTimer::new(self.cpu.tlb.block.shared());
            self.timer = Some(timer.map_err(|error| {
                // timer_create(2): EAGAIN, where RLIMIT_SIGPENDING counts its signal.
                let raise = "raise the limit of pending signals: ulimit -i";
                Unusable::refused("the host gives no timer", &error, raise)
            })?);
            signals::thread_init();
            enter_once(ThreadKind::VcpuBt);
        }
        self.cpu.update_tsc_offset();
        let start = host_tsc();
        let result = match self.cpu.vm.journal.clone() {
            None => Inside::enter(self).0.enter_and_run(start),
            Some(journal) => self.run_journalled(&journal, start),
        };
        self.cpu.counts.run_tsc += host_tsc().wrapping_sub(start);
        result
    }

    fn reply(&mut self, reply: Reply) {
        let reply = self.journalled_answer(reply);
        let value = match reply {
            Reply::Value(value) => value,
            Reply::Done | Reply::Registers(_) | Reply::Fault(_) => 0,
        };
        match std::mem::replace(&mut self.unfinished, Unfinished::Nothing) {
            Unfinished::Nothing => {}
            Unfinished::Replay => self.cpu.replay.answer(value),
            Unfinished::Platform => self.cpu.replay.answer_platform(reply),
            Unfinished::Debug => {
                if let Reply::Fault(_) = reply {
                    self.cpu.replay.answer_platform(reply);
                }
            }
            Unfinished::Trap(trap) => self.trap_answered(trap, reply),
            Unfinished::Access(access) | Unfinished::Answered(access, _) => {
                self.unfinished = Unfinished::Answered(access, value);
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.bell) as Arc<dyn Kick>
    }

    fn registers(&mut self) -> Result<Registers, EngineError> {
        let st = &self.cpu.st;
        Ok(Registers { gpr: st.gpr, rip: st.rip, rflags: st.rflags() })
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), EngineError> {
        let st = &mut self.cpu.st;
        st.gpr = registers.gpr;
        st.rip = registers.rip;
        st.set_rflags(registers.rflags);
        self.forget_progress();
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, EngineError> {
        let st = &self.cpu.st;
        Ok(SystemRegisters {
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
        })
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
            irqchip.apic_msr_write(id, 0x1B, registers.apic_base, now, tsc).map_err(
                |ProtectionFault| {
                    EngineError::Refused(format!(
                        "APIC base {:#x} is not valid",
                        registers.apic_base
                    ))
                },
            )?;
        }
        self.forget_progress();
        Ok(())
    }

    fn xsave(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(fpu::save_xsave(&self.cpu.st))
    }

    fn set_xsave(&mut self, image: &[u8]) -> Result<(), EngineError> {
        fpu::load_xsave(&mut self.cpu.st, image)
            .map_err(|error| EngineError::Refused(error.to_string()))
    }

    fn msr(&mut self, index: u32) -> Result<Option<u64>, EngineError> {
        Ok(msr::read(&mut self.cpu, index).ok())
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<bool, EngineError> {
        Ok(msr::write(&mut self.cpu, index, value).is_ok())
    }

    fn peek(&mut self, linear: u64, data: &mut [u8]) -> usize {
        self.cpu.peek(linear, data)
    }

    fn translate(&mut self, linear: u64) -> Option<GuestPhys> {
        self.cpu.peek_walk(linear)
    }

    fn access(&mut self, linear: u64, write: bool) -> Result<GuestPhys, GuestFault> {
        self.cpu.access(linear, write)
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<(), EngineError> {
        self.cpu.debugger = *debug;
        self.cpu.update_mode();
        Ok(())
    }

    fn counters(&self) -> Counters {
        let c = &self.cpu.counts;
        let ns = |tsc: u64| {
            (u128::from(tsc) * 1_000_000_000 / u128::from(self.cpu.vm.tsc_hz.max(1))) as u64
        };
        let cache_bytes = self.translator.as_ref().map_or(0, Translator::used_bytes);
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
            ("bt", "quiet_eois", c.quiet_eois),
            ("bt", "halts", c.halts),
            ("time_ns", "halted", c.halted_ns),
            ("time_ns", "translating", ns(c.translate_tsc)),
            ("time_ns", "translated_code", ns(c.code_tsc)),
            ("time_ns", "engine", ns(c.run_tsc).saturating_sub(c.halted_ns)),
        ]
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        self.saved()
    }

    fn load(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.take_up(state)
    }

    fn set_present(&mut self, present: bool) {
        let vm = &self.cpu.vm;
        vm.halts.set_present(self.number, present);
        vm.irqchip.wake_all();
    }
}

impl BtVcpu {
    /// New registers: nothing of an instruction in progress counts any more.
    fn forget_progress(&mut self) {
        self.cpu.replay.clear();
        self.cpu.st.shadow = 0;
        self.cpu.st.pending_debug = 0;
        self.cpu.st.halted = u8::from(self.cpu.vm.irqchip.waits_for_sipi(self.cpu.id));
        self.shut_down = false;
        self.delivering = None;
        // The handler of a trap may set registers before it answers.
        if !matches!(self.unfinished, Unfinished::Trap(_)) {
            self.unfinished = Unfinished::Nothing;
        }
        self.cpu.tlb.flush(true);
        self.cpu.update_mode();
    }
}

#[cfg(test)]
mod interrupt_tests;
