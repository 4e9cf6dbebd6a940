//! The chip as the engine sees it: the same calls, the wakes, and what a guest can do to it.

use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{ChipsetState, LapicState};

use super::{BadState, Event, IrqChip, ProtectionFault, Wake};

const TSC_HZ: u64 = 2_000_000_000;

#[derive(Default)]
struct Wakes(Mutex<Vec<usize>>);

impl Wake for Wakes {
    fn wake(&self, vcpu: usize) {
        self.0.lock().push(vcpu);
    }
}

pub struct Bench {
    pub chip: IrqChip,
    wakes: Arc<Wakes>,
}

impl Bench {
    /// Local APICs soft enabled, flat logical IDs 1 << vcpu (modulo 8), nothing woken yet.
    pub fn new(vcpus: usize) -> Self {
        Self::of(Topology::flat(vcpus as u32))
    }

    pub fn of(topology: Topology) -> Self {
        let vcpus = topology.vcpus() as usize;
        let wakes = Arc::new(Wakes::default());
        let chip = IrqChip::new(topology, TSC_HZ, wakes.clone());
        for vcpu in 0..vcpus {
            chip.lapic_write(vcpu, 0xf0, 0x1ff, 0, 0);
            chip.lapic_write(vcpu, 0xd0, 1 << (24 + vcpu % 8), 0, 0);
        }
        let bench = Self { chip, wakes };
        bench.woken();
        bench
    }

    /// The same with every local APIC in x2APIC mode.
    fn x2apic(vcpus: usize) -> Self {
        let bench = Self::new(vcpus);
        for vcpu in 0..vcpus {
            let base = bench.chip.apic_base(vcpu);
            assert_eq!(bench.set_msr(vcpu, 0x1b, base | 1 << 10), Ok(()));
        }
        bench
    }

    pub fn woken(&self) -> Vec<usize> {
        std::mem::take(&mut *self.wakes.0.lock())
    }

    fn msr(&self, vcpu: usize, msr: u32) -> Result<u64, ProtectionFault> {
        self.chip.apic_msr_read(vcpu, msr, 0, 0)
    }

    pub fn set_msr(&self, vcpu: usize, msr: u32, value: u64) -> Result<(), ProtectionFault> {
        self.chip.apic_msr_write(vcpu, msr, value, 0, 0)
    }

    pub fn set(&self, vcpu: usize, offset: u32, value: u32) {
        self.chip.lapic_write(vcpu, offset, value, 0, 0);
    }

    fn get(&self, vcpu: usize, offset: u32) -> u32 {
        self.chip.lapic_read(vcpu, offset, 0)
    }

    fn ipi(&self, from: usize, low: u32, dest: u32) {
        self.set(from, 0x310, dest << 24);
        self.set(from, 0x300, low);
    }

    pub fn entry(&self, pin: u32, low: u32, dest: u32) {
        for (reg, value) in [(0x11, dest << 24), (0x10, low)] {
            self.chip.ioapic_write(0, reg + 2 * pin);
            self.chip.ioapic_write(0x10, value);
        }
    }

    fn out(&self, port: u16, value: u8, now_ns: u64) {
        assert!(self.chip.port_write(port, 1, value.into(), now_ns));
    }

    /// The PIC at 0x20 and 0x28, all but IRQ 0 masked, wired to vCPU 0.
    fn pic(&self) {
        self.chip.set_virtual_wire();
        for (command, base, wiring) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            self.out(command, 0x11, 0);
            for value in [base, wiring, 1, 0xfe] {
                self.out(command + 1, value, 0);
            }
        }
    }

    /// Which vCPUs accept `vector` now; each is acknowledged.
    fn takers(&self, vcpus: usize, vector: u8) -> Vec<usize> {
        let takes = |&vcpu: &usize| {
            let accepted = self.chip.accept(vcpu);
            self.set(vcpu, 0xb0, 0);
            accepted == Some(vector)
        };
        (0..vcpus).filter(takes).collect()
    }
}

