//! KVM's paravirtual interface as a guest meets it.

mod support;

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use support::case::{CODE, Fault};
use support::guest::{A, BASE, CODE_AT, D, End, FREE, Guest, KERNEL_CODE, P, U, W};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{Exit, Platform};
use tetrarch_engine_bt::Config;
use tetrarch_memory::GuestPhys;

const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];
const RDMSR: [u8; 2] = [0x0F, 0x32];
const WRMSR: [u8; 2] = [0x0F, 0x30];
const HLT: u8 = 0xF4;

const TSC: u32 = 0x10;
const X2APIC_EOI: u32 = 0x80B;
const WALL_CLOCK: u32 = 0x4B56_4D00;
const SYSTEM_TIME: u32 = 0x4B56_4D01;
const ASYNC_PF: u32 = 0x4B56_4D02;
const STEAL_TIME: u32 = 0x4B56_4D03;
const PV_EOI: u32 = 0x4B56_4D04;
const POLL_CONTROL: u32 = 0x4B56_4D05;

const GP: End = End::Fault(Fault { vector: 13, error: 0, cr2: 0 });

const PAGE: u64 = FREE + 0x1000;

fn guest(translate: bool) -> Guest {
    guest_of(translate, 1)
}

/// Of its vCPUs one runs.
fn guest_of(translate: bool, vcpus: u32) -> Guest {
    let platform = Platform { kvm: true, ..Platform::default() };
    let topology = Topology::flat(vcpus);
    let mut guest = Guest::of(Config { translate, platform, topology, ..Config::default() });
    guest.map(CODE, CODE_AT, P | W | U);
    guest
}

fn on_both(body: impl Fn(&mut Guest, &str)) {
    for (translate, name) in [(false, "interpreter"), (true, "translator")] {
        body(&mut guest(translate), name);
    }
}

/// Runs `code` and the HLT behind it at CPL 0; RAX afterwards.
fn run(guest: &mut Guest, code: &[u8], gpr: [u64; 16]) -> Result<u64, End> {
    guest.write(KERNEL_CODE, &[code, &[HLT]].concat());
    guest.start(true, BASE + KERNEL_CODE, gpr, 2);
    match guest.run() {
        End::Exit(Exit::Halt) => Ok(guest.vcpu.registers().expect("state").gpr[0]),
        end => Err(end),
    }
}

fn call(guest: &mut Guest, number: u64, [rbx, rcx, rdx, rsi]: [u64; 4]) -> i64 {
    let mut gpr = [0; 16];
    (gpr[0], gpr[3], gpr[1], gpr[2], gpr[6]) = (number, rbx, rcx, rdx, rsi);
    run(guest, &VMCALL, gpr).unwrap() as i64
}

fn write_msr(guest: &mut Guest, index: u32, value: u64) -> Result<(), End> {
    let mut gpr = [0; 16];
    (gpr[0], gpr[1], gpr[2]) = (value & 0xFFFF_FFFF, index.into(), value >> 32);
    run(guest, &WRMSR, gpr).map(drop)
}

fn read_msr(guest: &mut Guest, index: u32) -> Result<u64, End> {
    let mut gpr = [0; 16];
    gpr[1] = index.into();
    let low = run(guest, &RDMSR, gpr)?;
    Ok(low | guest.vcpu.registers().expect("state").gpr[2] << 32)
}

fn read32(guest: &Guest, physical: u64) -> u32 {
    guest.read64(physical & !7).to_le_bytes()[(physical & 4) as usize..][..4]
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u32::from(byte))
}

#[test]
fn leaves_name_kvm_and_its_features() {
    on_both(|guest, name| {
        let [max, ebx, ecx, edx] = guest.cpuid(0x4000_0000, 0);
        let text: Vec<u8> = [ebx, ecx, edx].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(text, b"KVMKVMKVM\0\0\0", "{name}");
        assert!(max >= 0x4000_0001, "{name}");
        let features = guest.cpuid(0x4000_0001, 0)[0];
        // Both clocks, no I/O delay, PV EOI, unhalt, IPIs, poll control, yield, stable clock.
        let expected = 0x0100_0000 | 1 << 13 | 1 << 12 | 1 << 11 | 1 << 7 | 1 << 6 | 0xB;
        assert_eq!(features & expected, expected, "{name}: {features:#x}");
        // No asynchronous page faults, extended MSI destinations, memory encryption.
        let others = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 17;
        assert_eq!(features & others, 0, "{name}: {features:#x}");
        let [tsc_khz, bus_khz, ..] = guest.cpuid(0x4000_0010, 0);
        assert!(tsc_khz > 100_000 && bus_khz == 1_000_000, "{name}: {tsc_khz} {bus_khz}");
    });
}

