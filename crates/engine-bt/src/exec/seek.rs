//! A vCPU of a replay that goes back and forth: by images of the machine, and from there by
//! running, which is the same each time.

use std::collections::BTreeSet;
use std::sync::Arc;

use tetrarch_engine::{DebugStop, DirtyPages, EngineError, Exit, Met, Passed, ReplayStop, Seek};
use tetrarch_memory::{GuestPhys, PAGE_SHIFT, PAGE_SIZE};

use super::{BtVcpu, Interruption, Unfinished};
use crate::interp::debug::linear_rip;
use crate::irqchip;
use crate::journal::images::Images;
use crate::journal::player::Wishes;
use crate::journal::{Counting, Journal, Player};
use crate::kvm::Paravirtual;
use crate::state::CpuState;
use crate::state::msrs::MsrFile;

/// Where the machine stands between two instructions, beside its memory.
pub struct Image {
    st: Box<CpuState>,
    msrs: MsrFile,
    kvm: Paravirtual,
    tsc_base: u64,
    irqchip: irqchip::Copied,
    nmi_pending: bool,
    delivering: Option<Interruption>,
    shut_down: bool,
    dead: bool,
}

/// Beyond all counts.
const NOWHERE: u64 = u64::MAX;

/// What a vCPU of a replay keeps of it.
pub struct Seeking {
    images: Option<Images<Image>>,
    /// Where the machine is to stand, or [`NOWHERE`].
    pub target: u64,
    noted_before: u64,
    /// The count at which a breakpoint was told, or noted: it is passed there.
    told: u64,
    pub stay: bool,
}

impl Seeking {
    pub const NOT: Self =
        Self { images: None, target: NOWHERE, noted_before: 0, told: u64::MAX, stay: false };
}

fn numbers(written: &[DirtyPages]) -> impl Iterator<Item = u64> + '_ {
    written.iter().flat_map(DirtyPages::addresses).map(GuestPhys::page)
}

impl BtVcpu {
    /// The replay is at its start.
    pub(super) fn keep_start(&mut self, player: &Player) {
        self.seeking.images = Some(Images::new(self.image(), player.mark()));
    }

    /// The replay is at a checkpoint, with these pages written since the last.
    pub(super) fn keep_image(
        &mut self,
        player: &Player,
        written: &[DirtyPages],
    ) -> Result<(), EngineError> {
        let Some(mut images) = self.seeking.images.take() else { return Ok(()) };
        let (vm, count) = (Arc::clone(&self.cpu.vm), self.cpu.st.count());
        let result =
            images.add(count, &vm.memory, numbers(written), || (self.image(), player.mark()));
        self.seeking.images = Some(images);
        result
    }

    fn image(&self) -> Image {
        let cpu = &self.cpu;
        Image {
            st: Box::new((*cpu.st).clone()),
            msrs: cpu.msrs.clone(),
            kvm: cpu.kvm.copied(),
            tsc_base: cpu.tsc_base(),
            irqchip: cpu.vm.irqchip.copied(),
            nmi_pending: self.nmi_pending,
            delivering: self.delivering,
            shut_down: self.shut_down,
            dead: self.dead,
        }
    }

    /// Does what a debugger wants, before the guest runs on.
    pub(super) fn follow_wishes(&mut self, journal: &Journal) -> Result<(), EngineError> {
        let Journal::Replay(player) = journal else { return Ok(()) };
        let Wishes { seek, breakpoints, stay } = player.take_wishes();
        self.seeking.stay = stay;
        self.set_breakpoints(breakpoints);
        match seek {
            None => {}
            Some(None) => {
                self.seeking.target = NOWHERE;
                self.set_next_stop(player);
            }
            Some(Some(seek)) => self.begin_seek(player, seek)?,
        }
        Ok(())
    }

    fn set_breakpoints(&mut self, breakpoints: Arc<BTreeSet<u64>>) {
        if Arc::ptr_eq(&breakpoints, &self.cpu.breakpoints) {
            return;
        }
        if !breakpoints.is_empty() {
            self.cpu.counting = Counting::Sought;
        }
        self.cpu.breakpoints = breakpoints;
        self.translate_anew();
    }