#[test]
fn reset_registers_are_the_manuals() {
    let chip = IrqChip::new(Topology::flat(2), TSC_HZ, Arc::new(Wakes::default()));
    let read = |offset| chip.lapic_read(1, offset, 0);
    assert_eq!((read(0x20), read(0x30)), (1 << 24, 0x5_0014));
    assert_eq!((read(0xe0), read(0xf0)), (0xffff_ffff, 0xff));
    for offset in (0x320..=0x370).step_by(0x10) {
        assert_eq!(read(offset), 0x1_0000);
    }
    assert_eq!(chip.apic_base(0), 0xfee0_0900);
    assert_eq!(chip.apic_base(1), 0xfee0_0800);
    assert!(!chip.pending(0) && !chip.pending(1));
}

#[test]
fn msi_is_taken_acknowledged_and_finished() {
    let b = Bench::new(2);
    b.chip.msi(0xfee0_1000, 0x41);
    assert_eq!(b.woken(), [1]);
    assert!(b.chip.pending(1) && !b.chip.pending(0));
    assert_eq!(b.get(1, 0x220), 2);
    assert_eq!(b.chip.accept(1), Some(0x41));
    assert!(!b.chip.pending(1));
    assert_eq!((b.get(1, 0x220), b.get(1, 0x120)), (0, 2));
    assert_eq!(b.get(1, 0xa0), 0x40);
    b.set(1, 0xb0, 0);
    assert_eq!((b.get(1, 0x120), b.get(1, 0xa0)), (0, 0));
    assert_eq!(b.chip.accept(1), None);
}

#[test]
fn priority_class_decides_and_the_task_priority_holds_back() {
    let b = Bench::new(1);
    b.chip.msi(0xfee0_0000, 0x51);
    assert_eq!(b.chip.accept(0), Some(0x51));
    // Same class: waits. Higher class: nests.
    b.chip.msi(0xfee0_0000, 0x5f);
    assert!(!b.chip.pending(0));
    b.chip.msi(0xfee0_0000, 0x61);
    assert_eq!(b.chip.accept(0), Some(0x61));
    b.set(0, 0xb0, 0);
    b.chip.set_cr8(0, 5);
    b.set(0, 0xb0, 0);
    assert_eq!((b.chip.cr8(0), b.get(0, 0x80)), (5, 0x50));
    assert!(!b.chip.pending(0));
    b.woken();
    b.chip.set_cr8(0, 4);
    assert_eq!(b.woken(), [0]);
    assert_eq!(b.chip.accept(0), Some(0x5f));
}

#[test]
fn shorthands_reach_self_all_and_others() {
    let b = Bench::new(3);
    for (low, expected) in [(0x4_0041, vec![1]), (0x8_0041, vec![0, 1, 2]), (0xc_0041, vec![0, 2])]
    {
        b.ipi(1, low, 0);
        assert_eq!(b.takers(3, 0x41), expected);
    }
}

#[test]
fn logical_flat_cluster_and_broadcast_destinations() {
    let b = Bench::new(3);
    b.ipi(0, 0x841, 0b101);
    assert_eq!(b.takers(3, 0x41), [0, 2]);
    b.ipi(0, 0x41, 0xff);
    assert_eq!(b.takers(3, 0x41), [0, 1, 2]);
    b.ipi(0, 0x41, 7);
    assert!(b.takers(3, 0x41).is_empty());
    for (vcpu, id) in [(0, 0x11), (1, 0x12), (2, 0x21)] {
        b.set(vcpu, 0xe0, 0);
        b.set(vcpu, 0xd0, id << 24);
    }
    b.ipi(0, 0x841, 0x13);
    assert_eq!(b.takers(3, 0x41), [0, 1]);
    b.ipi(0, 0x841, 0xf1);
    assert_eq!(b.takers(3, 0x41), [0, 2]);
}

#[test]
fn lowest_priority_picks_the_idlest_and_takes_turns() {
    let b = Bench::new(3);
    b.chip.set_cr8(0, 8);
    let mut hits = [0; 3];
    for _ in 0..10 {
        b.ipi(0, 0x941, 7);
        for vcpu in b.takers(3, 0x41) {
            hits[vcpu] += 1;
        }
    }
    assert_eq!(hits[0], 0);
    assert_eq!(hits[1] + hits[2], 10);
    assert!(hits[1] > 0 && hits[2] > 0);
}