#[test]
fn unknown_hypercalls_are_refused_and_a_users_not_permitted() {
    on_both(|guest, name| {
        for number in [0, 2, 9, 12, 13, 1 << 32 | 1, u64::MAX] {
            assert_eq!(call(guest, number, [0; 4]), -1000, "{name}: {number}");
        }
        guest.write(CODE_AT, &[&VMCALL[..], &[HLT]].concat());
        guest.start(false, CODE, [1; 16], 2);
        assert_eq!(guest.run(), GP, "{name}: HLT in user mode");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[0] as i64, -1, "{name}");
        assert_eq!(guest.frame.rip, CODE + 3, "{name}");
    });
}

#[test]
fn msrs_without_a_feature_do_not_exist() {
    on_both(|guest, name| {
        for index in [ASYNC_PF, 0x4B56_4D06, 0x4B56_4D07, 0x4B56_4D08, 0x4B56_4CFF] {
            assert_eq!(read_msr(guest, index), Err(GP), "{name}: {index:#x}");
            assert_eq!(write_msr(guest, index, 0), Err(GP), "{name}: {index:#x}");
        }
    });
    // And none do on a platform that is not KVM's.
    let mut bare = Guest::new(false);
    for index in [0x11, 0x12, WALL_CLOCK, SYSTEM_TIME, STEAL_TIME, PV_EOI, POLL_CONTROL] {
        assert_eq!(read_msr(&mut bare, index), Err(GP), "{index:#x}");
    }
    assert_eq!(bare.cpuid(0x4000_0000, 0), [0; 4]);
}

/// The guest's clock by the structure at an address, at a value of its TSC.
fn clock_ns(guest: &Guest, at: u64, tsc: u64) -> u64 {
    assert_eq!(read32(guest, at) & 1, 0, "the structure is being changed");
    let (stamp, system) = (guest.read64(at + 8), guest.read64(at + 16));
    let (mul, last) = (read32(guest, at + 24), read32(guest, at + 28).to_le_bytes());
    let (shift, flags) = (last[0] as i8, last[1]);
    assert_eq!(flags, 1, "not stable");
    let ticks = tsc.wrapping_sub(stamp);
    let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
    system.wrapping_add(((u128::from(ticks) * u128::from(mul)) >> 32) as u64)
}

#[test]
fn clock_counts_machine_time_through_changes_of_the_tsc() {
    on_both(|guest, name| {
        for (index, at) in [(SYSTEM_TIME, PAGE), (0x12, PAGE + 0x40)] {
            write_msr(guest, index, at | 1).unwrap();
            assert_eq!(read_msr(guest, index), Ok(at | 1), "{name}");
            for tsc in [None, Some(0), Some(1 << 60)] {
                if let Some(tsc) = tsc {
                    write_msr(guest, TSC, tsc).unwrap();
                }
                let before = guest.vm.clock().now_ns();
                let tsc = read_msr(guest, TSC).unwrap();
                let after = guest.vm.clock().now_ns();
                let seen = clock_ns(guest, at, tsc);
                // The host's two clocks differ by parts in a million.
                let slack = 1_000 + after / 10_000;
                assert!(
                    (before - slack..after + slack).contains(&seen),
                    "{name}: {seen} not in {before}..{after}"
                );
            }
        }
    });
}

#[test]
fn clock_stands_with_the_machine() {
    const PAUSE_NS: u64 = 300_000_000;
    on_both(|guest, name| {
        write_msr(guest, SYSTEM_TIME, PAGE | 1).unwrap();
        guest.vm.clock().stop().unwrap();
        std::thread::sleep(std::time::Duration::from_nanos(PAUSE_NS));
        guest.vm.clock().start().unwrap();
        let before = guest.vm.clock().now_ns();
        let tsc = read_msr(guest, TSC).unwrap();
        let after = guest.vm.clock().now_ns();
        let seen = clock_ns(guest, PAGE, tsc);
        let slack = PAUSE_NS / 3;
        assert!(
            (before.saturating_sub(slack)..after + slack).contains(&seen),
            "{name}: {seen} not in {before}..{after}"
        );
    });
}

#[test]
fn clock_that_is_switched_off_is_written_no_more() {
    on_both(|guest, name| {
        write_msr(guest, SYSTEM_TIME, PAGE | 1).unwrap();
        let version = read32(guest, PAGE);
        write_msr(guest, SYSTEM_TIME, PAGE).unwrap();
        write_msr(guest, TSC, 5).unwrap();
        assert_eq!(read32(guest, PAGE), version, "{name}");
    });
}

