//! A vCPU as the contract's saved state.

use tetrarch_engine::{
    DebugRegisters, EngineError, PendingEvents, PendingException, RunState, Vcpu, VcpuState,
};

use super::{BtVcpu, Interruption, Unfinished};
use crate::cpu::{fpu, msr};
use crate::kvm::feature;
use crate::state::fault::{Fault, vector};
use crate::state::flag;
use crate::state::shadow;

/// DR6 and DR7 bits that can be set; the others read as fixed (Intel SDM 3B, 18.2).
const DR6_FIXED: u64 = 0xFFFF_0FF0;
const DR6_WRITABLE: u64 = 0xE00F;
const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xFFFF_23FF;

fn refused(what: impl std::fmt::Display) -> EngineError {
    EngineError::Refused(format!("engine bt cannot take up this vCPU: {what}"))
}

impl BtVcpu {
    /// Whether an instruction has begun, or the delivery of an event has made
    /// accesses that were answered.
    fn in_progress(&self) -> bool {
        !matches!(self.unfinished, Unfinished::Nothing) || self.cpu.replay.in_progress()
    }

    /// The event whose delivery begins with the next run.
    fn pending(&self) -> (Option<PendingException>, Option<u8>, bool) {
        let pending_debug = self.cpu.st.pending_debug;
        match self.delivering {
            Some(Interruption::Fault(Fault { vector, error, address })) => {
                let payload = matches!(vector, vector::PF | vector::DB).then_some(address);
                (Some(PendingException { vector, error, payload, injected: true }), None, false)
            }
            Some(Interruption::Interrupt(vector)) => (None, Some(vector), false),
            Some(Interruption::Nmi) => (None, None, true),
            None if pending_debug != 0 => {
                let (vector, payload) = (vector::DB, Some(pending_debug));
                (
                    Some(PendingException { vector, error: None, payload, injected: false }),
                    None,
                    false,
                )
            }
            None => (None, None, false),
        }
    }

    fn set_pending(&mut self, events: &PendingEvents) {
        self.cpu.st.pending_debug = 0;
        self.delivering = match (events.exception, events.interrupt) {
            (Some(PendingException { vector: vector::DB, payload, injected: false, .. }), _) => {
                self.cpu.st.pending_debug = payload.unwrap_or(0);
                None
            }
            (Some(PendingException { vector, error, payload, .. }), _) => {
                // CR2 holds the address already where the other engine has set it.
                let address = match vector {
                    vector::PF => payload.unwrap_or(self.cpu.st.cr2),
                    _ => payload.unwrap_or(0),
                };
                Some(Interruption::Fault(Fault { vector, error, address }))
            }
            (None, Some(vector)) => Some(Interruption::Interrupt(vector)),
            (None, None) => None,
        };
    }

    pub(super) fn saved(&mut self) -> Result<VcpuState, EngineError> {
        if self.in_progress() {
            return Err(EngineError::Refused("the vCPU is in the middle of an instruction".into())
                .mended_by("hold the machine, then save"));
        }
        self.cpu.settle_eoi();
        let id = self.cpu.id;
        let lapic = self
            .cpu
            .vm
            .irqchip
            .lapic(id, self.cpu.now_ns())
            .ok_or_else(|| EngineError::Internal(format!("vCPU {id} has no local APIC")))?;
        let (nmi, init, sipi, waits_for_sipi) = self.cpu.vm.irqchip.waiting(id);
        let msrs = msr::saved()
            .filter_map(|index| Some((index, msr::read(&mut self.cpu, index).ok()?)))
            .collect();
        let (registers, system) = (self.registers()?, self.system_registers()?);
        let st = &self.cpu.st;
        let (exception, interrupt, injected_nmi) = self.pending();
        Ok(VcpuState {
            registers,
            system,
            debug: DebugRegisters {
                breakpoints: [st.dr[0], st.dr[1], st.dr[2], st.dr[3]],
                dr6: st.dr[6],
                dr7: st.dr[7],
            },
            xcr0: st.xcr0,
            xsave: fpu::save_xsave(st),
            msrs,
            tsc: self.cpu.tsc(),
            events: PendingEvents {
                exception,
                interrupt,
                interrupt_soft: false,
                nmi: nmi || self.nmi_pending || injected_nmi,
                nmi_blocked: st.nmi_blocked != 0,
                shadow_sti: st.shadow & shadow::STI != 0,
                shadow_mov_ss: st.shadow & shadow::MOV_SS != 0,
                init,
                sipi,
            },
            run: if self.shut_down {
                RunState::Shutdown
            } else if waits_for_sipi {
                RunState::WaitForSipi
            } else if st.halted != 0 && !self.cpu.vm.irqchip.is_unhalted(id) {
                RunState::Halted
            } else {
                RunState::Runnable
            },
            lapic,
        })
    }