#[test]
fn x2apic_transitions_follow_the_manual() {
    let b = Bench::new(1);
    let (off, xapic, x2apic) = (0xfee0_0100, 0xfee0_0900, 0xfee0_0d00);
    assert_eq!(b.msr(0, 0x802), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, 0xfee0_0500), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, x2apic), Ok(()));
    assert_eq!(b.get(0, 0x30), 0);
    assert_eq!(b.msr(0, 0x803), Ok(0x5_0014));
    assert_eq!(b.set_msr(0, 0x1b, xapic), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, off), Ok(()));
    assert_eq!(b.msr(0, 0x803), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, x2apic), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, xapic), Ok(()));
    // It comes back reset, thus soft disabled.
    assert_eq!(b.get(0, 0xf0), 0xff);
    assert_eq!(b.set_msr(0, 0x1b, xapic | 1), Err(ProtectionFault));
    assert_eq!(b.set_msr(0, 0x1b, xapic | 1 << 60), Err(ProtectionFault));
}

#[test]
fn x2apic_registers_fault_where_reserved() {
    let b = Bench::x2apic(18);
    assert_eq!(b.msr(17, 0x802), Ok(17));
    assert_eq!(b.msr(17, 0x80d), Ok(1 << 16 | 2));
    for msr in [0x800, 0x809, 0x80b, 0x80e, 0x82f, 0x831, 0x83f, 0x840, 0x8ff] {
        assert_eq!(b.msr(0, msr), Err(ProtectionFault), "{msr:#x}");
    }
    for (msr, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x808, 0x100),
        (0x80a, 0),
        (0x80b, 1),
        (0x80d, 0),
        (0x80f, 1 << 12),
        (0x810, 0),
        (0x828, 1),
        (0x830, 1 << 20),
        (0x832, 1 << 32),
        (0x839, 0),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(b.set_msr(0, msr, value), Err(ProtectionFault), "{msr:#x}");
    }
}

#[test]
fn x2apic_ipis_physical_logical_self_and_broadcast() {
    let b = Bench::x2apic(18);
    let accepted = || -> Vec<usize> {
        let takes = |&vcpu: &usize| {
            let accepted = b.chip.accept(vcpu);
            b.set_msr(vcpu, 0x80b, 0).ok();
            accepted == Some(0x41)
        };
        (0..18).filter(takes).collect()
    };
    b.set_msr(0, 0x830, 17 << 32 | 0x41).ok();
    assert_eq!(accepted(), [17]);
    assert_eq!(b.msr(0, 0x830), Ok(17 << 32 | 0x41));
    b.set_msr(0, 0x830, 0x0001_0003 << 32 | 0x841).ok();
    assert_eq!(accepted(), [16, 17]);
    b.set_msr(0, 0x830, 0xffff_ffff << 32 | 0x841).ok();
    assert_eq!(accepted().len(), 18);
    b.set_msr(3, 0x83f, 0x41).ok();
    assert_eq!(accepted(), [3]);
    // An 8-bit logical destination means cluster 0.
    b.chip.msi(0xfee0_6004, 0x41);
    assert_eq!(accepted(), [1, 2]);
}

#[test]
fn init_sipi_sipi_starts_once() {
    let b = Bench::new(2);
    b.ipi(0, 0x4500, 1);
    b.ipi(0, 0x8500, 1); // de-assert: nothing
    b.ipi(0, 0x69a, 1);
    b.ipi(0, 0x69a, 1);
    assert!(b.woken().iter().all(|&vcpu| vcpu == 1));
    assert_eq!(b.chip.take_event(1), Some(Event::Init));
    assert_eq!(b.get(1, 0xf0), 0xff);
    assert_eq!(b.chip.take_event(1), Some(Event::Sipi(0x9a)));
    assert_eq!(b.chip.take_event(1), None);
    b.ipi(0, 0x655, 1);
    assert_eq!(b.chip.take_event(1), None);
}

