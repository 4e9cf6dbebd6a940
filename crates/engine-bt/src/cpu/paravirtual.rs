//! Where a vCPU comes to KVM's interface ([`crate::kvm`]).

use crate::cpu::Cpu;
use crate::kvm::{Guest, Paravirtual};
use crate::state::fault::R;

impl Cpu {
    fn kvm_and_guest(&mut self) -> (&mut Paravirtual, Guest<'_>) {
        let vm = &*self.vm;
        let guest = Guest {
            memory: &vm.memory,
            dirty: &vm.dirty,
            irqchip: &vm.irqchip,
            time: &vm.kvm_time,
            journal: vm.journal.as_deref(),
            vcpu: self.id,
            tsc_base: self.tsc_base,
            quiet_eois: &mut self.counts.quiet_eois,
        };
        (&mut self.kvm, guest)
    }

    /// WRMSR of one that [`kvm::has_msr`](crate::kvm::has_msr).
    pub fn write_kvm_msr(&mut self, index: u32, value: u64) -> R<()> {
        let (kvm, mut guest) = self.kvm_and_guest();
        kvm.write_msr(&mut guest, index, value)
    }

    /// The guest has set its TSC.
    pub fn tsc_changed(&mut self) {
        let (kvm, guest) = self.kvm_and_guest();
        kvm.tsc_changed(&guest);
    }

    /// An interrupt has been accepted: the guest may end it by memory.
    pub fn offer_quiet_eoi(&mut self) {
        let (kvm, guest) = self.kvm_and_guest();
        kvm.eoi.offer(&guest);
    }

    /// To be called before the local APIC is used: it hears what the guest did by
    /// memory.
    #[inline]
    pub fn settle_eoi(&mut self) {
        if self.kvm.eoi.is_offered() {
            let (kvm, mut guest) = self.kvm_and_guest();
            kvm.eoi.settle(&mut guest);
        }
    }

    /// Brings the guest's steal time up to date.
    pub fn update_steal_time(&mut self) {
        let (kvm, guest) = self.kvm_and_guest();
        kvm.steal_time.update(&guest);
    }

    /// The vCPU stops running guest code for a while.
    pub fn leave_guest(&mut self) {
        let (kvm, guest) = self.kvm_and_guest();
        kvm.steal_time.leave(&guest);
    }

    /// It goes on, with the TLB as it was left unless another vCPU wants otherwise.
    pub fn return_to_guest(&mut self) {
        let (kvm, guest) = self.kvm_and_guest();
        if kvm.steal_time.come_back(&guest) {
            self.tlb.flush(true);
        }
    }
}