#[test]
fn wall_clock_is_the_date_at_which_the_clock_was_zero() {
    on_both(|guest, name| {
        write_msr(guest, WALL_CLOCK, PAGE).unwrap();
        let start =
            u64::from(read32(guest, PAGE + 4)) * 1_000_000_000 + u64::from(read32(guest, PAGE + 8));
        assert_eq!(read32(guest, PAGE) & 1, 0, "{name}");
        let date = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let difference = date.abs_diff(start + guest.vm.clock().now_ns());
        assert!(difference < 5_000_000_000, "{name}: {difference} ns");
    });
}

#[test]
fn addresses_out_of_ram_hurt_nobody() {
    on_both(|guest, name| {
        for address in [0x4000_0000_u64, 0xFFFF_FFFF_FFFF_FFC0, (8 << 20) - 0x40, 0xFEE0_0000] {
            write_msr(guest, WALL_CLOCK, address).unwrap();
            write_msr(guest, SYSTEM_TIME, address | 1).unwrap();
            write_msr(guest, STEAL_TIME, address | 1).unwrap();
            let there = address < 8 << 20;
            assert_eq!(write_msr(guest, PV_EOI, address | 1).is_ok(), there, "{name}");
        }
        write_msr(guest, PV_EOI, 0).unwrap();
        write_msr(guest, STEAL_TIME, 0).unwrap();
    });
}

/// Waits in a loop with interrupts on until one comes; its vector.
fn interrupted(guest: &mut Guest) -> u8 {
    guest.write(KERNEL_CODE, &[0xEB, 0xFE]);
    guest.start(true, BASE + KERNEL_CODE, [0; 16], 0x202);
    match guest.run() {
        End::Fault(Fault { vector, .. }) => vector,
        end => panic!("{end:?}"),
    }
}

fn pending_bit(guest: &Guest) -> bool {
    guest.read64(PAGE) & 1 != 0
}

#[test]
fn interrupt_ended_by_memory_makes_way_for_the_next() {
    on_both(|guest, name| {
        write_msr(guest, PV_EOI, PAGE | 1).unwrap();
        guest.vm.msi(0xFEE0_0000, 0x31);
        assert_eq!(interrupted(guest), 0x31, "{name}");
        assert!(pending_bit(guest), "{name}");
        guest.write(PAGE, &[0]);
        // Of lower priority: it comes only if the first is known to have ended.
        guest.vm.msi(0xFEE0_0000, 0x21);
        assert_eq!(interrupted(guest), 0x21, "{name}");
        assert!(pending_bit(guest), "{name}");
    });
}

#[test]
fn interrupt_that_goes_on_holds_the_next_back_and_ends_at_the_apic() {
    on_both(|guest, name| {
        write_msr(guest, PV_EOI, PAGE | 1).unwrap();
        // x2APIC mode, for an EOI by MSR.
        let base = read_msr(guest, 0x1B).unwrap();
        write_msr(guest, 0x1B, base | 1 << 10).unwrap();
        guest.vm.msi(0xFEE0_0000, 0x31);
        assert_eq!(interrupted(guest), 0x31, "{name}");
        assert!(pending_bit(guest), "{name}");
        guest.vm.msi(0xFEE0_0000, 0x21);
        // nop ; hlt with interrupts off: the vCPU has been in its loop.
        run(guest, &[0x90], [0; 16]).unwrap();
        assert!(!pending_bit(guest), "{name}: the guest would not tell of its EOI");
        write_msr(guest, X2APIC_EOI, 0).unwrap();
        assert_eq!(interrupted(guest), 0x21, "{name}");
    });
}

#[test]
fn eoi_by_memory_is_not_offered_where_something_waits() {
    on_both(|guest, name| {
        write_msr(guest, PV_EOI, PAGE | 1).unwrap();
        guest.vm.msi(0xFEE0_0000, 0x21);
        guest.vm.msi(0xFEE0_0000, 0x31);
        assert_eq!(interrupted(guest), 0x31, "{name}");
        assert!(!pending_bit(guest), "{name}");
    });
}

#[test]
fn apic_shows_an_eoi_by_memory() {
    on_both(|guest, name| {
        write_msr(guest, PV_EOI, PAGE | 1).unwrap();
        let base = read_msr(guest, 0x1B).unwrap();
        write_msr(guest, 0x1B, base | 1 << 10).unwrap();
        guest.vm.msi(0xFEE0_0000, 0x31);
        assert_eq!(interrupted(guest), 0x31, "{name}");
        guest.write(PAGE, &[0]);
        // ISR, vectors 0x20 to 0x3F.
        assert_eq!(read_msr(guest, 0x811), Ok(0), "{name}");
    });
}