#[test]
fn init_keeps_the_apic_mode() {
    let b = Bench::x2apic(2);
    b.set_msr(0, 0x830, 1 << 32 | 0x4500).ok();
    assert_eq!(b.chip.take_event(1), Some(Event::Init));
    assert_eq!(b.msr(1, 0x80f), Ok(0xff));
    assert_eq!(b.msr(1, 0x802), Ok(1));
}

#[test]
fn nmi_is_an_event_even_when_soft_disabled() {
    let b = Bench::new(1);
    b.set(0, 0xf0, 0xff);
    b.chip.msi(0xfee0_0000, 0x400);
    assert!(!b.chip.pending(0));
    assert_eq!(b.chip.take_event(0), Some(Event::Nmi));
    assert_eq!(b.chip.take_event(0), None);
    b.chip.msi(0xfee0_0000, 0x41);
    assert!(!b.chip.pending(0));
}

#[test]
fn soft_disable_masks_the_vector_table() {
    let b = Bench::new(1);
    b.set(0, 0x320, 0x41);
    b.set(0, 0xf0, 0xff);
    assert_eq!(b.get(0, 0x320), 0x1_0041);
    b.set(0, 0x320, 0x42);
    assert_eq!(b.get(0, 0x320), 0x1_0042);
    b.set(0, 0xf0, 0x1ff);
    b.set(0, 0x320, 0x42);
    assert_eq!(b.get(0, 0x320), 0x42);
}

#[test]
fn errors_are_collected_shown_and_interrupt() {
    let b = Bench::new(1);
    b.set(0, 0x370, 0xfe);
    b.ipi(0, 0x0f, 0);
    assert_eq!(b.chip.accept(0), Some(0xfe));
    b.set(0, 0xb0, 0);
    assert_eq!(b.get(0, 0x280), 0);
    b.set(0, 0x280, 0);
    assert_eq!(b.get(0, 0x280), 0x20);
    b.chip.msi(0xfee0_0000, 0x03);
    b.get(0, 0x3f0);
    b.set(0, 0x280, 0);
    assert_eq!(b.get(0, 0x280), 0xc0);
    b.set(0, 0x280, 0);
    assert_eq!(b.get(0, 0x280), 0);
}

#[test]
fn level_interrupt_runs_through_eoi() {
    let b = Bench::new(1);
    b.entry(9, 0x8049, 0);
    b.chip.irq_line(9, true, 0);
    assert_eq!(b.chip.accept(0), Some(0x49));
    assert_eq!(b.get(0, 0x1a0), 1 << 9);
    assert!(!b.chip.pending(0));
    b.woken();
    b.set(0, 0xb0, 0);
    // Still asserted: once more, and the writer of EOI is told.
    assert_eq!(b.woken(), [0]);
    assert_eq!(b.chip.accept(0), Some(0x49));
    b.chip.irq_line(9, false, 0);
    b.set(0, 0xb0, 0);
    assert!(!b.chip.pending(0));
}

#[test]
fn edge_interrupt_through_both_controllers() {
    let b = Bench::new(1);
    b.pic();
    b.out(0x21, 0xef, 0);
    b.entry(4, 0x34, 0);
    b.chip.irq_line(4, true, 0);
    // ExtINT goes first.
    assert_eq!(b.chip.accept(0), Some(0x24));
    assert_eq!(b.chip.accept(0), Some(0x34));
    assert_eq!(b.chip.accept(0), None);
}

#[test]
fn pic_needs_lint0_or_a_disabled_bootstrap_apic() {
    let b = Bench::new(2);
    b.pic();
    b.out(0x21, 0xef, 0);
    b.set(0, 0x350, 0x1_0700);
    b.chip.irq_line(4, true, 0);
    assert!(!b.chip.pending(0));
    b.woken();
    b.set(0, 0x350, 0x700);
    assert_eq!(b.woken(), [0]);
    assert!(b.chip.pending(0));
    b.set(0, 0x350, 0x1_0700);
    for vcpu in 0..2 {
        b.set_msr(vcpu, 0x1b, 0xfee0_0000).ok();
    }
    assert!(b.chip.pending(0) && !b.chip.pending(1));
    assert_eq!(b.chip.accept(0), Some(0x24));
}

