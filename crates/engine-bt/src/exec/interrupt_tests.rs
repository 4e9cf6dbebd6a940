//! Interrupts that arrive between a vCPU's look at its events and the delivery.

use std::sync::Arc;

use tetrarch_engine::Platform;
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::BtVcpu;
use crate::translate::cache::Room;
use crate::vm::{Config, build};

const PV_EOI: u32 = 0x4B56_4D04;
const PAGE: u64 = 0x8000;
const LOW: u8 = 0x2F;
const HIGH: u8 = 0x31;

#[test]
fn interrupt_ended_by_memory_is_not_in_service_below_the_next() {
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    let platform = Platform { kvm: true, ..Platform::default() };
    let config = Config { translate: false, platform, ..Config::default() };
    let vm = build(Arc::clone(&memory), config, Room::USUAL, None).unwrap();
    let mut vcpu = BtVcpu::new(0, Arc::clone(&vm.shared), None).unwrap();
    let chip = &vm.shared.irqchip;
    chip.lapic_write(0, 0xF0, 0x1FF, 0, 0);
    vcpu.cpu.write_kvm_msr(PV_EOI, PAGE | 1).unwrap();

    chip.msi(0xFEE0_0000, LOW.into());
    assert!(vcpu.deliver_interrupt().is_none());
    let mut offered = [0];
    memory.read(GuestPhys(PAGE), &mut offered).unwrap();
    assert_eq!(offered, [1]);
    // The guest ends it. Behind the look at events comes one that need not wait for that.
    memory.write(GuestPhys(PAGE), &[0]).unwrap();
    chip.msi(0xFEE0_0000, HIGH.into());
    assert!(vcpu.deliver_interrupt().is_none());
    memory.write(GuestPhys(PAGE), &[0]).unwrap();
    vcpu.cpu.settle_eoi();
    chip.msi(0xFEE0_0000, LOW.into());
    assert_eq!(chip.accept(0), Some(LOW), "nothing is in service");
}
