//! Saved state: all of it comes back, and the guest goes on as if nothing had been.

use std::time::Instant;

use tetrarch_engine::{RunState, Saved, VcpuState, VmState};
use tetrarch_memory::GuestPhys;

use super::Body;
use super::guest::{CODE, Engine, Guest, MIB, tsc_can_be_set};

pub const BODIES: &[(&str, Body)] = &[
    ("state_is_not_that_of_a_fresh_machine_and_comes_back", state_comes_back),
    ("guest_with_timers_goes_on_in_another_vm", |engine| goes_on(engine, engine)),
    ("state_of_another_kind_is_refused", state_of_another_kind_is_refused),
];

/// From one engine to another.
type Between = fn(Engine, Engine);

pub const BETWEEN: &[(&str, Between)] = &[
    ("guest_with_timers_goes_on_in_another_vm", goes_on),
    ("registers_come_over", registers_come_over),
];

/// Everything that a machine has beside its memory, by way of bytes.
fn save(guest: &mut Guest) -> (VmState, VcpuState) {
    let vm = guest.vm.save().expect("no vCPU runs").to_bytes().expect("plain values");
    let vcpu = guest.vcpu.save().expect("between two").to_bytes().expect("plain values");
    (VmState::from_bytes(&vm).expect("as written"), VcpuState::from_bytes(&vcpu).expect("so too"))
}

fn load(guest: &mut Guest, (vm, vcpu): &(VmState, VcpuState)) {
    guest.vm.load(vm).unwrap_or_else(|error| panic!("{error}"));
    guest.vcpu.load(vcpu).unwrap_or_else(|error| panic!("{error}"));
}

fn copy_memory(from: &Guest, to: &Guest) {
    let mut data = vec![0; MIB as usize];
    from.memory.read(GuestPhys(0), &mut data).expect("RAM");
    to.memory.write(GuestPhys(0), &data).expect("RAM");
}

/// Programs PIT (counters 0 and 2), both PICs and the I/O APIC through ports and
/// memory, then registers of every kind.
const PROGRAM: &[u8] = &[
    0xB0, 0x34, 0xE6, 0x43, 0xB0, 0xA9, 0xE6, 0x40, 0xB0, 0x04, 0xE6,
    0x40, // counter 0, mode 2
    0xB0, 0xB6, 0xE6, 0x43, 0xB0, 0x33, 0xE6, 0x42, 0xB0, 0x05, 0xE6,
    0x42, // counter 2, mode 3
    0xB0, 0x03, 0xE6, 0x61, // its gate, and the speaker
    0xB0, 0x11, 0xE6, 0x20, 0xB0, 0x30, 0xE6, 0x21, 0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x01, 0xE6, 0x21,
    0xB0, 0xEE, 0xE6, 0x21, // the primary PIC at 0x30
    0xB0, 0x11, 0xE6, 0xA0, 0xB0, 0x38, 0xE6, 0xA1, 0xB0, 0x02, 0xE6, 0xA1, 0xB0, 0x03, 0xE6, 0xA1,
    0xB0, 0xDD, 0xE6, 0xA1, // the secondary, with automatic EOI
    0xB0, 0x0C, 0xBA, 0xD0, 0x04, 0xB0, 0x20, 0xEE, // ELCR: line 5 is a level
    0xB0, 0x07, 0xE6, 0x80, // out 0x80, 7
];

fn programmed(engine: Engine) -> Guest {
    let mut guest = Guest::new(engine, PROGRAM);
    guest.vm.irq_line(4, true);
    assert_eq!(guest.out(), 7);
    guest.settle();
    let mut state = guest.vcpu.save().expect("between two instructions");
    state.registers.gpr = std::array::from_fn(|index| 0x1111 * (index as u64 + 1));
    state.registers.rflags = 0x8D7;
    state.system.fs.base = 0x7_0000;
    state.system.fs.selector = 0x7000;
    state.system.gdt.base = 0x5000;
    state.system.cr2 = 0xDEAD_B000;
    state.debug.breakpoints = [1, 2, 3, 4];
    state.debug.dr7 = 0x700;
    state.debug.dr6 = 0xFFFF_4FF0;
    state.xsave[32..36].copy_from_slice(&[1, 2, 3, 4]); // ST0
    state.xsave[160..164].copy_from_slice(&[5, 6, 7, 8]); // XMM0
    state.xsave[512] |= 3;
    state.events.nmi_blocked = true;
    state.events.nmi = true;
    state.events.shadow_sti = true;
    state.run = RunState::Halted;
    for (index, value) in [(0x174, 0x10), (0xC000_0081, 0x23_0010_0000_0000), (0xC000_0102, 0x77)] {
        let msr = state.msrs.iter_mut().find(|(number, _)| *number == index);
        msr.unwrap_or_else(|| panic!("MSR {index:#x} is not saved")).1 = value;
    }
    state.lapic.registers[0x0F] = 0x1AB; // SVR
    state.lapic.registers[0x32] = 0x2_0041; // LVT timer: periodic
    state.lapic.registers[0x38] = 50_000_000;
    state.lapic.registers[0x39] = 40_000_000;
    // By 128: seconds are left, so that it does not fire while a busy host saves and loads.
    state.lapic.registers[0x3E] = 0xA;
    state.lapic.registers[0x22] = 1 << 5; // IRR: vector 0x45
    state.lapic.registers[0x08] = 0x50; // TPR
    state.lapic.timer_left_ns = None;
    state.system.cr8 = 5;
    state.tsc = 1 << 50;
    guest.vcpu.load(&state).unwrap_or_else(|error| panic!("{error}"));
    guest
}

