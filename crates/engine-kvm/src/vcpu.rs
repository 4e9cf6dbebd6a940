//! One vCPU: into the guest, out of it, one exit of the contract at a time.

use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tetrarch_confine::{ThreadKind, enter_once};
use tetrarch_engine::{
    Counters, EngineError, Exit, GuestDebug, GuestFault, Hypercalls, Kick, Registers, Reply,
    RunState, SystemRegisters, Vcpu, VcpuState, host_tsc,
};
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use crate::cpuid;
use crate::debug;
use crate::error::refused;
use crate::exit::{Failure, PortBlock, Raw, decode};
use crate::halt::Progress;
use crate::kick::Kicker;
use crate::msr;
use crate::platform;
use crate::saved;
use crate::shared::VmShared;
use crate::state;
use crate::time;

/// KVM_ENOSYS (linux/kvm_para.h): the hypercall is unknown.
const UNKNOWN_HYPERCALL: u64 = (-1000_i64) as u64;
/// Shorter pauses are no reason to tell the guest that it stood still.
const PAUSE: Duration = Duration::from_secs(1);
const RFLAGS_IF: u64 = 1 << 9;
const LONGEST_INSTRUCTION: usize = 15;

// Offsets of local APIC registers (Intel SDM 3A, table 11-1).
const APIC_SPURIOUS: usize = 0xF0;
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;

/// How far the last exit of KVM has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exchange {
    /// The vCPU is between two instructions, or in the guest.
    Idle,
    /// The next item of this block was handed out and waits for its answer.
    Item(PortBlock),
    /// The items before were answered; the next one is to be handed out.
    Items(PortBlock),
    MmioRead {
        size: u8,
    },
    MmioWrite,
    /// A value, registers or a fault; the instruction stands at its start.
    Platform(PlatformExit),
    /// A stop for the debugger: the answer may be an exception.
    Debug,
    /// The answer is in `kvm_run`: the kernel finishes the access at its next entry.
    Answered,
    /// This came while the exit before was finished.
    Ready(Raw),
}

/// Where the value in reply to an exit of the platform goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PlatformExit {
    Hypercall,
    MsrRead,
    MsrWrite,
    /// At this place of `kvm_run`.
    PortIn {
        place: usize,
        size: u8,
    },
    PortOut,
}

#[derive(Default)]
struct Counts {
    entries: u64,
    port_blocks: u64,
    string_items: u64,
    mmio: u64,
    interrupted: u64,
    hypercalls: u64,
    msrs: u64,
    dirty_ring_full: u64,
    run_tsc: u64,
}

/// A vCPU of engine `kvm`.
pub struct KvmVcpu {
    fd: VcpuFd,
    id: u32,
    vm: Arc<VmShared>,
    kicker: Arc<Kicker>,
    progress: Arc<Progress>,
    exchange: Exchange,
    shut_down: bool,
    /// Ticks of the machine's pauses that the TSC has been put back by.
    tsc_lag: u64,
    debug: GuestDebug,
    /// Since when the vCPU does not run, where a kick ended its run.
    paused: Option<Instant>,
    /// A reply could not be carried out; told by the next run.
    broken: Option<EngineError>,
    counts: Counts,
    start: (Instant, u64),
}

