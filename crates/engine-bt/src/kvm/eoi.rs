//! End of interrupt by memory (msr.rst, MSR_KVM_PV_EOI_EN).
//!
//! Where an interrupt is delivered and nothing else is on its way, a bit in
//! guest memory is set. A guest that clears it has ended the interrupt and need
//! not tell the local APIC, which would cost an exit from translated code. The
//! local APIC hears of it when it matters: before the guest uses it, and when
//! the next interrupt arrives, which wakes the vCPU for that
//! ([`crate::irqchip::IrqChip::offer_quiet_eoi`]).

use tetrarch_memory::GuestPhys;

use super::ENABLED;
use crate::cpu::Cpu;
use crate::cpu::fault::{R, gp};

/// The bit that the guest tests and clears.
const PENDING: u8 = 1;

#[derive(Default)]
pub struct Eoi {
    msr: u64,
    /// The bit has been set for the interrupt in service.
    offered: bool,
}

impl Eoi {
    pub fn msr(&self) -> u64 {
        self.msr
    }

    fn address(&self) -> GuestPhys {
        GuestPhys(self.msr & !ENABLED)
    }
}

pub fn set_msr(cpu: &mut Cpu, value: u64) -> R<()> {
    let address = value & !ENABLED;
    if !address.is_multiple_of(4) {
        return gp(0);
    }
    if value & ENABLED != 0 && cpu.vm.memory.host(GuestPhys(address), 4).is_none() {
        return gp(0);
    }
    cpu.settle_eoi();
    cpu.kvm.eoi.msr = value;
    Ok(())
}

impl Cpu {
    /// To be called when an interrupt has been accepted.
    pub fn offer_quiet_eoi(&mut self) {
        if self.kvm.eoi.msr & ENABLED == 0 || !self.vm.irqchip.offer_quiet_eoi(self.id) {
            return;
        }
        self.kvm.eoi.offered = true;
        let address = self.kvm.eoi.address();
        if let Ok(byte) = self.eoi_byte() {
            let _ = self.vm.memory.write(address, &[byte | PENDING]);
        }
    }

    fn eoi_byte(&self) -> Result<u8, tetrarch_memory::MemoryError> {
        let mut byte = [0];
        self.vm.memory.read(self.kvm.eoi.address(), &mut byte)?;
        Ok(byte[0])
    }

    /// Tells the local APIC what the guest did by memory. If it has not ended
    /// its interrupt yet, it will have to do so at the local APIC.
    #[inline]
    pub fn settle_eoi(&mut self) {
        if self.kvm.eoi.offered {
            self.settle_offered_eoi();
        }
    }

    #[cold]
    fn settle_offered_eoi(&mut self) {
        self.kvm.eoi.offered = false;
        // A page that is no longer RAM: the guest could not have cleared it.
        let byte = self.eoi_byte().unwrap_or(PENDING);
        if byte & PENDING != 0 {
            let _ = self.vm.memory.write(self.kvm.eoi.address(), &[byte & !PENDING]);
        }
        let ended = byte & PENDING == 0;
        self.counts.quiet_eois += u64::from(ended);
        self.vm.irqchip.take_quiet_eoi(self.id, ended);
    }
}
