//! End of interrupt by memory (msr.rst, MSR_KVM_PV_EOI_EN).
//!
//! Where an interrupt is delivered and nothing else is on its way, a bit in
//! guest memory is set. A guest that clears it has ended the interrupt and need
//! not tell the local APIC, which would cost an exit from translated code. The
//! local APIC hears of it when it matters: before the guest uses it, and when
//! the next interrupt arrives, which wakes the vCPU for that
//! ([`crate::irqchip::IrqChip::offer_quiet_eoi`]).

use tetrarch_memory::GuestPhys;

use super::{ENABLED, Guest};
use crate::state::fault::{R, gp};

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

    pub fn set_msr(&mut self, guest: &mut Guest, value: u64) -> R<()> {
        let address = value & !ENABLED;
        if !address.is_multiple_of(4) {
            return gp(0);
        }
        if value & ENABLED != 0 && guest.memory.host(GuestPhys(address), 4).is_none() {
            return gp(0);
        }
        self.settle(guest);
        self.msr = value;
        Ok(())
    }

    /// To be called when an interrupt has been accepted.
    pub fn offer(&mut self, guest: &Guest) {
        if self.msr & ENABLED == 0 || !guest.irqchip.offer_quiet_eoi(guest.vcpu) {
            return;
        }
        self.offered = true;
        if let Some(byte) = self.byte(guest) {
            let _ = guest.memory.write(self.address(), &[byte | PENDING]);
        }
    }

    #[inline]
    pub fn is_offered(&self) -> bool {
        self.offered
    }

    fn byte(&self, guest: &Guest) -> Option<u8> {
        let mut byte = [0];
        guest.memory.read(self.address(), &mut byte).ok()?;
        Some(byte[0])
    }

    /// Tells the local APIC what the guest did by memory. If it has not ended
    /// its interrupt yet, it will have to do so at the local APIC.
    #[cold]
    pub fn settle(&mut self, guest: &mut Guest) {
        if !std::mem::take(&mut self.offered) {
            return;
        }
        // A page that is no longer RAM: the guest could not have cleared it.
        let byte = self.byte(guest).unwrap_or(PENDING);
        if byte & PENDING != 0 {
            let _ = guest.memory.write(self.address(), &[byte & !PENDING]);
        }
        let ended = byte & PENDING == 0;
        *guest.quiet_eois += u64::from(ended);
        guest.irqchip.take_quiet_eoi(guest.vcpu, ended);
    }
}
