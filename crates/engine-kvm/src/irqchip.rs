//! The interrupt controllers in the kernel: how they are wired, how devices and
//! other processes reach them, and how they are saved.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use tetrarch_engine::{EngineError, GSI_COUNT, Msi, MsiRoutes};

use crate::error::refused;

/// ISA interrupts, which reach the PICs as well.
const ISA_LINES: u32 = 16;
/// The timer's interrupt, GSI 0, is on this pin, where the PICs' cascade would
/// be; the MADT says so.
const TIMER_PIN: u32 = 2;

pub struct IrqChip {
    routes: Mutex<MsiRoutes>,
}

/// Where the ISA lines and the other pins go.
fn wiring() -> Vec<kvm_irq_routing_entry> {
    let chip = |gsi, irqchip, pin| {
        let mut entry =
            kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let mut entries = Vec::new();
    for gsi in 0..ISA_LINES {
        if gsi < 8 && gsi != TIMER_PIN {
            entries.push(chip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
        } else if gsi >= 8 {
            entries.push(chip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
        }
    }
    for gsi in 0..GSI_COUNT {
        entries.push(chip(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { TIMER_PIN } else { gsi }));
    }
    entries
}

impl IrqChip {
    /// Makes PICs, I/O APIC and PIT; the local APICs come with the vCPUs.
    pub fn create(vm: &VmFd) -> Result<Self, EngineError> {
        vm.create_irq_chip().map_err(|error| refused("make interrupt controllers", error))?;
        // With the dummy speaker the kernel answers port 0x61 as well.
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(config).map_err(|error| refused("make the interval timer", error))?;
        let irqchip = Self { routes: Mutex::default() };
        irqchip.apply(vm, &MsiRoutes::default())?;
        Ok(irqchip)
    }

    fn apply(&self, vm: &VmFd, routes: &MsiRoutes) -> Result<(), EngineError> {
        let mut entries = wiring();
        // To the kernel every message is an interrupt.
        for (gsi, msi) in routes.iter().filter(|(_, msi)| msi.is_interrupt()) {
            let mut entry =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = msi.address as u32;
            entry.u.msi.address_hi = (msi.address >> 32) as u32;
            entry.u.msi.data = msi.data;
            entries.push(entry);
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            EngineError::Refused(format!(
                "{} interrupt routes are more than KVM takes",
                entries.len()
            ))
        })?;
        vm.set_gsi_routing(&table).map_err(|error| refused("route interrupts", error))
    }

    /// Changes which messages lines stand for.
    pub fn change_routes(
        &self,
        vm: &VmFd,
        changes: &[(u32, Option<Msi>)],
    ) -> Result<(), EngineError> {
        let mut current = self.routes.lock();
        let routes = current.changed(changes)?;
        self.apply(vm, &routes)?;
        *current = routes;
        Ok(())
    }
}

pub fn signal_msi(vm: &VmFd, message: Msi) {
    if !message.is_interrupt() {
        return;
    }
    let msi = kvm_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    // A message that no local APIC takes is lost, as on a bus.
    let _ = vm.signal_msi(msi);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timer_is_on_pin_2_and_the_cascade_nowhere() {
        // SAFETY: all entries of the wiring are of the kind IRQCHIP.
        let routes: Vec<_> = wiring()
            .iter()
            .map(|entry| unsafe { (entry.gsi, entry.u.irqchip.irqchip, entry.u.irqchip.pin) })
            .collect();
        assert!(routes.contains(&(0, KVM_IRQCHIP_PIC_MASTER, 0)));
        assert!(routes.contains(&(0, KVM_IRQCHIP_IOAPIC, 2)));
        assert!(routes.contains(&(9, KVM_IRQCHIP_PIC_SLAVE, 1)));
        assert!(routes.contains(&(23, KVM_IRQCHIP_IOAPIC, 23)));
        assert!(!routes.iter().any(|&(_, chip, pin)| chip == KVM_IRQCHIP_PIC_MASTER && pin == 2));
    }
}