impl KvmVcpu {
    pub(crate) fn new(id: u32, vm: Arc<VmShared>) -> Result<Self, EngineError> {
        let mut fd = vm
            .fd
            .create_vcpu(vm.policy.topology.apic_id(id).into())
            .map_err(|error| refused(&format!("make vCPU {id}"), error))?;
        let table = cpuid::table(&vm.supported, vm.policy, &vm.platform, &vm.cpu, id)?;
        fd.set_cpuid2(&table).map_err(|error| refused("set what the CPU says it is", error))?;
        platform::prepare_vcpu(&fd, &vm.platform);
        msr::set_up_machine_checks(&fd)?;
        vm.msrs.initialise(&fd);
        if let Ok(khz) = fd.get_tsc_khz() {
            let _ = vm.tsc_hz.set(u64::from(khz) * 1000);
        }
        if id == 0 {
            set_virtual_wire(&fd)?;
        }
        vm.slots.add_vcpu(&fd)?;
        let immediate_exit = (&raw const fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        // SAFETY: the mapping lives as long as `fd`; `drop` detaches before that.
        let kicker = Arc::new(unsafe { Kicker::new(immediate_exit) });
        let progress = vm.halts.add(Arc::clone(&kicker))?;
        Ok(Self {
            fd,
            id,
            vm,
            kicker,
            progress,
            exchange: Exchange::Idle,
            shut_down: false,
            tsc_lag: 0,
            debug: GuestDebug::default(),
            paused: None,
            broken: None,
            counts: Counts::default(),
            start: (Instant::now(), host_tsc()),
        })
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kicker.detach();
    }
}

/// The local APIC as firmware leaves it: on, with the PICs behind LINT0 and NMI
/// on LINT1 (MultiProcessor Specification 1.4, 3.6.2.2, "virtual wire").
fn set_virtual_wire(fd: &VcpuFd) -> Result<(), EngineError> {
    let failed = |error| refused("wire the local APIC", error);
    let mut lapic = fd.get_lapic().map_err(failed)?;
    for (offset, value) in [(APIC_SPURIOUS, 0x1FF_u32), (APIC_LINT0, 0x700), (APIC_LINT1, 0x400)] {
        for (byte, value) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    fd.set_lapic(&lapic).map_err(failed)
}

impl KvmVcpu {
    /// One KVM_RUN.
    #[inline]
    fn enter(&mut self) -> Result<Raw, EngineError> {
        let start = host_tsc();
        let result = match self.fd.run() {
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => Err(EngineError::Internal(format!(
                "KVM cannot reach {size} bytes of guest memory at {gpa:#x}; free memory on the host"
            ))),
            Ok(_) => Ok(None),
            Err(error) => Ok(Some(error.errno())),
        };
        self.counts.run_tsc += host_tsc().wrapping_sub(start);
        self.counts.entries += 1;
        match result? {
            None => Ok(decode(self.fd.get_kvm_run())),
            // EAGAIN: the vCPU waited for INIT or SIPI and got it.
            Some(libc::EINTR | libc::EAGAIN) => {
                self.counts.interrupted += 1;
                Ok(Raw::Again)
            }
            Some(libc::EFAULT) => Err(EngineError::Internal(format!(
                "KVM cannot reach guest memory {}; free memory on the host",
                self.place()
            ))),
            Some(errno) => Err(EngineError::Internal(format!(
                "KVM_RUN failed: {} {}; look into the host's kernel log, or use engine bt",
                std::io::Error::from_raw_os_error(errno),
                self.place()
            ))),
        }
    }

    fn next_exit(&mut self) -> Result<Exit, EngineError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        match self.exchange {
            Exchange::Item(_)
            | Exchange::MmioRead { .. }
            | Exchange::MmioWrite
            | Exchange::Platform(_)
            | Exchange::Debug => {
                return Err(EngineError::Refused("the last exit was not answered".into()));
            }
            Exchange::Items(block) => return Ok(self.hand_out(block)),
            Exchange::Idle | Exchange::Answered | Exchange::Ready(_) => {}
        }
        if self.shut_down {
            return Ok(Exit::Shutdown);
        }
        self.kicker.here();
        let lag = self.vm.clock.tsc_lag();
        if lag != self.tsc_lag {
            time::delay_tsc(&self.fd, lag.wrapping_sub(self.tsc_lag));
            self.tsc_lag = lag;
        }
        if let Some(since) = self.paused.take()
            && since.elapsed() > PAUSE
            && self.vm.kvmclock_ctrl
        {
            // EINVAL: the guest does not use the clock.
            let _ = self.fd.kvmclock_ctrl();
        }
        loop {
            let raw = if let Exchange::Ready(raw) = self.exchange {
                raw
            } else {
                // In this order, or a kick could be lost: see kick.rs.
                if self.fd.get_kvm_run().immediate_exit != 0 {
                    self.fd.set_kvm_immediate_exit(0);
                }
                if self.kicker.is_kicked() {
                    if self.exchange == Exchange::Idle {
                        self.kicker.take();
                        self.paused = Some(Instant::now());
                        return Ok(Exit::Kicked);
                    }
                    // A kick is told between two instructions: what has been
                    // answered is finished first, by an entry that comes back
                    // before the guest runs (api.rst, 4.10).
                    self.fd.set_kvm_immediate_exit(1);
                }
                self.enter()?
            };
            self.exchange = Exchange::Idle;
            if let Some(exit) = self.serve(raw)? {
                return Ok(exit);
            }
        }
    }

    /// What an exit of KVM is to the machine; `None`: back into the guest.
    #[inline]
    fn serve(&mut self, raw: Raw) -> Result<Option<Exit>, EngineError> {
        Ok(match raw {
            Raw::Port(block) => {
                self.counts.port_blocks += 1;
                Some(self.hand_out(block))
            }
            Raw::MmioRead { address, size } => {
                self.counts.mmio += 1;
                self.exchange = Exchange::MmioRead { size };
                Some(Exit::MmioRead { address, size })
            }
            Raw::MmioWrite { address, size, data } => {
                self.counts.mmio += 1;
                self.exchange = Exchange::MmioWrite;
                Some(Exit::MmioWrite { address, size, data })
            }
            Raw::Halt => Some(Exit::Halt),
            Raw::Shutdown => {
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
            Raw::Again => {
                (self.kicker.take_check() && self.halted_for_good()).then_some(Exit::Halt)
            }
            Raw::Hypercall => {
                self.counts.hypercalls += 1;
                self.exchange = Exchange::Answered;
                self.fd.get_kvm_run().__bindgen_anon_1.hypercall.ret = UNKNOWN_HYPERCALL;
                None
            }
            Raw::PlatformCall { cpl } => {
                self.counts.hypercalls += 1;
                if cpl != 0 && self.vm.platform.hypercalls != Hypercalls::All {
                    self.exchange = Exchange::Platform(PlatformExit::Hypercall);
                    self.answer_platform(Reply::Fault(GuestFault::UD));
                    return Ok(None);
                }
                self.exchange = Exchange::Platform(PlatformExit::Hypercall);
                Some(Exit::Hypercall { cpl })
            }
            Raw::MsrRead { index } => {
                self.counts.msrs += 1;
                self.exchange = Exchange::Platform(PlatformExit::MsrRead);
                Some(Exit::MsrRead { index })
            }
            Raw::MsrWrite { index, value } => {
                self.counts.msrs += 1;
                self.exchange = Exchange::Platform(PlatformExit::MsrWrite);
                Some(Exit::MsrWrite { index, value })
            }
            Raw::DirtyRingFull => {
                self.counts.dirty_ring_full += 1;
                self.vm.harvest_dirty()?;
                None
            }
            Raw::Debug(exit) => match debug::stop(&self.debug, &exit) {
                Some(stop) => {
                    self.exchange = Exchange::Debug;
                    Some(Exit::Debug(stop))
                }
                None => {
                    debug::give_back_debug(&self.fd, &exit)?;
                    None
                }
            },
            Raw::Failed(failure) if failure.is_emulation() && self.runs_outside_memory() => {
                // Nothing is wrong with KVM: the guest jumped to where no code is.
                self.shut_down = true;
                Some(Exit::Shutdown)
            }
            Raw::Failed(failure) => return Err(self.failed(&failure)),
        })
    }

    /// Hands out the next item of a block of port accesses.
    #[inline]
    fn hand_out(&mut self, block: PortBlock) -> Exit {
        let PortBlock { port, size, input, count, .. } = block;
        let place = block.place();
        if count == 1 && self.vm.platform.register_port(port).is_some() {
            let exit =
                if input { PlatformExit::PortIn { place, size } } else { PlatformExit::PortOut };
            self.exchange = Exchange::Platform(exit);
            return Exit::PortWithRegisters { port, size, input, string: false };
        }
        if count > 1 {
            self.counts.string_items += 1;
        }
        let data = if input { 0 } else { self.run_bytes(place, size) };
        self.exchange = Exchange::Item(block);
        block.exit(data)
    }

    /// A number of `size` bytes in the pages of `kvm_run`.
    #[inline]
    fn run_bytes(&mut self, place: usize, size: u8) -> u32 {
        let run: *const u8 = (&raw const *self.fd.get_kvm_run()).cast();
        // SAFETY: the kernel said where its items lie: within the mapping, of
        // which `kvm_run` is only the start, and aligned to nothing.
        unsafe {
            let at = run.add(place);
            match size {
                1 => u32::from(*at),
                2 => u32::from(at.cast::<u16>().read_unaligned()),
                _ => at.cast::<u32>().read_unaligned(),
            }
        }
    }

    #[inline]
    fn answer(&mut self, value: u64) {
        self.exchange = match self.exchange {
            Exchange::Item(mut block) => {
                if block.input {
                    self.set_run_bytes(block.place(), block.size, value);
                }
                block.done += 1;
                if block.done < block.count { Exchange::Items(block) } else { Exchange::Answered }
            }
            Exchange::MmioRead { size } => {
                let size = size as usize;
                let bytes = value.to_le_bytes();
                // SAFETY: the exit was an access to memory, so this field is the one
                // in use, and plain bytes in any case.
                let data = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio.data };
                data[..size].copy_from_slice(&bytes[..size]);
                Exchange::Answered
            }
            Exchange::MmioWrite => Exchange::Answered,
            // Nothing waits; those of the platform are answered elsewhere.
            other => other,
        };
    }

    fn set_run_bytes(&mut self, place: usize, size: u8, value: u64) {
        let run: *mut u8 = (&raw mut *self.fd.get_kvm_run()).cast();
        // SAFETY: as in `run_bytes`; the size is 1, 2 or 4 for ports.
        unsafe {
            let at = run.add(place);
            match size {
                1 => *at = value as u8,
                2 => at.cast::<u16>().write_unaligned(value as u16),
                _ => at.cast::<u32>().write_unaligned(value as u32),
            }
        }
    }

    /// Answers an exit of the platform. Values go by way of `kvm_run`. For
    /// registers and faults the kernel finishes the instruction first, and what
    /// it made of the registers is then replaced.
    fn answer_platform(&mut self, reply: Reply) {
        let Exchange::Platform(exit) = self.exchange else { return };
        self.exchange = Exchange::Answered;
        let before = match self.fd.get_regs() {
            Ok(regs) => regs,
            Err(error) => {
                self.broken = Some(refused("read registers", error));
                return;
            }
        };
        let value = match &reply {
            Reply::Value(value) => Some(*value),
            Reply::Done | Reply::Registers(_) | Reply::Fault(_) => None,
        };
        match exit {
            PlatformExit::Hypercall => {
                // SAFETY: the exit was a hypercall, so this field is the one in use,
                // and plain numbers in any case.
                let call = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.xen.u.hcall };
                call.result = value.unwrap_or(before.rax);
            }
            PlatformExit::MsrRead | PlatformExit::MsrWrite => {
                // SAFETY: as above, for RDMSR and WRMSR.
                let msr = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.msr };
                msr.error = 0;
                msr.data = value.unwrap_or(before.rdx << 32 | before.rax & 0xFFFF_FFFF);
            }
            PlatformExit::PortIn { place, size } => {
                self.set_run_bytes(place, size, value.unwrap_or(before.rax));
            }
            PlatformExit::PortOut => {}
        }
        let result = match reply {
            Reply::Done | Reply::Value(_) => Ok(()),
            Reply::Registers(registers) => self.finish_with(&before, &registers),
            Reply::Fault(fault) => self.finish_with_fault(&before, fault),
        };
        if let Err(error) = result {
            self.broken = Some(error);
        }
    }

    /// Answers a stop for the debugger. The exception is an INT3's, which KVM steps over itself.
    fn answer_debug(&mut self, reply: Reply) {
        self.exchange = Exchange::Idle;
        if let Reply::Fault(fault) = reply
            && let Err(error) = debug::give_back(&self.fd, fault)
        {
            self.broken = Some(error);
        }
    }

    fn finish_with(&mut self, before: &kvm_regs, registers: &Registers) -> Result<(), EngineError> {
        let failed = |error| refused("go on as the platform says", error);
        self.settle()?;
        let mut after = state::kvm_registers(registers);
        if registers.rip == before.rip {
            after.rip = self.fd.get_regs().map_err(failed)?.rip;
        }
        self.fd.set_regs(&after).map_err(failed)
    }

    fn finish_with_fault(
        &mut self,
        before: &kvm_regs,
        fault: GuestFault,
    ) -> Result<(), EngineError> {
        const PAGE_FAULT: u8 = 14;
        let failed = |error| refused("go on as the platform says", error);
        self.settle()?;
        self.fd.set_regs(before).map_err(failed)?;
        if fault.vector == PAGE_FAULT {
            let mut system = self.fd.get_sregs().map_err(failed)?;
            system.cr2 = fault.address;
            self.fd.set_sregs(&system).map_err(failed)?;
        }
        let mut events = self.fd.get_vcpu_events().map_err(failed)?;
        events.exception.injected = 1;
        events.exception.nr = fault.vector;
        events.exception.has_error_code = fault.error.is_some().into();
        events.exception.error_code = fault.error.unwrap_or(0);
        self.fd.set_vcpu_events(&events).map_err(failed)
    }

    /// Lets the kernel finish the access that the last exit was about, so that
    /// registers are those between two instructions (api.rst, 4.10: completed by
    /// the next KVM_RUN, which `immediate_exit` keeps from running the guest).
    fn settle(&mut self) -> Result<(), EngineError> {
        if matches!(self.exchange, Exchange::Idle | Exchange::Ready(_) | Exchange::Debug) {
            return Ok(());
        }
        self.exchange = Exchange::Idle;
        self.fd.set_kvm_immediate_exit(1);
        let came = self.enter();
        // A kick that comes meanwhile is noted, and noticed by the next run.
        self.fd.set_kvm_immediate_exit(0);
        match came? {
            Raw::Again => {}
            raw => self.exchange = Exchange::Ready(raw),
        }
        Ok(())
    }

    /// As [`KvmVcpu::settle`], but at an exit of the platform, whose registers are
    /// those before the instruction.
    fn settle_to_read(&mut self) -> Result<(), EngineError> {
        if matches!(self.exchange, Exchange::Platform(_)) { Ok(()) } else { self.settle() }
    }

    /// Whether the machine has ended in HLT.
    fn halted_for_good(&self) -> bool {
        self.vm.halts.look(&self.progress, || match self.fd.get_mp_state() {
            Ok(kvm_mp_state {
                mp_state: KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED,
            }) => true,
            Ok(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }) => {
                self.fd.get_regs().is_ok_and(|regs| regs.rflags & RFLAGS_IF == 0)
            }
            _ => false,
        })
    }

    /// The linear address of the next instruction.
    fn linear_rip(&self) -> Option<u64> {
        const LMA: u64 = 1 << 10;
        let (regs, sregs) = (self.fd.get_regs().ok()?, self.fd.get_sregs().ok()?);
        let long = sregs.efer & LMA != 0 && sregs.cs.l != 0;
        Some(if long { regs.rip } else { (sregs.cs.base + regs.rip) & 0xFFFF_FFFF })
    }

    fn runs_outside_memory(&self) -> bool {
        let Some(linear) = self.linear_rip() else { return false };
        let Ok(found) = self.fd.translate_gva(linear) else { return false };
        found.valid != 0 && self.vm.memory.host(GuestPhys(found.physical_address), 1).is_none()
    }

    /// Where the guest is, with the bytes of its instruction, for a message.
    fn place(&self) -> String {
        let Some(linear) = self.linear_rip() else { return "at an unknown place".into() };
        let mut code = [0; LONGEST_INSTRUCTION];
        let read = self.read_linear(linear, &mut code);
        let bytes: Vec<String> = code[..read].iter().map(|byte| format!("{byte:02x}")).collect();
        if bytes.is_empty() {
            format!("at {linear:#x}, which is not mapped, on vCPU {}", self.id)
        } else {
            format!("at {linear:#x} <{}> on vCPU {}", bytes.join(" "), self.id)
        }
    }

    fn failed(&self, failure: &Failure) -> EngineError {
        EngineError::Internal(failure.explain(&self.place()))
    }

    fn read_linear(&self, linear: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        while done < data.len() {
            let address = linear.wrapping_add(done as u64);
            let in_page = (PAGE_SIZE - address % PAGE_SIZE) as usize;
            let part = in_page.min(data.len() - done);
            let Ok(found) = self.fd.translate_gva(address) else { break };
            let physical = GuestPhys(found.physical_address);
            if found.valid == 0
                || self.vm.memory.read(physical, &mut data[done..done + part]).is_err()
            {
                break;
            }
            done += part;
        }
        done
    }

    /// New registers: nothing of what the vCPU was about counts any more.
    fn forget_progress(&mut self) {
        self.exchange = Exchange::Idle;
        self.shut_down = false;
        if self.fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED) {
            let _ = self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE });
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, EngineError> {
        enter_once(ThreadKind::VcpuKvm);
        self.progress.set_inside(true);
        let result = self.next_exit();
        self.progress.set_inside(false);
        result
    }

    fn reply(&mut self, reply: Reply) {
        if let Exchange::Platform(_) = self.exchange {
            return self.answer_platform(reply);
        }
        if let Exchange::Debug = self.exchange {
            return self.answer_debug(reply);
        }
        let value = match reply {
            Reply::Value(value) => value,
            Reply::Done | Reply::Registers(_) | Reply::Fault(_) => 0,
        };
        self.answer(value);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as Arc<dyn Kick>
    }

    fn registers(&mut self) -> Result<Registers, EngineError> {
        self.settle_to_read()?;
        let regs = self.fd.get_regs().map_err(|error| refused("read registers", error))?;
        Ok(state::registers(&regs))
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), EngineError> {
        self.settle()?;
        self.fd
            .set_regs(&state::kvm_registers(registers))
            .map_err(|error| refused("set registers", error))?;
        self.forget_progress();
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, EngineError> {
        self.settle_to_read()?;
        let sregs = self.fd.get_sregs().map_err(|error| refused("read system registers", error))?;
        Ok(state::system_registers(&sregs))
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<(), EngineError> {
        self.settle()?;
        let old = self.fd.get_sregs().map_err(|error| refused("read system registers", error))?;
        self.fd.set_sregs(&state::kvm_system_registers(registers, &old)).map_err(|error| {
            EngineError::Refused(format!(
                "KVM does not take these system registers ({error}): the modes that CR0, CR4, \
                 EFER and the segments ask for do not go together"
            ))
        })?;
        self.forget_progress();
        Ok(())
    }

    fn xsave(&mut self) -> Result<Vec<u8>, EngineError> {
        self.settle()?;
        saved::xsave(&self.fd)
    }

    fn set_xsave(&mut self, image: &[u8]) -> Result<(), EngineError> {
        self.settle()?;
        saved::set_xsave(&self.fd, image)
    }

    fn msr(&mut self, index: u32) -> Result<Option<u64>, EngineError> {
        self.settle()?;
        msr::read(&self.fd, index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<bool, EngineError> {
        self.settle()?;
        msr::write(&self.fd, index, value)
    }

    fn peek(&mut self, linear: u64, data: &mut [u8]) -> usize {
        self.read_linear(linear, data)
    }

    fn translate(&mut self, linear: u64) -> Option<GuestPhys> {
        let found = self.fd.translate_gva(linear).ok()?;
        (found.valid != 0).then_some(GuestPhys(found.physical_address))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<(), EngineError> {
        self.settle()?;
        debug::set(&self.fd, debug, self.vm.debug_block_irq)?;
        self.debug = *debug;
        Ok(())
    }

    fn counters(&self) -> Counters {
        let c = &self.counts;
        let (start, start_tsc) = self.start;
        let ticks = u128::from(host_tsc().wrapping_sub(start_tsc).max(1));
        let ns = u128::from(c.run_tsc) * start.elapsed().as_nanos() / ticks;
        vec![
            ("kvm", "entries", c.entries),
            ("kvm", "exits_io", c.port_blocks),
            ("kvm", "string_items", c.string_items),
            ("kvm", "exits_mmio", c.mmio),
            ("kvm", "exits_interrupted", c.interrupted),
            ("kvm", "exits_hypercall", c.hypercalls),
            ("kvm", "exits_msr", c.msrs),
            ("kvm", "exits_dirty_ring_full", c.dirty_ring_full),
            ("time_ns", "kvm_run", ns as u64),
        ]
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        self.settle()?;
        if matches!(self.exchange, Exchange::Ready(_)) {
            return Err(EngineError::Refused("the vCPU is in the middle of an instruction".into())
                .mended_by("hold the machine, then save"));
        }
        let lag = self.vm.clock.tsc_lag().wrapping_sub(self.tsc_lag);
        let mut state = saved::save(&self.fd, &self.vm, lag)?;
        if self.shut_down {
            state.run = RunState::Shutdown;
        }
        Ok(state)
    }

    fn load(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.settle()?;
        self.forget_progress();
        saved::load(&self.fd, &self.vm, self.id, state)?;
        self.tsc_lag = self.vm.clock.tsc_lag();
        self.shut_down = state.run == RunState::Shutdown;
        Ok(())
    }

    fn set_present(&mut self, present: bool) {
        self.vm.halts.set_present(&self.progress, present);
    }
}
