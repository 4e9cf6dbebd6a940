//! A vCPU of a machine that records or replays; see [`crate::journal`].

use std::sync::Arc;

use tetrarch_engine::{DirtyPages, EngineError, Exit, ReplayStop, Saved, Vcpu, VcpuState, VmState};
use tetrarch_journal::{Bytes, Checkpoint, Line, Outside, Start, Stop};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::{BtVcpu, Inside, Unfinished};
use crate::cpu::fpu;
use crate::journal::player::{Due, astray};
use crate::journal::{Counting, Journal, Player, Recorder};
use crate::state::reg;

/// What a vCPU keeps of it.
pub struct Clocked {
    begun: bool,
    /// The count from which on the run loop stands: where something is due in a replay, at the
    /// next checkpoint in a recording.
    pub next_stop: u64,
    /// The block that begins at the limit is run all the same, and no further one.
    pass: u8,
    /// Up to here nothing runs but the interpreter.
    pub interpret_until: u64,
    /// The recording has no answer for an exit: it ends there.
    ended: bool,
}

impl Clocked {
    pub const NOT: Self =
        Self { begun: false, next_stop: u64::MAX, pass: 0, interpret_until: 0, ended: false };

    /// The machine is somewhere else.
    pub fn begin_anew(&mut self) {
        *self = Self { begun: self.begun, ..Self::NOT };
    }
}

/// The guest's code runs, in the sense of the journal; also where a panic ends that.
struct InJournal<'a>(&'a Journal, &'a mut BtVcpu);

impl Drop for InJournal<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1.cpu.st.count());
    }
}

/// Exits that a replay shows to the machine for their effect: what the guest says on its serial
/// line. The answer is the recording's nonetheless.
fn is_shown(exit: &Exit) -> bool {
    matches!(exit, Exit::PortOut { port: 0x3F8..=0x3FF, .. })
}

impl BtVcpu {
    /// [`Vcpu::run`] of such a machine.
    pub(super) fn run_journalled(
        &mut self,
        journal: &Arc<Journal>,
        start: u64,
    ) -> Result<Exit, EngineError> {
        if !self.clocked.begun {
            // No device works meanwhile.
            journal.enter();
            let inside = InJournal(journal, self);
            inside.1.begin(journal)?;
            drop(inside);
            self.clocked.begun = true;
            self.cpu.tlb.block.shared().raise();
        }
        loop {
            journal.enter();
            let inside = InJournal(journal, self);
            let exit = {
                let vcpu = Inside::enter(inside.1);
                vcpu.0.follow_wishes(journal)?;
                if vcpu.0.clocked.ended { vcpu.0.end() } else { vcpu.0.enter_and_run(start)? }
            };
            drop(inside);
            let asks = !matches!(exit, Exit::Halt | Exit::Shutdown | Exit::Kicked | Exit::Debug(_));
            let shown = is_shown(&exit) && !self.seeks();
            if matches!(**journal, Journal::Record(_)) || !asks || shown {
                return Ok(exit);
            }
            self.reply(tetrarch_engine::Reply::Done);
        }
    }

    /// The recording ends, and the machine with it, if nobody goes back.
    fn end(&mut self) -> Exit {
        if self.seeking.stay {
            return self.stop_replay(ReplayStop::End);
        }
        self.clocked.ended = true;
        Exit::Halt
    }

    pub(super) fn set_next_stop(&mut self, player: &Player) {
        self.clocked.next_stop = player.next_count().min(self.seeking.target);
    }

    /// The answer that counts, as it is told to the journal.
    pub(super) fn journalled_answer(
        &mut self,
        reply: tetrarch_engine::Reply,
    ) -> tetrarch_engine::Reply {
        let Some(journal) = &self.cpu.vm.journal else { return reply };
        match (&**journal, self.unfinished) {
            (_, Unfinished::Nothing | Unfinished::Debug) => reply,
            (Journal::Record(recorder), _) => {
                recorder.answer(&reply);
                reply
            }
            (Journal::Replay(player), _) => player.answer().unwrap_or_else(|| {
                self.clocked.ended = true;
                reply
            }),
        }
    }

