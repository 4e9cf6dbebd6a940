//! What KVM's paravirtual interface asks of the chip, with several vCPUs.

use tetrarch_engine::cpuid::Topology;

use super::Event;
use super::tests::Bench;

const FIXED: u64 = 0x4000;

#[test]
fn ipis_go_to_the_targets_that_exist_and_are_counted() {
    let bench = Bench::new(5);
    let (chip, vector) = (&bench.chip, 0x41);
    // 1, 3 and 4, and some past the end, of which one at the top of each half.
    let targets = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 63 | 1 << 64 | 1 << 127;
    assert_eq!(chip.send_ipis(targets, 0, FIXED | vector), Some(3));
    assert_eq!(bench.woken(), [1, 3, 4]);
    assert_eq!((chip.accept(3), chip.accept(0)), (Some(0x41), None));
    // Counted from another APIC ID.
    assert_eq!(chip.send_ipis(0b101, 2, FIXED | 0x42), Some(2));
    assert_eq!((chip.accept(2), chip.accept(4)), (Some(0x42), Some(0x42)));
    assert_eq!(chip.send_ipis(u128::MAX, u32::MAX - 3, FIXED | 0x43), Some(0));
}

#[test]
fn other_messages_go_by_the_same_way() {
    let bench = Bench::new(3);
    let chip = &bench.chip;
    // A processor that waits for its SIPI takes it, and an NMI after it.
    assert_eq!(chip.send_ipis(0b110, 0, FIXED | 0x608), Some(2));
    assert_eq!(chip.send_ipis(0b110, 0, FIXED | 0x400), Some(2));
    for vcpu in [1, 2] {
        assert_eq!(chip.take_event(vcpu), Some(Event::Sipi(8)));
        assert_eq!(chip.take_event(vcpu), Some(Event::Nmi));
    }
    assert_eq!(chip.take_event(0), None);
    // ExtINT is not for a command.
    assert_eq!(chip.send_ipis(0b111, 0, FIXED | 0x700), Some(0));
}

#[test]
fn kick_wakes_its_vcpu_and_is_kept_until_it_is_taken() {
    let bench = Bench::new(3);
    bench.chip.unhalt(2);
    bench.chip.unhalt(7);
    assert_eq!(bench.woken(), [2]);
    assert!(!bench.chip.take_unhalt(1));
    assert!(bench.chip.take_unhalt(2) && !bench.chip.take_unhalt(2));
}

/// Three cores in a socket leave a gap behind their APIC IDs.
#[test]
fn kick_goes_by_apic_id() {
    let topology = Topology { sockets: 2, cores: 3, threads: 1 };
    assert_eq!([3, 4, 5].map(|vcpu| topology.apic_id(vcpu)), [4, 5, 6]);
    let bench = Bench::of(topology);
    bench.chip.unhalt(4);
    bench.chip.unhalt(3);
    assert_eq!(bench.woken(), [3]);
    assert!(bench.chip.take_unhalt(3) && !bench.chip.take_unhalt(4));
}

#[test]
fn interrupt_behind_a_quiet_eoi_wakes_the_vcpu() {
    let bench = Bench::new(2);
    let chip = &bench.chip;
    chip.msi(0xFEE0_1000, 0x51);
    assert_eq!(chip.accept(1), Some(0x51));
    assert!(chip.offer_quiet_eoi(1) && !chip.offer_quiet_eoi(0));
    bench.woken();
    // Of lower priority than what may still be in service.
    chip.msi(0xFEE0_1000, 0x31);
    assert_eq!(bench.woken(), [1]);
    assert!(chip.has_event(1) && !chip.pending(1));
    chip.take_quiet_eoi(1, true);
    assert!(!chip.has_event(1));
    assert_eq!(chip.accept(1), Some(0x31));
}

#[test]
fn interrupt_behind_a_quiet_eoi_wakes_the_vcpu_even_where_the_pic_waits() {
    let bench = Bench::new(1);
    let chip = &bench.chip;
    chip.set_virtual_wire();
    // IRQ 1 of the PIC, unmasked.
    chip.port_write(0x21, 1, 0xFD, 0);
    chip.msi(0xFEE0_0000, 0x51);
    assert_eq!(chip.accept(0), Some(0x51));
    assert!(chip.offer_quiet_eoi(0));
    chip.irq_line(1, true, 0);
    assert!(chip.pending(0));
    bench.woken();
    // By a path that looks at the state before and after.
    assert_eq!(bench.set_msr(0, 0x1B, chip.apic_base(0) | 1 << 10), Ok(()));
    assert_eq!(bench.set_msr(0, 0x83F, 0x31), Ok(()));
    assert_eq!(bench.woken(), [0]);
}

#[test]
fn quiet_eoi_is_not_offered_where_somebody_waits_for_the_end() {
    let bench = Bench::new(1);
    let chip = &bench.chip;
    assert!(!chip.offer_quiet_eoi(0), "nothing is in service");
    // Level triggered: the I/O APIC waits.
    chip.msi(0xFEE0_0000, 0xC051);
    assert_eq!(chip.accept(0), Some(0x51));
    assert!(!chip.offer_quiet_eoi(0), "level");
    bench.set(0, 0xB0, 0);
    chip.msi(0xFEE0_0000, 0x51);
    assert_eq!(chip.accept(0), Some(0x51));
    assert!(chip.offer_quiet_eoi(0));
    chip.msi(0xFEE0_0000, 0x61);
    assert_eq!(chip.accept(0), Some(0x61));
    assert!(!chip.offer_quiet_eoi(0), "two are in service");
}