#[test]
fn ext_int_through_the_ioapic_runs_inta() {
    let b = Bench::new(1);
    b.pic();
    b.set(0, 0x350, 0x1_0700);
    b.out(0x21, 0xef, 0);
    b.entry(4, 0x700, 0);
    b.chip.irq_line(4, true, 0);
    assert_eq!(b.chip.accept(0), Some(0x24));
    assert!(!b.chip.pending(0));
}

#[test]
fn unprogrammed_pic_is_silent() {
    let b = Bench::new(1);
    b.chip.set_virtual_wire();
    for gsi in 0..24 {
        b.chip.irq_line(gsi, true, 0);
    }
    assert!(!b.chip.pending(0));
    // Linux's probe: the mask must read back before any ICW1.
    b.out(0x21, 0xfb, 0);
    assert_eq!(b.chip.port_read(0x21, 1, 0), Some(0xfb));
}

#[test]
fn pit_reaches_pic_pin_0_and_ioapic_pin_2() {
    let b = Bench::new(1);
    b.pic();
    b.entry(2, 0x30, 0);
    assert_eq!(b.chip.next_deadline(0), None);
    b.out(0x43, 0x34, 0);
    b.out(0x40, 0xa9, 0);
    b.woken();
    b.out(0x40, 0x04, 0); // 1193: 1 ms
    assert_eq!(b.woken(), [0]);
    let mut last = 0;
    for _ in 0..5 {
        let Some(deadline) = b.chip.next_deadline(0) else {
            panic!("the PIT must have a deadline");
        };
        assert!((998_000..=1_001_000).contains(&(deadline - last)));
        last = deadline;
        b.chip.run_timers(0, deadline - 1, 0);
        assert!(!b.chip.pending(0));
        b.chip.run_timers(0, deadline, 0);
        assert_eq!(b.chip.accept(0), Some(0x20));
        assert_eq!(b.chip.accept(0), Some(0x30));
        b.set(0, 0xb0, 0);
        b.out(0x20, 0x20, deadline);
    }
}

#[test]
fn port_access_catches_a_late_tick() {
    let b = Bench::new(1);
    b.pic();
    b.out(0x43, 0x38, 0);
    b.out(0x40, 100, 0);
    b.out(0x40, 0, 0);
    b.chip.port_read(0x61, 1, 1_000_000);
    assert_eq!(b.chip.accept(0), Some(0x20));
    assert_eq!(b.chip.next_deadline(0), None);
}

#[test]
fn ports_that_are_not_ours_are_refused() {
    let b = Bench::new(1);
    for port in [0, 0x1f, 0x22, 0x3f, 0x44, 0x60, 0x62, 0x9f, 0xa2, 0x4cf, 0xffff] {
        assert_eq!(b.chip.port_read(port, 1, 0), None);
        assert!(!b.chip.port_write(port, 4, !0, 0));
    }
    assert!(b.chip.port_write(0x4d0, 2, 0x0c08, 0));
    assert_eq!(b.chip.port_read(0x4d0, 4, 0), Some(0xffff_0c08));
}

#[test]
fn lapic_timer_modes_fire_on_time() {
    let b = Bench::new(2);
    let now = 5_000;
    b.chip.lapic_write(1, 0x3e0, 0xb, now, 0);
    b.chip.lapic_write(1, 0x320, 0xec, now, 0);
    b.chip.lapic_write(1, 0x380, 1000, now, 0);
    assert_eq!(b.chip.next_deadline(1), Some(6_000));
    assert_eq!(b.chip.next_deadline(0), None);
    assert_eq!(b.chip.lapic_read(1, 0x390, 5_400), 600);
    b.woken();
    b.chip.run_timers(1, 6_000, 0);
    assert_eq!(b.woken(), [1]);
    assert_eq!(b.chip.accept(1), Some(0xec));
    b.set(1, 0xb0, 0);
    // Masked: it runs on unseen and asks for no deadline.
    b.chip.lapic_write(1, 0x320, 0x3_00ec, 7_000, 0);
    b.chip.lapic_write(1, 0x380, 100_000, 7_000, 0);
    assert_eq!(b.chip.next_deadline(1), None);
    b.chip.lapic_write(1, 0x320, 0x2_00ec, 150_000, 0);
    assert!(!b.chip.pending(1));
    assert_eq!(b.chip.next_deadline(1), Some(207_000));
}

