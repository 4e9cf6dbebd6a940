//! The machine's clock and the guest's TSC.

use std::time::Duration;

use super::Body;
use super::guest::{Engine, Guest, tsc_can_be_set};

pub const BODIES: &[(&str, Body)] = &[("tsc_stands_with_the_clock", tsc_stands_with_the_clock)];

const TSC: u32 = 0x10;

fn tsc_stands_with_the_clock(engine: Engine) {
    if !tsc_can_be_set(engine) {
        return;
    }
    // rdtsc ; out 0x80, eax ; jmp to the start
    let mut guest = Guest::new(engine, &[0x0F, 0x31, 0x66, 0xE7, 0x80, 0xEB, 0xF9]);
    let clock = guest.vm.clock().clone();
    let first = guest.out();
    guest.settle();
    clock.stop().expect("it runs");
    let stands = (clock.now_ns(), clock.tsc());
    let held = std::time::Instant::now();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((clock.now_ns(), clock.tsc()), stands);
    let before = guest.vcpu.save().expect("between two instructions").tsc;
    std::thread::sleep(Duration::from_millis(200));
    let after = guest.vcpu.save().expect("between two instructions").tsc;
    // What a kernel keeps is read a little before or after the pause is measured.
    let hz = guest.vm.save().expect("no vCPU runs").tsc_hz;
    assert!(after.abs_diff(before) < hz / 20, "{} ticks in 0.2 s", after.abs_diff(before));
    let pause = held.elapsed();
    clock.start().expect("it stands");
    let second = guest.out();
    // Reads of 32 bits: a pause that had counted would show in the difference,
    // unless the host took as long again for two exits.
    let ticks = u64::from(second.wrapping_sub(first));
    let paused = (pause.as_nanos() as u64).saturating_mul(hz / 1000) / 1_000_000;
    assert!(ticks < paused, "{ticks} ticks over a pause of {paused}");
    assert!(guest.vcpu.msr(TSC).unwrap().is_some_and(|tsc| tsc >= before));
}