fn state_comes_back(engine: Engine) {
    let mut guest = programmed(engine);
    let clock = guest.vm.clock().clone();
    clock.stop().expect("it runs");
    let saved = save(&mut guest);
    let mut other = Guest::new(engine, &[]);
    other.vm.clock().stop().expect("it runs");
    let fresh = save(&mut other);

    // Each part differs from a fresh machine's, or a load that did nothing would pass.
    let (vm, vcpu) = (&saved.0, &saved.1);
    assert_ne!(vm.clock_ns, fresh.0.clock_ns);
    for (part, fresh) in vm.chipset.pics.iter().zip(&fresh.0.chipset.pics) {
        assert_ne!(part, fresh);
    }
    let (pit, fresh_pit) = (&vm.chipset.pit, &fresh.0.chipset.pit);
    assert_ne!(pit.channels[0].mode, fresh_pit.channels[0].mode);
    assert_ne!(pit.channels[2].count, fresh_pit.channels[2].count);
    assert_ne!(pit.control, fresh_pit.control);
    assert_ne!(vcpu.registers, fresh.1.registers);
    assert_ne!(vcpu.system, fresh.1.system);
    assert_ne!(vcpu.debug, fresh.1.debug);
    assert_ne!(vcpu.xsave, fresh.1.xsave);
    assert_ne!(vcpu.msrs, fresh.1.msrs);
    assert_ne!(vcpu.events, fresh.1.events);
    assert_ne!(vcpu.run, fresh.1.run);
    assert_ne!(vcpu.lapic.registers, fresh.1.lapic.registers);
    let tsc = tsc_can_be_set(engine);
    assert!(vcpu.tsc > fresh.1.tsc || !tsc);

    let begin = Instant::now();
    load(&mut other, &saved);
    let mut again = save(&mut other);
    let passed = begin.elapsed();
    // Counters that a kernel starts anew, and what it measures to a few ticks. KVM's TSC does
    // not stand, so it may be ahead by the time between load and save.
    let ticks = again.1.tsc.abs_diff(vcpu.tsc) as f64;
    let most = (passed.as_secs_f64() + 0.05) * vm.tsc_hz as f64;
    assert!(ticks < most || !tsc, "{ticks} of {most}");
    again.1.tsc = vcpu.tsc;
    if engine == Engine::Kvm {
        let left = |state: &VcpuState| state.lapic.registers[0x39];
        assert!(left(&again.1).abs_diff(left(vcpu)) < 50_000_000);
        again.1.lapic.registers[0x39] = left(vcpu);
        again.0.kvmclock_ns = vm.kvmclock_ns;
        again.0.chipset.pit.clock = pit.clock;
        for (new, old) in again.0.chipset.pit.channels.iter_mut().zip(&pit.channels) {
            new.counting = old.counting;
        }
        // That timer fires in a machine that stands, too.
        let irr = &mut again.0.chipset.pics[0].irr;
        *irr = *irr & !1 | vm.chipset.pics[0].irr & 1;
        again.0.chipset.lines = vm.chipset.lines;
        again.0.chipset.ioapic.lines = vm.chipset.ioapic.lines;
    }
    assert_eq!(again.0, *vm);
    assert_eq!(again.1, *vcpu);
}

fn registers_come_over(from: Engine, to: Engine) {
    let mut guest = programmed(from);
    guest.vm.clock().stop().expect("it runs");
    let (vm, vcpu) = save(&mut guest);
    let mut other = Guest::new(to, &[]);
    other.vm.clock().stop().expect("it runs");
    load(&mut other, &(vm.clone(), vcpu.clone()));
    let (vm_there, there) = save(&mut other);
    assert_eq!(there.registers, vcpu.registers);
    assert_eq!(there.system, vcpu.system);
    assert_eq!(there.debug, vcpu.debug);
    // AMD's CPUs know one shadow (APM 2, 15.21.5): KVM tells it as both kinds.
    let shadow = |state: &VcpuState| state.events.shadow_sti || state.events.shadow_mov_ss;
    assert_eq!(shadow(&there), shadow(&vcpu));
    let shadowless = |state: &VcpuState| {
        let mut events = state.events;
        (events.shadow_sti, events.shadow_mov_ss) = (false, false);
        events
    };
    assert_eq!(shadowless(&there), shadowless(&vcpu));
    assert_eq!(there.run, vcpu.run);
    assert_eq!(there.xsave[..416], vcpu.xsave[..416]);
    for index in [0x174, 0xC000_0081, 0xC000_0102] {
        let msr = |state: &VcpuState| state.msrs.iter().find(|msr| msr.0 == index).copied();
        assert_eq!(msr(&there), msr(&vcpu));
    }
    // But the current count, which goes on, and registers that one of them lacks.
    for register in [0x08, 0x0D, 0x0E, 0x0F, 0x22, 0x32, 0x33, 0x35, 0x36, 0x37, 0x38, 0x3E] {
        let (new, old) = (there.lapic.registers[register], vcpu.lapic.registers[register]);
        assert_eq!(new, old, "local APIC register {register:#x}");
    }
    let quiet = |state: &VmState| {
        let mut pics = state.chipset.pics;
        // Levels of lines that an interrupt does not wait for.
        pics[0].lines = 0;
        // The kernel's timer counts on, also while the clock stands.
        pics[0].irr &= !1;
        pics
    };
    assert_eq!(quiet(&vm_there), quiet(&vm));
    assert_eq!(vm_there.chipset.ioapic.entries, vm.chipset.ioapic.entries);
    assert_eq!(vm_there.clock_ns, vm.clock_ns);
}