    /// The machine begins with what it is now, or was in the recording: both sides load it, so
    /// that nothing is of before.
    fn begin(&mut self, journal: &Journal) -> Result<(), EngineError> {
        let vm = Arc::clone(&self.cpu.vm);
        let cpuid = self.cpuid_sum();
        let (state, vcpu) = match journal {
            Journal::Record(recorder) => {
                let (ns, tsc) = (vm.clock.now_ns(), vm.clock.tsc());
                let state = VmState {
                    vcpus: 1,
                    clock_ns: ns,
                    kvmclock_ns: vm.kvm_time.clock_ns(ns, tsc),
                    tsc_hz: vm.tsc_hz,
                    chipset: vm.irqchip.chipset(),
                };
                let vcpu = self.saved()?;
                let start = Start {
                    cpuid,
                    tsc_hz: vm.tsc_hz,
                    ram: vm.memory.regions().iter().map(|r| (r.start.0, r.len)).collect(),
                    vm: Bytes::from(state.to_bytes()?),
                    vcpu: Bytes::from(vcpu.to_bytes()?),
                };
                recorder.start(start, &vm.memory)?;
                self.clocked.next_stop = recorder.checkpoint_every;
                (state, vcpu)
            }
            Journal::Replay(player) => {
                let start = player.take_start(&vm.memory)?;
                if start.cpuid != cpuid {
                    return Err(EngineError::Refused(
                        "the recording is of a host with another CPU".into(),
                    )
                    .mended_by("replay it where it was recorded"));
                }
                (VmState::from_bytes(&start.vm)?, VcpuState::from_bytes(&start.vcpu)?)
            }
        };
        vm.dirty.set(&vm.memory, true);
        self.cpu.st.clear_count();
        vm.irqchip.set_chipset(&state.chipset).map_err(|what| {
            EngineError::Refused(format!("engine bt cannot take up these chips: {what}"))
        })?;
        let tsc = journal.value(|| vm.clock.tsc());
        vm.kvm_time.set(state.kvmclock_ns, tsc);
        self.take_up(&vcpu)?;
        if let Journal::Replay(player) = journal {
            self.keep_start(player);
            self.set_next_stop(player);
        }
        Ok(())
    }