    fn translate_anew(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.clear_cache(&mut self.cpu);
        }
    }

    fn begin_seek(&mut self, player: &Player, seek: Seek) -> Result<(), EngineError> {
        let Seek { count, from, noted_before } = seek;
        let latest = count.min(from);
        let now = self.cpu.st.count();
        if let Some(images) = &self.seeking.images {
            let index = images.latest(latest);
            if now > latest || images.get(index).count > now {
                self.go_to_image(player, index)?;
            }
        }
        player.set_passed(Passed { began: self.cpu.st.count(), last_met: None });
        if self.cpu.counting != Counting::Sought {
            self.cpu.counting = Counting::Sought;
            self.translate_anew();
        }
        self.seeking.target = count.min(NOWHERE - 1);
        self.seeking.noted_before = noted_before;
        self.set_next_stop(player);
        self.cpu.tlb.block.shared().raise();
        Ok(())
    }

    fn go_to_image(&mut self, player: &Player, index: usize) -> Result<(), EngineError> {
        let Some(mut images) = self.seeking.images.take() else { return Ok(()) };
        let result = self.put_back(player, &images, index);
        images.went(index);
        self.seeking.images = Some(images);
        result
    }

    fn put_back(
        &mut self,
        player: &Player,
        images: &Images<Image>,
        index: usize,
    ) -> Result<(), EngineError> {
        let written = self.take_written();
        self.put_memory_back(player, images, index, images.changed(index, numbers(&written)))?;
        // What was put there counts as written.
        self.take_written();
        let image = images.get(index);
        player.go(&image.mark);
        let Image { st, msrs, kvm, tsc_base, irqchip, .. } = &image.machine;
        self.put_state_back(st);
        let cpu = &mut *self.cpu;
        cpu.msrs = msrs.clone();
        cpu.kvm = kvm.copied();
        cpu.set_tsc_base(*tsc_base);
        cpu.vm.irqchip.put_back(irqchip);
        cpu.replay.clear();
        cpu.tlb.flush(true);
        cpu.update_mode();
        let Image { nmi_pending, delivering, shut_down, dead, .. } = image.machine;
        (self.nmi_pending, self.delivering) = (nmi_pending, delivering);
        (self.shut_down, self.dead) = (shut_down, dead);
        self.unfinished = Unfinished::Nothing;
        self.clocked.begin_anew();
        self.seeking.told = u64::MAX;
        Ok(())
    }

    fn put_memory_back(
        &self,
        player: &Player,
        images: &Images<Image>,
        index: usize,
        mut changed: BTreeSet<u64>,
    ) -> Result<(), EngineError> {
        let memory = &self.cpu.vm.memory;
        let mut sums = player.pages().lock();
        let mut put = |page: u64, data: &[u8]| -> Result<(), EngineError> {
            sums.look(page, data);
            Ok(memory.write(GuestPhys(page << PAGE_SHIFT), data)?)
        };
        let mut first = BTreeSet::new();
        while let Some(page) = changed.pop_first() {
            match images.page(index, page)? {
                Some(data) => put(page, &data)?,
                None => drop(first.insert(page)),
            }
        }
        if first.is_empty() {
            return Ok(());
        }
        player.each_first(|address, data| {
            if first.remove(&address.page()) { put(address.page(), data) } else { Ok(()) }
        })?;
        first.into_iter().try_for_each(|page| put(page, &[0; PAGE_SIZE as usize]))
    }

    /// Registers, but for what belongs to the host.
    fn put_state_back(&mut self, image: &CpuState) {
        let st = &mut *self.cpu.st;
        let CpuState { host_rsp, cpu, host_mxcsr, host_fcw, .. } = *st;
        let (branch_modes, last_thunk) = (st.branch_modes, st.last_thunk);
        let (fpu_loaded, fpu_stays) = (st.fpu_loaded, st.fpu_stays);
        st.clone_from(image);
        (st.host_rsp, st.cpu, st.host_mxcsr, st.host_fcw) = (host_rsp, cpu, host_mxcsr, host_fcw);
        (st.branch_modes, st.last_thunk) = (branch_modes, last_thunk);
        (st.fpu_loaded, st.fpu_stays) = (fpu_loaded, fpu_stays);
    }

    /// Pages that were written since this was called last. Who takes the log waits for vCPUs
    /// that are inside.
    pub(super) fn take_written(&mut self) -> Vec<DirtyPages> {
        let vm = Arc::clone(&self.cpu.vm);
        vm.rendezvous.leave(self.cpu.id);
        let written = vm.dirty.take(&vm.memory);
        vm.rendezvous.enter(self.cpu.id);
        self.serve();
        written
    }

    /// Whether a seek is under way.
    pub(super) fn seeks(&self) -> bool {
        self.seeking.target != NOWHERE
    }

    /// The machine stands, if it has come to where it was to.
    pub(super) fn arrive(&mut self) -> Option<Exit> {
        let arrived = self.cpu.st.count() >= self.seeking.target;
        arrived.then(|| self.stop_replay(ReplayStop::Arrived))
    }

    pub(super) fn stop_replay(&mut self, why: ReplayStop) -> Exit {
        self.seeking.target = NOWHERE;
        if let Some(Journal::Replay(player)) = self.cpu.vm.journal.clone().as_deref() {
            self.set_next_stop(player);
        }
        // Whoever else wants something is heard when the machine runs on.
        self.cpu.tlb.block.shared().raise();
        self.unfinished = Unfinished::Debug;
        Exit::Debug(DebugStop::Replay(why))
    }

    /// Before an instruction is interpreted: whether the machine stands at a breakpoint.
    pub(super) fn meet_breakpoint(&mut self) -> Option<Exit> {
        let (linear, count) = (linear_rip(&self.cpu), self.cpu.st.count());
        if self.seeking.told == count || !self.cpu.breakpoints.contains(&linear) {
            return None;
        }
        self.seeking.told = count;
        if self.seeks() {
            self.note(Met { count, hits: 0 });
            return None;
        }
        Some(self.stop_replay(ReplayStop::Breakpoint { linear }))
    }

    /// A string instruction that goes on has been begun: it is passed until it ends.
    pub(super) fn go_on_within(&mut self, rip: u64, count: u64) {
        if self.cpu.st.rip == rip && self.seeking.told == count {
            self.seeking.told = self.cpu.st.count();
        }
    }

    /// Whether a stop behind an instruction is for the debugger; on the way of a seek it is noted.
    pub(super) fn is_told(&mut self, stop: DebugStop) -> bool {
        if !self.seeks() {
            return true;
        }
        if let DebugStop::Hardware { hits } = stop {
            self.note(Met { count: self.cpu.st.count() - 1, hits });
        }
        false
    }

    fn note(&self, met: Met) {
        if let Some(Journal::Replay(player)) = self.cpu.vm.journal.as_deref()
            && met.count < self.seeking.noted_before
        {
            player.note(met);
        }
    }
}
