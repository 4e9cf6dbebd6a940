//! Interrupt controllers under any sequence of accesses.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tetrarch_engine::cpuid::Topology;
use tetrarch_engine_bt::irqchip::{IrqChip, Wake};

use super::input::Input;

const VCPUS: usize = 3;
const TSC_HZ: u64 = 2_500_000_000;

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(&self, vcpu: usize) {
        assert!(vcpu < VCPUS);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn chip() -> IrqChip {
    IrqChip::new(Topology::flat(VCPUS as u32), TSC_HZ, Arc::new(Wakes::default()))
}

fn tsc(now: u64) -> u64 {
    (u128::from(now) * u128::from(TSC_HZ) / 1_000_000_000) as u64
}

fn port(input: &mut Input) -> u16 {
    const PORTS: [u16; 12] =
        [0x20, 0x21, 0xA0, 0xA1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4D0, 0x4D1, 0x92];
    PORTS[usize::from(input.u8()) % PORTS.len()]
}

fn msr(input: &mut Input) -> u32 {
    match input.u8() {
        0 => 0x1B,
        1 => 0x6E0,
        byte => 0x800 + u32::from(byte),
    }
}

pub fn irqchip(data: &[u8]) {
    let mut input = Input::new(data);
    let chip = chip();
    if input.bool() {
        chip.set_virtual_wire();
    }
    let mut now = 0u64;
    let mut steps = 0;
    while !input.is_empty() && steps < 4096 {
        steps += 1;
        let op = input.u8();
        let vcpu = usize::from(op >> 5) % (VCPUS + 1);
        match op & 31 {
            0..=3 => {
                let (port, size) = (port(&mut input), input.u8() % 6);
                chip.port_write(port, size, input.u32(), now);
            }
            4 | 5 => drop(chip.port_read(port(&mut input), input.u8() % 6, now)),
            6..=9 => {
                let offset = u32::from(input.u8()) << 4 | u32::from(op >> 7);
                chip.lapic_write(vcpu, offset, input.u32(), now, tsc(now));
            }
            10 => drop(chip.lapic_read(vcpu, u32::from(input.u16()), now)),
            11..=13 => {
                // Select, then data: most useful in pairs.
                chip.ioapic_write(0, u32::from(input.u8() & 0x3F));
                chip.ioapic_write(0x10, input.u32());
            }
            14 => drop(chip.ioapic_read(u32::from(input.u8()))),
            15 => {
                let number = msr(&mut input);
                let _ = chip.apic_msr_write(vcpu, number, input.u64(), now, tsc(now));
            }
            16 => drop(chip.apic_msr_read(vcpu, msr(&mut input), now, tsc(now))),
            17..=19 => chip.irq_line(u32::from(input.u8() & 31), op & 32 != 0, now),
            20 => chip.msi(0xFEE0_0000 | u64::from(input.u32()), input.u32()),
            21 => chip.msi(input.u64(), input.u32()),
            22 | 23 => accept(&chip, vcpu),
            24 => drop(chip.take_event(vcpu)),
            25 => chip.set_cr8(vcpu, input.u8()),
            26 => now = now.saturating_add(u64::from(input.u32())),
            27 => now = now.saturating_add(u64::from(input.u16()) << 24),
            28 => now = chip.next_deadline(vcpu).unwrap_or(now).max(now),
            29 => now = now.saturating_add(input.u64() >> ((op >> 5) * 8)),
            30 => timers(&chip, vcpu, now),
            _ => saved_is_loaded(&chip, now),
        }
        assert!(chip.cr8(vcpu) < 16);
        chip.apic_base(vcpu);
    }
    saved_is_loaded(&chip, now);
    for vcpu in 0..VCPUS {
        timers(&chip, vcpu, now);
    }
}

fn accept(chip: &IrqChip, vcpu: usize) {
    let pending = chip.pending(vcpu);
    let accepted = chip.accept(vcpu);
    assert!(!pending || accepted.is_some(), "pending, but there was nothing to accept");
}

/// What is due must not be due again at the same moment: the run loop would
/// never come to guest code.
fn timers(chip: &IrqChip, vcpu: usize, now: u64) {
    chip.run_timers(vcpu, now, tsc(now));
    let deadline = chip.next_deadline(vcpu);
    assert!(
        deadline.is_none_or(|deadline| deadline > now || now == u64::MAX),
        "still due at {now}: {deadline:?}"
    );
}

fn saved_is_loaded(chip: &IrqChip, now: u64) {
    let other = self::chip();
    let chipset = chip.chipset();
    other.set_chipset(&chipset).expect("what was saved is valid");
    assert!(other.chipset() == chipset, "loading changed the state");
    for vcpu in 0..VCPUS {
        let lapic = chip.lapic(vcpu, now).expect("it exists");
        other.set_lapic(vcpu, &lapic, (now, tsc(now))).expect("what was saved is valid");
        assert!(other.lapic(vcpu, now) == Some(lapic), "loading changed the state");
        assert_eq!(chip.pending(vcpu), other.pending(vcpu));
        assert_eq!(chip.next_deadline(vcpu), other.next_deadline(vcpu));
    }
}