    /// A sum of what kind of CPU the guest finds.
    fn cpuid_sum(&self) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        for leaf in [0, 1, 7, 0x8000_0001, 0x8000_0002, 0x8000_0003, 0x8000_0004] {
            let [eax, ebx, mut ecx, mut edx] = self.cpu.cpuid(leaf, 0);
            match leaf {
                // OSXSAVE, and the local APIC: what the guest has switched on.
                1 => (ecx, edx) = (ecx & !(1 << 27), edx & !(1 << 9)),
                // OSPKE.
                7 => ecx &= !(1 << 4),
                // The local APIC once more, and SYSCALL.
                0x8000_0001 => edx &= !(1 << 9 | 1 << 11),
                _ => {}
            }
            for register in [eax, ebx, ecx, edx] {
                sum.update(&register.to_le_bytes());
            }
        }
        sum.finalize()
    }

    /// Before the end of an instruction whose answer is there: what came with it.
    pub(super) fn take_outside(&mut self) -> Result<(), EngineError> {
        let Some(journal) = self.cpu.vm.journal.clone() else { return Ok(()) };
        let answered = matches!(self.unfinished, Unfinished::Answered(..));
        if !answered && !self.cpu.replay.in_progress() {
            if matches!(&*journal, Journal::Record(recorder) if recorder.has_outside()) {
                self.cpu.tlb.block.shared().raise();
            }
            return Ok(());
        }
        let vm = Arc::clone(&self.cpu.vm);
        match &*journal {
            Journal::Record(recorder) => {
                if recorder.has_outside() {
                    let outside = recorder.take_outside(&vm.memory, vm.clock.now_ns())?;
                    self.drive(&outside);
                    recorder.put_outside(outside);
                }
            }
            Journal::Replay(player) => {
                if let Some(outside) = player.take_outside() {
                    write(&vm.memory, &outside)?;
                    self.drive(&outside);
                }
            }
        }
        Ok(())
    }

    fn drive(&self, outside: &Outside) {
        let irqchip = &self.cpu.vm.irqchip;
        for line in &outside.lines {
            match *line {
                Line::Pin { gsi, level } => irqchip.irq_line(gsi, level, outside.now_ns),
                Line::Message { address, data } => irqchip.msi(address, data),
            }
        }
    }

    /// Begins to attend. Returns whether a checkpoint is due.
    pub(super) fn begin_stop(&mut self) -> bool {
        let Some(Journal::Record(recorder)) = self.cpu.vm.journal.as_deref() else { return false };
        let count = self.cpu.st.count();
        let due = count >= self.clocked.next_stop;
        if due {
            self.clocked.next_stop = count.saturating_add(recorder.checkpoint_every);
        }
        due
    }

    /// The guest stands between two instructions, and what is due comes to it. An exit ends the
    /// replay.
    pub(super) fn stand(&mut self, checkpoint: bool) -> Result<Option<Exit>, EngineError> {
        match self.cpu.vm.journal.clone().as_deref() {
            None => Ok(None),
            Some(Journal::Record(recorder)) => {
                self.record_stop(recorder, checkpoint)?;
                Ok(None)
            }
            Some(Journal::Replay(player)) => {
                // Where nothing was run between them, there are several at a count.
                while let Some(due) = player.due(self.cpu.st.count())? {
                    let Due::Stop(stop) = due else { return Ok(Some(self.end())) };
                    self.replay_stop(player, stop)?;
                }
                self.set_next_stop(player);
                Ok(None)
            }
        }
    }

    fn record_stop(&mut self, recorder: &Recorder, checkpoint: bool) -> Result<(), EngineError> {
        recorder.stand();
        let vm = Arc::clone(&self.cpu.vm);
        let now = vm.clock.now_ns();
        let outside = recorder.take_outside(&vm.memory, now)?;
        self.drive(&outside);
        let mut timers = None;
        if let Some(deadline) = vm.irqchip.next_deadline(self.cpu.id) {
            if now >= deadline {
                let tsc = self.cpu.host_tsc();
                timers = Some((now, tsc));
                vm.irqchip.run_timers(self.cpu.id, now, tsc);
            }
            if let Some(timer) = &mut self.timer {
                timer.expired();
            }
        }
        let checkpoint =
            if checkpoint { Some(self.checkpoint(|| recorder.pages())?.0) } else { None };
        recorder.put_stop(Stop { count: self.cpu.st.count(), outside, timers, checkpoint })
    }

    fn replay_stop(&mut self, player: &Player, stop: Stop) -> Result<(), EngineError> {
        let vm = Arc::clone(&self.cpu.vm);
        write(&vm.memory, &stop.outside)?;
        self.drive(&stop.outside);
        if let Some((now, tsc)) = stop.timers {
            vm.irqchip.run_timers(self.cpu.id, now, tsc);
        }
        if let Some(recorded) = stop.checkpoint {
            let (found, written) = self.checkpoint(|| player.pages())?;
            if let Some(what) = difference(&recorded, &found)? {
                return Err(astray(stop.count, &what));
            }
            player.passed_checkpoint();
            self.keep_image(player, &written)?;
        }
        Ok(())
    }

    /// What the machine is now, and which pages were written since it was asked last. From here
    /// on nothing of before is in the vCPU's tables.
    fn checkpoint<'a>(
        &mut self,
        pages: impl Fn() -> &'a parking_lot::Mutex<crate::journal::Pages>,
    ) -> Result<(Checkpoint, Vec<DirtyPages>), EngineError> {
        let vm = Arc::clone(&self.cpu.vm);
        self.cpu.settle_x87_pointers();
        fpu::unload(&mut self.cpu.st);
        let written = self.take_written();
        self.cpu.tlb.flush(true);
        let mut pages = pages().lock();
        let seen = pages.look_at(&vm.memory, &written)?;
        let state = VmState {
            vcpus: 1,
            clock_ns: 0,
            kvmclock_ns: 0,
            tsc_hz: vm.tsc_hz,
            chipset: vm.irqchip.chipset(),
        };
        let checkpoint = Checkpoint {
            vm: Bytes::from(state.to_bytes()?),
            vcpu: Bytes::from(self.saved()?.to_bytes()?),
            memory: pages.total(),
            pages: seen,
        };
        Ok((checkpoint, written))
    }

    /// Before code runs: how far.
    #[inline]
    pub(super) fn set_limit(&mut self) {
        if self.cpu.vm.journal.is_none() {
            return;
        }
        let limit = match std::mem::take(&mut self.clocked.pass) {
            0 => self.clocked.next_stop,
            block => self.cpu.st.count() + u64::from(block),
        };
        self.cpu.st.set_count_limit(limit);
    }

    /// Code has come to a block of so many instructions in which the limit lies.
    pub(super) fn at_limit(&mut self, block: u8) {
        match self.cpu.vm.journal.as_deref() {
            // A stop within the block was where it left by itself, as it will again: the
            // recording stood at no other place than this or that.
            Some(Journal::Replay(_)) if self.cpu.st.count() < self.clocked.next_stop => {
                if self.cpu.counting == Counting::Sought {
                    self.clocked.interpret_until = self.clocked.next_stop;
                } else {
                    self.clocked.pass = block;
                }
            }
            // A checkpoint is made where the block begins, not in it.
            _ => self.clocked.next_stop = self.cpu.st.count(),
        }
    }
}