fn state_of_another_kind_is_refused(engine: Engine) {
    let mut guest = Guest::new(engine, &[0xF4]);
    let (vm, vcpu) = save(&mut guest);
    let error = guest.vm.load(&VmState { vcpus: 3, ..vm.clone() }).unwrap_err().to_string();
    assert!(error.contains("3 vCPUs"), "{error}");
    let error = guest.vm.load(&VmState { tsc_hz: 1, ..vm.clone() }).unwrap_err().to_string();
    assert!(error.contains("TSC"), "{error}");
    for absurd in [
        VmState { clock_ns: u64::MAX, ..vm.clone() },
        VmState { kvmclock_ns: u64::MAX - 1, ..vm.clone() },
    ] {
        let error = guest.vm.load(&absurd).unwrap_err().to_string();
        assert!(error.contains("clock says"), "{error}");
    }
    // Nothing of it was taken, and time goes on from where it was.
    assert!(guest.vm.clock().now_ns() < vm.clock_ns + (1 << 40));
    let mut short = vcpu.clone();
    short.lapic.registers.pop();
    assert!(guest.vcpu.load(&short).is_err());
    let many = VcpuState { msrs: vec![(0x174, 0); 1 << 20], ..vcpu.clone() };
    let error = guest.vcpu.load(&many).unwrap_err().to_string();
    assert!(error.contains("1048576 MSRs"), "{error}");
    let short = VcpuState { xsave: vec![0; 100], ..vcpu };
    assert!(guest.vcpu.load(&short).is_err());
    assert!(VcpuState::from_bytes(&vm.to_bytes().expect("plain values")).is_err());
}

/// A real-mode kernel that counts PIT ticks and local work: at each tick its
/// handler writes the count to port 0x80.
///
///     handler (0x1100): inc word [0x500] ; mov ax, [0x500] ; out 0x80, ax ;
///                       mov al, 0x20 ; out 0x20, al ; iret
const HANDLER: &[u8] =
    &[0xFF, 0x06, 0x00, 0x05, 0xA1, 0x00, 0x05, 0xE7, 0x80, 0xB0, 0x20, 0xE6, 0x20, 0xCF];
/// PIT at 1,000 Hz, PIC at 0x20, then `sti ; hlt ; jmp` for ever.
const TICKER: &[u8] = &[
    0xB0, 0x11, 0xE6, 0x20, 0xB0, 0x20, 0xE6, 0x21, 0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x01, 0xE6, 0x21,
    0xB0, 0xFE, 0xE6, 0x21, 0xB0, 0x34, 0xE6, 0x43, 0xB0, 0xA9, 0xE6, 0x40, 0xB0, 0x04, 0xE6, 0x40,
    0xFB, 0xF4, 0xEB, 0xFC,
];

fn goes_on(from: Engine, to: Engine) {
    let mut first = Guest::new(from, TICKER);
    first.write(0x1100, HANDLER);
    first.write(0x20 * 4, &[0x00, 0x11, 0, 0]);
    for tick in 1..=20 {
        assert_eq!(first.out(), tick);
    }
    // Between two instructions of the handler, with its interrupt in service.
    first.settle();
    first.vm.clock().stop().expect("it runs");
    let saved = save(&mut first);
    let mut second = Guest::new(to, &[]);
    second.vm.clock().stop().expect("it runs");
    copy_memory(&first, &second);
    load(&mut second, &saved);
    drop(first);
    second.vm.clock().start().expect("it stands");
    assert_eq!(second.vcpu.registers().expect("state").rip & !0xFF, CODE + 0x100);
    let start = second.vm.clock().now_ns();
    assert!(start >= saved.0.clock_ns && start < saved.0.clock_ns + 1_000_000_000);
    for tick in 21..=40 {
        assert_eq!(second.out(), tick);
    }
    // Twenty ticks of a millisecond take no less, where none was missed that a
    // kernel makes up for.
    assert!(to == Engine::Kvm || second.vm.clock().now_ns() - start >= 18_000_000);
}