#[test]
fn tsc_deadline_fires_now_if_past_and_reads_zero_after() {
    let b = Bench::new(1);
    b.set(0, 0x320, 0x4_00ec);
    let (now, tsc) = (1_000_000, 2_000_000);
    assert_eq!(b.chip.apic_msr_write(0, 0x6e0, tsc + 2000, now, tsc), Ok(()));
    assert_eq!(b.chip.next_deadline(0), Some(now + 1000));
    assert_eq!(b.chip.apic_msr_read(0, 0x6e0, now, tsc), Ok(tsc + 2000));
    b.chip.run_timers(0, now + 1000, tsc + 2000);
    assert_eq!(b.chip.accept(0), Some(0xec));
    b.set(0, 0xb0, 0);
    assert_eq!(b.chip.apic_msr_read(0, 0x6e0, now, tsc), Ok(0));
    assert_eq!(b.chip.apic_msr_write(0, 0x6e0, 1, now, tsc), Ok(()));
    assert_eq!(b.chip.accept(0), Some(0xec));
    b.set(0, 0xb0, 0);
    assert_eq!(b.chip.apic_msr_write(0, 0x6e0, u64::MAX, now, tsc), Ok(()));
    assert_eq!(b.chip.apic_msr_write(0, 0x6e0, 0, now, tsc), Ok(()));
    assert_eq!(b.chip.next_deadline(0), None);
}

#[test]
fn vcpu_that_does_not_exist_is_harmless() {
    let b = Bench::new(1);
    b.set(9, 0x300, 0x4_0041);
    assert_eq!((b.get(9, 0x20), b.chip.apic_base(9), b.chip.cr8(9)), (0, 0, 0));
    assert_eq!(
        (b.msr(9, 0x1b), b.set_msr(9, 0x1b, 0)),
        (Err(ProtectionFault), Err(ProtectionFault))
    );
    b.chip.run_timers(9, !0, !0);
    assert!(!b.chip.pending(9));
    assert_eq!((b.chip.accept(9), b.chip.take_event(9)), (None, None));
    assert_eq!(b.chip.next_deadline(9), None);
}

/// All of a chip's state.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Saved {
    chipset: ChipsetState,
    lapics: Vec<LapicState>,
}

fn save(chip: &IrqChip, now: u64) -> Saved {
    let lapics = (0..).map_while(|vcpu| chip.lapic(vcpu, now)).collect();
    Saved { chipset: chip.chipset(), lapics }
}

fn load(chip: &IrqChip, state: &Saved, now: u64) -> Result<(), BadState> {
    chip.set_chipset(&state.chipset)?;
    let tsc = now.wrapping_mul(2);
    (0..).zip(&state.lapics).try_for_each(|(vcpu, lapic)| chip.set_lapic(vcpu, lapic, (now, tsc)))
}