/// Kicks the guest out of a loop.
fn kicked(guest: &mut Guest) {
    guest.write(KERNEL_CODE, &[0xEB, 0xFE]);
    guest.start(true, BASE + KERNEL_CODE, [0; 16], 2);
    guest.vcpu.kicker().kick();
    assert_eq!(guest.run_raw(), Exit::Kicked);
}

/// Steal time is offered where the host tells how long a thread waited.
fn has_steal_time(guest: &mut Guest) -> bool {
    let told = std::fs::read("/proc/thread-self/schedstat").is_ok();
    assert_eq!(guest.cpuid(0x4000_0001, 0)[0] >> 5 & 1 != 0, told);
    if !told {
        println!("skipped: this host has no /proc/thread-self/schedstat");
    }
    told
}

#[test]
fn steal_time_is_kept_and_says_when_the_vcpu_is_away() {
    on_both(|guest, name| {
        if !has_steal_time(guest) {
            return;
        }
        assert_eq!(write_msr(guest, STEAL_TIME, PAGE | 3), Err(GP), "{name}");
        assert_eq!(write_msr(guest, STEAL_TIME, (PAGE + 0x20) | 1), Err(GP), "{name}");
        guest.write64(PAGE, 77);
        write_msr(guest, STEAL_TIME, PAGE | 1).unwrap();
        assert!(read32(guest, PAGE + 8) >= 2 && read32(guest, PAGE + 8) & 1 == 0, "{name}");
        assert!(guest.read64(PAGE) >= 77, "{name}: what was stolen before is kept");
        assert_eq!(guest.read64(PAGE + 16) & 0xFF, 0, "{name}: it runs");
        kicked(guest);
        assert_eq!(guest.read64(PAGE + 16) & 0xFF, 1, "{name}: it is away");
    });
}

#[test]
fn another_vcpus_wish_for_a_tlb_flush_is_seen_on_return() {
    on_both(|guest, name| {
        if !has_steal_time(guest) {
            return;
        }
        write_msr(guest, STEAL_TIME, PAGE | 1).unwrap();
        let (linear, old, new) = (0x1000_0000, FREE + 0x4000, FREE + 0x5000);
        guest.write64(old, 1);
        guest.write64(new, 2);
        guest.map(linear, old, P | W | A | D);
        // mov rax, [rbx]
        let mut gpr = [0; 16];
        gpr[3] = linear;
        for wish in [false, true] {
            // First into the TLB, then out of the guest without leaving it behind.
            guest.write(KERNEL_CODE, &[0x48, 0x8B, 0x03, 0xE6, 0x80, 0x48, 0x8B, 0x03, HLT]);
            guest.map(linear, old, P | W | A | D);
            guest.start(true, BASE + KERNEL_CODE, gpr, 2);
            assert!(matches!(guest.run_raw(), Exit::PortOut { .. }), "{name}");
            guest.vcpu.reply(tetrarch_engine::Reply::Done);
            guest.vcpu.kicker().kick();
            assert_eq!(guest.run_raw(), Exit::Kicked, "{name}");
            guest.map(linear, new, P | W | A | D);
            if wish {
                let flags = guest.memory.host(GuestPhys(PAGE + 16), 1).unwrap();
                // SAFETY: a mapped byte of the guest's memory, which lives on.
                let flags = unsafe { AtomicU8::from_ptr(flags) };
                // As Linux does (arch/x86/kernel/kvm.c, kvm_flush_tlb_multi).
                flags.compare_exchange(1, 3, Ordering::SeqCst, Ordering::SeqCst).unwrap();
            }
            assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
            let seen = guest.vcpu.registers().expect("state").gpr[0];
            // Without the wish the old translation may stay, and does.
            assert_eq!(seen, if wish { 2 } else { 1 }, "{name}");
            assert_eq!(guest.read64(PAGE + 16) & 0xFF, 0, "{name}: it runs again");
        }
    });
}

/// It is away while the machine is held, and so saved. Whoever took it for away when it runs
/// again would spare it the interrupt of a shootdown.
#[test]
fn vcpu_that_was_loaded_is_not_away() {
    on_both(|guest, name| {
        if !has_steal_time(guest) {
            return;
        }
        write_msr(guest, STEAL_TIME, PAGE | 1).unwrap();
        kicked(guest);
        let state = guest.vcpu.save().unwrap();
        guest.vcpu.load(&state).unwrap();
        // out 0x80, al
        guest.write(KERNEL_CODE, &[0xE6, 0x80]);
        assert!(matches!(guest.run_raw(), Exit::PortOut { .. }), "{name}");
        assert_eq!(guest.read64(PAGE + 16) & 0xFF, 0, "{name}: it runs");
    });
}