    pub(super) fn take_up(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        state.check()?;
        let irqchip = std::sync::Arc::clone(&self.cpu.vm.irqchip);
        let id = self.cpu.id;
        let avx_without_sse = state.xcr0 & 6 == 4;
        // Bit 0 is set from the reset on, with XSAVE or without.
        let possible = self.cpu.vm.cpuid.xcr0_mask() | 1;
        if state.xcr0 & 1 == 0 || avx_without_sse || state.xcr0 & !possible != 0 {
            return Err(refused(format_args!("this host has no XCR0 {:#x}", state.xcr0)));
        }
        self.cpu.st.xcr0 = state.xcr0;
        let image = fpu::without_disabled(&state.xsave, state.xcr0);
        fpu::load_xsave(&mut self.cpu.st, &image).map_err(refused)?;
        // The base comes with the local APIC, whose registers go by it.
        let mut system = state.system;
        system.apic_base = irqchip.apic_base(id);
        self.set_system_registers(&system)?;
        // Before the MSR of kvmclock, with which the guest's clock is written by the TSC.
        self.cpu.set_tsc(state.tsc);
        for &(index, value) in &state.msrs {
            if msr::write(&mut self.cpu, index, value).is_err() {
                log::debug!("bt: MSR {index:#x} = {value:#x} of the saved vCPU is left out");
            }
        }
        let now = (self.cpu.now_ns(), self.cpu.tsc());
        irqchip.set_lapic(id, &state.lapic, now).map_err(refused)?;
        let waits = state.run == RunState::WaitForSipi;
        irqchip.set_waiting(id, (false, state.events.init, state.events.sipi, waits));
        self.set_registers(&state.registers)?;
        // A state has no place for a kick that ends a halt which is still to come. One too many
        // has a waiter look again; without one that was there it would sleep for ever. It came,
        // if it did, behind the waiter's last look, which is made with interrupts off. Where there
        // is no other vCPU nobody kicks, and HLT with interrupts off is the end.
        let closed = state.registers.rflags & flag::IF == 0 || state.events.shadow_sti;
        let may_be_kicked = self.cpu.vm.kvm_features & feature::PV_UNHALT != 0
            && self.cpu.vm.topology.vcpus() > 1
            && state.run == RunState::Runnable
            && closed;
        let st = &mut *self.cpu.st;
        let DebugRegisters { breakpoints, dr6, dr7 } = state.debug;
        st.dr[..4].copy_from_slice(&breakpoints);
        st.dr[6] = dr6 & DR6_WRITABLE | DR6_FIXED;
        st.dr[7] = dr7 & DR7_WRITABLE | DR7_FIXED;
        st.nmi_blocked = u8::from(state.events.nmi_blocked);
        let mut held_back = 0;
        for (on, bit) in
            [(state.events.shadow_sti, shadow::STI), (state.events.shadow_mov_ss, shadow::MOV_SS)]
        {
            held_back |= if on { bit } else { 0 };
        }
        st.shadow = held_back;
        st.halted = u8::from(matches!(state.run, RunState::Halted | RunState::WaitForSipi));
        irqchip.set_unhalted(id, may_be_kicked);
        self.nmi_pending = state.events.nmi;
        self.set_pending(&state.events);
        self.shut_down = state.run == RunState::Shutdown;
        self.cpu.update_mode();
        Ok(())
    }
}