#[test]
fn saved_state_continues_in_another_chip() {
    let b = Bench::new(2);
    b.pic();
    b.entry(9, 0x8049, 0);
    b.chip.irq_line(9, true, 0);
    b.out(0x43, 0x34, 0);
    b.out(0x40, 0xa9, 0);
    b.out(0x40, 0x04, 0);
    b.set(1, 0x320, 0x2_00ec);
    b.set(1, 0x380, 100_000);
    let saved = save(&b.chip, 0);
    let other = Bench::new(2);
    let fresh = save(&other.chip, 0);
    assert_ne!(fresh.lapics[0], saved.lapics[0]);
    assert_ne!(fresh.lapics[1], saved.lapics[1]);
    assert_ne!(fresh.chipset.pics, saved.chipset.pics);
    assert_ne!(fresh.chipset.pit, saved.chipset.pit);
    assert_ne!(fresh.chipset.ioapic, saved.chipset.ioapic);
    assert_ne!(fresh.chipset.lines, saved.chipset.lines);
    assert_eq!(load(&other.chip, &saved, 0), Ok(()));
    assert!(other.woken().contains(&1));
    assert_eq!(save(&other.chip, 0), saved);
    for vcpu in 0..2 {
        assert_eq!(other.chip.next_deadline(vcpu), b.chip.next_deadline(vcpu));
    }
    assert_eq!(other.chip.accept(0), Some(0x49));
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    let b = Bench::new(2);
    let saved = save(&b.chip, 0);
    let mut bad = saved.chipset;
    bad.pit.channels[1].count = 0;
    assert_eq!(b.chip.set_chipset(&bad), Err(BadState::PitCount(0)));
    let mut bad = saved.lapics[0].clone();
    bad.registers.pop();
    assert_eq!(b.chip.set_lapic(0, &bad, (0, 0)), Err(BadState::ApicRegisters(63)));
    let bad = LapicState { base: 1, ..saved.lapics[0].clone() };
    assert_eq!(b.chip.set_lapic(0, &bad, (0, 0)), Err(BadState::ApicBase(1)));
    assert_eq!(b.chip.set_lapic(2, &saved.lapics[0], (0, 0)), Err(BadState::Vcpu(2)));
    assert_eq!(save(&b.chip, 0), saved);
}

/// xorshift64*: enough to reach odd corners, and the seed tells all.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// Small, extreme or anything, as hostile values go.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(0x400),
            _ => self.next(),
        }
    }

    fn port(&mut self) -> u16 {
        const PORTS: [u16; 12] =
            [0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4d0, 0x4d1, 0xffff];
        PORTS[self.below(12) as usize]
    }

    fn msr(&mut self) -> u32 {
        match self.below(8) {
            0 => 0x1b,
            1 => 0x6e0,
            2 => self.next() as u32,
            _ => 0x800 + self.below(0x50) as u32,
        }
    }

    fn offset(&mut self) -> u32 {
        match self.below(8) {
            0 => self.next() as u32,
            _ => (self.below(0x40) << 4) as u32,
        }
    }
}

fn fuzz_step(chip: &IrqChip, r: &mut Random, now: &mut u64) {
    // One vCPU more than there are.
    let vcpu = r.below(5) as usize;
    let tsc = now.wrapping_mul(2);
    match r.below(20) {
        // Rare, because the PIT's clock never goes back: a jump to the end of time stops it.
        0 if r.below(2000) == 0 => *now = r.value(),
        0..=3 => *now = now.wrapping_add(r.below(1_000_000)),
        4 => drop(chip.port_read(r.port(), r.next() as u8, *now)),
        5 | 6 => drop(chip.port_write(r.port(), r.next() as u8, r.value() as u32, *now)),
        7 => drop(chip.lapic_read(vcpu, r.offset(), *now)),
        8 if r.below(8) == 0 => chip.lapic_write(vcpu, 0xf0, 0x1ff, *now, tsc),
        8 | 9 => chip.lapic_write(vcpu, r.offset(), r.value() as u32, *now, tsc),
        10 => drop(chip.ioapic_read(r.offset())),
        11 => {
            chip.ioapic_write(0, r.below(0x48) as u32);
            chip.ioapic_write(r.below(5) as u32 * 0x10, r.value() as u32);
        }
        12 => drop(chip.apic_msr_read(vcpu, r.msr(), *now, tsc)),
        13 | 14 => {
            let (msr, value) = match r.below(40) {
                // Each mode in turn, so that no APIC stays disabled for the rest of the run.
                0 => (0x1b, 0xfee0_0000 | r.below(4) << 10),
                1 => (0x80f, 0x1ff),
                _ => match r.msr() {
                    0x1b => (0x1b, r.next()),
                    0x6e0 => (0x6e0, tsc.wrapping_add(r.below(1_000_000))),
                    msr => (msr, r.value()),
                },
            };
            let _ = chip.apic_msr_write(vcpu, msr, value, *now, tsc);
        }
        15 => chip.msi(0xfee0_0000 | r.value() & 0xf_ffff, r.value() as u32),
        16 => chip.irq_line(r.below(26) as u32, r.below(2) == 0, *now),
        17 => chip.run_timers(vcpu, *now, tsc),
        18 => drop((chip.accept(vcpu), chip.take_event(vcpu))),
        _ => chip.set_cr8(vcpu, r.next() as u8),
    }
}