#[test]
fn poll_control_has_one_bit() {
    on_both(|guest, name| {
        assert_eq!(read_msr(guest, POLL_CONTROL), Ok(1), "{name}");
        write_msr(guest, POLL_CONTROL, 0).unwrap();
        assert_eq!(read_msr(guest, POLL_CONTROL), Ok(0), "{name}");
        assert_eq!(write_msr(guest, POLL_CONTROL, 2), Err(GP), "{name}");
    });
}

#[test]
fn ipis_by_hypercall_arrive_and_are_counted() {
    on_both(|guest, name| {
        // Targets 0 and 1, of which there is one; vector 0x31, fixed, asserted.
        assert_eq!(call(guest, 10, [3, 0, 0, 0x4031]), 1, "{name}");
        assert_eq!(interrupted(guest), 0x31, "{name}");
        assert_eq!(call(guest, 10, [1, 1, u64::from(u32::MAX), 0x4031]), 0, "{name}");
        // A logical destination, and a shorthand.
        assert_eq!(call(guest, 10, [1, 0, 0, 0x4831]), -22, "{name}");
        assert_eq!(call(guest, 10, [1, 0, 0, 0xC_4031]), -22, "{name}");
        assert_eq!(call(guest, 11, [0; 4]), 0, "{name}: yield");
        assert_eq!(call(guest, 1, [0; 4]), 0, "{name}: poll");
    });
}

#[test]
fn kick_ends_one_halt() {
    on_both(|guest, name| {
        // mov eax, 5 ; xor ebx, ebx ; xor ecx, ecx ; vmcall ; hlt ; mov edx, 7 ; hlt
        let code =
            [0xB8, 5, 0, 0, 0, 0x31, 0xDB, 0x31, 0xC9, 0x0F, 0x01, 0xC1, HLT, 0xBA, 7, 0, 0, 0];
        run(guest, &code, [0; 16]).unwrap();
        assert_eq!(guest.vcpu.registers().expect("state").gpr[2], 7, "{name}");
    });
}

/// A lock's waiter looks whether it may sleep, is kicked, and is saved before it has halted.
#[test]
fn kick_is_not_lost_with_the_machine_it_came_in() {
    for (translate, name) in [(false, "interpreter"), (true, "translator")] {
        let mut old = guest_of(translate, 2);
        // mov eax, 5 ; xor ebx, ebx ; xor ecx, ecx ; vmcall ; out 0x80, al ; hlt ; mov edx, 7 ; hlt
        let code = [
            0xB8, 5, 0, 0, 0, 0x31, 0xDB, 0x31, 0xC9, 0x0F, 0x01, 0xC1, 0xE6, 0x80, HLT, 0xBA, 7,
            0, 0, 0, HLT,
        ];
        old.write(KERNEL_CODE, &code);
        old.start(true, BASE + KERNEL_CODE, [0; 16], 2);
        assert!(matches!(old.run_raw(), Exit::PortOut { .. }), "{name}");
        old.vcpu.reply(tetrarch_engine::Reply::Done);
        old.vcpu.kicker().kick();
        assert_eq!(old.run_raw(), Exit::Kicked, "{name}");
        let mut new = guest_of(true, 2);
        new.write(KERNEL_CODE, &code);
        new.vcpu.load(&old.vcpu.save().unwrap()).unwrap();
        assert_eq!(new.run_raw(), Exit::Halt, "{name}");
        assert_eq!(new.vcpu.registers().expect("state").gpr[2], 7, "{name}");
    }
}

/// There a kick can have come from nobody.
#[test]
fn halt_of_the_only_vcpu_is_the_end_in_another_machine_too() {
    for (translate, name) in [(false, "interpreter"), (true, "translator")] {
        let mut old = guest(translate);
        let code = [HLT, 0xBA, 7, 0, 0, 0, HLT]; // mov edx, 7
        old.start(true, BASE + KERNEL_CODE, [0; 16], 2);
        let mut new = guest(translate);
        new.write(KERNEL_CODE, &code);
        new.vcpu.load(&old.vcpu.save().unwrap()).unwrap();
        assert_eq!(new.run_raw(), Exit::Halt, "{name}");
        assert_eq!(new.vcpu.registers().expect("state").gpr[2], 0, "{name}");
    }
}
