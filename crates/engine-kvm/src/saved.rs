//! A vCPU of KVM as the contract's saved state.

use std::ops::RangeInclusive;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use tetrarch_engine::{
    DebugRegisters, EngineError, LAPIC_REGISTERS, LapicState, Msi, PendingEvents, PendingException,
    RunState, VcpuState,
};

use crate::error::refused;
use crate::irqchip;
use crate::msr::{self, index};
use crate::shared::VmShared;
use crate::state;
use crate::time;

/// KVM_X86_SHADOW_INT_MOV_SS and _STI (asm/kvm.h).
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
const DB: u8 = 1;
const NMI: u8 = 2;
/// Legacy region and header of an XSAVE image (Intel SDM 1, 13.4).
const XSAVE_LEAST: usize = 576;
/// Delivery modes of a message (Intel SDM 3A, 11.11.2).
const MESSAGE_INIT: u32 = 5 << 8;
const MESSAGE_SIPI: u32 = 6 << 8;

/// Registers with a place of their own in the state, and the older numbers of
/// two of the guest interface.
const ELSEWHERE: [u32; 8] = [
    index::TSC,
    index::APIC_BASE,
    index::TSC_DEADLINE,
    index::EFER,
    index::FS_BASE,
    index::GS_BASE,
    index::OLD_WALL_CLOCK,
    index::OLD_SYSTEM_TIME,
];

/// Hyper-V's (TLFS, appendix "Synthetic MSRs"), which no platform offers: among them
/// are counters of time, and KVM lists them all.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_01FF;

/// All but what the vCPU's own bookkeeping knows: shutdown, and the machine's
/// pauses that its TSC does not reflect yet, `lag`.
pub fn save(fd: &VcpuFd, vm: &VmShared, lag: u64) -> Result<VcpuState, EngineError> {
    let failed = |error| refused("read the state of a vCPU", error);
    // The kernel takes what an INIT or SIPI asks of the vCPU on this call.
    let mp_state = fd.get_mp_state().map_err(failed)?.mp_state;
    let registers = state::registers(&fd.get_regs().map_err(failed)?);
    let system = state::system_registers(&fd.get_sregs().map_err(failed)?);
    let debug = if vm.debugregs {
        let debug = fd.get_debug_regs().map_err(failed)?;
        DebugRegisters { breakpoints: debug.db, dr6: debug.dr6, dr7: debug.dr7 }
    } else {
        DebugRegisters { breakpoints: [0; 4], dr6: 0xFFFF_0FF0, dr7: 0x400 }
    };
    let xcr0 = if vm.xcrs {
        let xcrs = fd.get_xcrs().map_err(failed)?;
        xcrs.xcrs[..xcrs.nr_xcrs as usize]
            .iter()
            .find(|xcr| xcr.xcr == 0)
            .map_or(1, |xcr| xcr.value)
    } else {
        1
    };
    let tsc = msr::get(fd, index::TSC)
        .ok_or_else(|| EngineError::Internal("KVM does not tell a vCPU's TSC".into()))?;
    let mut msrs = vm.msrs.read_all(fd);
    msrs.retain(|(index, _)| !ELSEWHERE.contains(index) && !HYPER_V.contains(index));
    Ok(VcpuState {
        registers,
        debug,
        xcr0,
        xsave: xsave(fd)?,
        msrs,
        tsc: tsc.wrapping_sub(lag),
        events: if vm.events {
            events(&fd.get_vcpu_events().map_err(failed)?)
        } else {
            PendingEvents::default()
        },
        run: match mp_state {
            KVM_MP_STATE_HALTED => RunState::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => RunState::WaitForSipi,
            _ => RunState::Runnable,
        },
        lapic: LapicState {
            base: system.apic_base,
            registers: lapic_registers(&fd.get_lapic().map_err(failed)?),
            esr_pending: 0,
            ext_int: false,
            tsc_deadline: msr::get(fd, index::TSC_DEADLINE).unwrap_or(0),
            timer_left_ns: None,
        },
        system,
    })
}

pub fn load(fd: &VcpuFd, vm: &VmShared, id: u32, state: &VcpuState) -> Result<(), EngineError> {
    let failed = |error| refused("set the state of a vCPU", error);
    state.check()?;
    let lapic = kvm_lapic(&state.lapic)?;
    // The mode of the CPU before what depends on it.
    let old = fd.get_sregs().map_err(failed)?;
    let mut sregs = state::kvm_system_registers(&state.system, &old);
    sregs.apic_base = state.lapic.base;
    sregs.interrupt_bitmap = Default::default();
    fd.set_sregs(&sregs).map_err(failed)?;
    if vm.xcrs {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
        fd.set_xcrs(&xcrs).map_err(failed)?;
    }
    set_xsave(fd, &state.xsave)?;
    fd.set_regs(&state::kvm_registers(&state.registers)).map_err(failed)?;
    vm.msrs.set_all(fd, &state.msrs);
    time::set_tsc(fd, state.tsc);
    let mp_state = match state.run {
        RunState::Halted => KVM_MP_STATE_HALTED,
        RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        RunState::Runnable | RunState::Shutdown => KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed)?;
    fd.set_lapic(&lapic).map_err(failed)?;
    // After the APIC, whose timer must be in that mode, and after the TSC.
    if state.lapic.tsc_deadline != 0 {
        msr::set(fd, index::TSC_DEADLINE, state.lapic.tsc_deadline);
    }
    let (events, pending_debug) = kvm_events(&state.events);
    if vm.events {
        fd.set_vcpu_events(&events).map_err(failed)?;
    }
    if vm.debugregs {
        let DebugRegisters { breakpoints: db, dr6, dr7 } = state.debug;
        let dr6 = dr6 | pending_debug;
        fd.set_debug_regs(&kvm_debugregs { db, dr6, dr7, ..Default::default() }).map_err(failed)?;
    }
    let address = 0xFEE0_0000 | u64::from(id & 0xFF) << 12;
    if state.events.init {
        irqchip::signal_msi(&vm.fd, Msi { address, data: MESSAGE_INIT });
    }
    if let Some(vector) = state.events.sipi {
        // Only a vCPU that waits for it listens.
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_INIT_RECEIVED }).map_err(failed)?;
        let data = MESSAGE_SIPI | u32::from(vector);
        irqchip::signal_msi(&vm.fd, Msi { address, data });
    }
    Ok(())
}