/// What must hold whatever the guest did; the number of interrupts taken.
fn check(chip: &IrqChip, now: u64) -> usize {
    let mut interrupts = 0;
    for vcpu in 0..4 {
        if chip.pending(vcpu) {
            assert!(chip.accept(vcpu).is_some());
            chip.lapic_write(vcpu, 0xb0, 0, now, 0);
            interrupts += 1;
        }
        let was_due = chip.next_deadline(vcpu).filter(|&d| d <= now);
        chip.run_timers(vcpu, now, now.wrapping_mul(2));
        if let Some(deadline) = was_due.and(chip.next_deadline(vcpu)) {
            assert!(deadline > now, "a deadline must move on: {deadline} {now}");
        }
    }
    interrupts
}

#[test]
fn random_operations_never_panic_and_state_survives_saving() {
    for seed in 1..=40u64 {
        // Spread over all bits; an odd factor keeps it from the generator's dead state, zero.
        let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut now = 0;
        let chip = Bench::new(4).chip;
        let mut interrupts = 0;
        for step in 0..5_000 {
            fuzz_step(&chip, &mut r, &mut now);
            if step % 16 == 0 {
                interrupts += check(&chip, now);
            }
        }
        // A run that never interrupts has not tested much.
        assert!(interrupts > 10, "seed {seed}: {interrupts} interrupts");
        let saved = save(&chip, now);
        let copy = Bench::new(4).chip;
        assert_eq!(load(&copy, &saved, now), Ok(()), "seed {seed}");
        assert_eq!(save(&copy, now), saved, "seed {seed}");
    }
}

#[test]
fn random_damage_to_saved_state_is_harmless() {
    let mut r = Random(7);
    let mut now = 0;
    let saved = postcard::to_stdvec(&save(&Bench::new(4).chip, 0)).unwrap();
    let mut loaded = 0;
    for _ in 0..3_000 {
        let mut damaged = saved.clone();
        for _ in 0..=r.below(4) {
            let index = r.below(damaged.len() as u64) as usize;
            damaged[index] = r.value() as u8;
        }
        let chip = Bench::new(4).chip;
        let Ok(state) = postcard::from_bytes::<Saved>(&damaged) else { continue };
        if load(&chip, &state, now).is_ok() {
            loaded += 1;
            for _ in 0..50 {
                fuzz_step(&chip, &mut r, &mut now);
            }
        }
    }
    assert!(loaded > 100, "{loaded} of the damaged states could be loaded");
}

#[test]
fn threads_that_interrupt_each_other_lose_nothing() {
    const ROUNDS: usize = 2_000;
    let b = Bench::new(2);
    let chip = &b.chip;
    let send = |from: usize| {
        chip.lapic_write(from, 0x310, (1 - from as u32) << 24, 0, 0);
        chip.lapic_write(from, 0x300, 0x41, 0, 0);
    };
    // One interrupt goes back and forth. A lost one would leave both waiting; the bound on the
    // polls turns that into a failure.
    let play = |vcpu: usize| {
        let mut taken = 0;
        for _ in 0..20_000_000 {
            if chip.pending(vcpu) && chip.accept(vcpu) == Some(0x41) {
                chip.lapic_write(vcpu, 0xb0, 0, 0, 0);
                taken += 1;
                send(vcpu);
                if taken == ROUNDS {
                    break;
                }
            } else {
                std::thread::yield_now();
            }
        }
        taken
    };
    send(0);
    let taken = std::thread::scope(|scope| {
        [0, 1].map(|vcpu| scope.spawn(move || play(vcpu))).map(|t| t.join().ok())
    });
    assert_eq!(taken, [Some(ROUNDS), Some(ROUNDS)]);
}