/// What devices wrote, as a device would.
fn write(memory: &GuestMemory, outside: &Outside) -> Result<(), EngineError> {
    for &(address, length) in &outside.holes {
        // Whole pages or not, and whether or not this thread may call for it, they are zeroes.
        let zeroes = vec![0; length as usize];
        memory.write(GuestPhys(address), &zeroes)?;
    }
    for (address, data) in &outside.writes {
        memory.write(GuestPhys(*address), data)?;
    }
    Ok(())
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const _: () = assert!(reg::RDI == 7);

/// What differs first between two machines.
fn difference(recorded: &Checkpoint, found: &Checkpoint) -> Result<Option<String>, EngineError> {
    if recorded.vcpu != found.vcpu {
        let was = VcpuState::from_bytes(&recorded.vcpu)?;
        let is = VcpuState::from_bytes(&found.vcpu)?;
        return Ok(Some(register_difference(&was, &is)));
    }
    if recorded.vm != found.vm {
        return Ok(Some("the interrupt controllers differ".into()));
    }
    if recorded.memory == found.memory && recorded.pages == found.pages {
        return Ok(None);
    }
    let differ = recorded.pages.iter().zip(&found.pages).find(|(was, is)| was != is);
    let page = match differ {
        Some((was, is)) => was.0.min(is.0),
        None => {
            let shorter = recorded.pages.len().min(found.pages.len());
            let more = recorded.pages.get(shorter).or(found.pages.get(shorter));
            more.map_or(0, |page| page.0)
        }
    };
    Ok(Some(format!("the page at {:#x} differs", page << 12)))
}

fn register_difference(was: &VcpuState, is: &VcpuState) -> String {
    let (a, b) = (&was.registers, &is.registers);
    let named = NAMES.iter().copied().zip(a.gpr.iter().copied().zip(b.gpr));
    let others =
        [("rip", (a.rip, b.rip)), ("rflags", (a.rflags, b.rflags)), ("tsc", (was.tsc, is.tsc))];
    for (name, (was, is)) in others.into_iter().chain(named) {
        if was != is {
            return format!("{name} is {is:#x}, it was {was:#x}");
        }
    }
    if let Some((was, is)) = was.msrs.iter().zip(&is.msrs).find(|(was, is)| was != is) {
        return format!("MSR {:#x} is {:#x}, it was {:#x}", is.0, is.1, was.1);
    }
    let parts = [
        ("the segment or control registers differ", was.system != is.system),
        ("the x87 or vector registers differ", was.xsave != is.xsave),
        ("the debug registers differ", was.debug != is.debug),
        ("the local APIC differs", was.lapic != is.lapic),
        ("waiting events differ", was.events != is.events),
    ];
    let part = parts.into_iter().find(|(_, differs)| *differs);
    part.map_or("what the CPU is about differs", |(what, _)| what).into()
}