pub fn xsave(fd: &VcpuFd) -> Result<Vec<u8>, EngineError> {
    let image = fd.get_xsave().map_err(|error| refused("read AVX state", error))?;
    Ok(image.region.iter().flat_map(|word| word.to_le_bytes()).collect())
}

pub fn set_xsave(fd: &VcpuFd, image: &[u8]) -> Result<(), EngineError> {
    let mut xsave = kvm_xsave::default();
    if image.len() < XSAVE_LEAST || image.len() > size_of_val(&xsave.region) {
        return Err(EngineError::Refused(format!(
            "an XSAVE image has {XSAVE_LEAST} to {} bytes, not {}",
            size_of_val(&xsave.region),
            image.len()
        )));
    }
    for (word, bytes) in xsave.region.iter_mut().zip(image.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(four);
    }
    // SAFETY: the structure is whole; states larger than it are opted into by
    // a call that this program does not make (arch_prctl, ARCH_REQ_XCOMP_*).
    unsafe { fd.set_xsave(&xsave) }.map_err(|error| {
        EngineError::Refused(format!("KVM does not take the XSAVE image: {error}"))
    })
}

fn lapic_registers(lapic: &kvm_lapic_state) -> Vec<u32> {
    let register =
        |at: &[std::ffi::c_char]| u32::from_le_bytes(std::array::from_fn(|byte| at[byte] as u8));
    lapic.regs.chunks_exact(16).map(register).collect()
}

fn kvm_lapic(state: &LapicState) -> Result<kvm_lapic_state, EngineError> {
    let mut lapic = kvm_lapic_state::default();
    if state.registers.len() != LAPIC_REGISTERS {
        return Err(EngineError::Refused(format!(
            "a local APIC has {LAPIC_REGISTERS} registers, not {}",
            state.registers.len()
        )));
    }
    for (at, value) in lapic.regs.chunks_exact_mut(16).zip(&state.registers) {
        for (byte, value) in at.iter_mut().zip(value.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    Ok(lapic)
}

fn events(raw: &kvm_vcpu_events) -> PendingEvents {
    let exception = &raw.exception;
    let waits = exception.injected != 0 || exception.pending != 0;
    PendingEvents {
        exception: waits.then(|| PendingException {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: (raw.exception_has_payload != 0).then_some(raw.exception_payload),
            injected: exception.injected != 0,
        }),
        interrupt: (raw.interrupt.injected != 0).then_some(raw.interrupt.nr),
        interrupt_soft: raw.interrupt.soft != 0,
        nmi: raw.nmi.pending != 0 || raw.nmi.injected != 0,
        nmi_blocked: raw.nmi.masked != 0,
        shadow_sti: raw.interrupt.shadow & SHADOW_STI != 0,
        shadow_mov_ss: raw.interrupt.shadow & SHADOW_MOV_SS != 0,
        init: false,
        sipi: None,
    }
}

/// With the bits that a debug exception's delivery is to set in DR6: the kernel
/// takes no such payload unless all of it is reported with one.
fn kvm_events(events: &PendingEvents) -> (kvm_vcpu_events, u64) {
    let mut raw = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    let mut debug = 0;
    if let Some(exception) = events.exception.filter(|exception| exception.vector != NMI) {
        raw.exception.injected = 1;
        raw.exception.nr = exception.vector;
        raw.exception.has_error_code = exception.error.is_some().into();
        raw.exception.error_code = exception.error.unwrap_or(0);
        if exception.vector == DB {
            debug = exception.payload.unwrap_or(0);
        }
    }
    raw.interrupt.injected = events.interrupt.is_some().into();
    raw.interrupt.nr = events.interrupt.unwrap_or(0);
    raw.interrupt.soft = events.interrupt_soft.into();
    raw.interrupt.shadow = if events.shadow_sti { SHADOW_STI } else { 0 }
        | if events.shadow_mov_ss { SHADOW_MOV_SS } else { 0 };
    raw.nmi.pending = events.nmi.into();
    raw.nmi.masked = events.nmi_blocked.into();
    (raw, debug)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_way_there_and_back() {
        let there = PendingEvents {
            exception: Some(PendingException {
                vector: 14,
                error: Some(2),
                payload: None,
                injected: true,
            }),
            interrupt: Some(0x30),
            interrupt_soft: true,
            nmi: true,
            nmi_blocked: true,
            shadow_sti: true,
            shadow_mov_ss: true,
            init: false,
            sipi: None,
        };
        assert_eq!(events(&kvm_events(&there).0), there);
    }

    #[test]
    fn registers_of_the_local_apic_survive_the_way_there_and_back() {
        let lapic = LapicState {
            base: 0,
            registers: (0..64).map(|n| n * 0x0101_0101).collect(),
            esr_pending: 0,
            ext_int: false,
            tsc_deadline: 0,
            timer_left_ns: None,
        };
        assert_eq!(lapic_registers(&kvm_lapic(&lapic).unwrap()), lapic.registers);
        let short = LapicState { registers: vec![0; 63], ..lapic };
        assert!(kvm_lapic(&short).is_err());
    }
}
