//! Events that raise an interrupt.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use tetrarch_engine::{IrqfdId, MSI_GSIS};

use super::Body;
use super::guest::{Engine, Event, Guest};
use super::interrupts::{BOOT_CPU, expect, idle, to_boot_cpu};

pub const BODIES: &[(&str, Body)] = &[
    ("event_sends_the_message_of_its_line_at_that_moment", message),
    ("event_gives_an_edge_on_a_pin", edge),
    ("event_that_was_signalled_before_it_was_tied_is_not_lost", signalled_before),
    ("event_that_was_taken_away_raises_nothing", taken_away),
    ("event_signalled_while_the_machine_is_held_is_not_lost", held),
    ("level_lasts_until_its_end_and_its_device_hears_of_each", level),
    ("level_of_an_event_and_of_a_device_are_wired_or", shared_line),
    ("level_goes_low_when_its_event_is_taken_away", level_taken_away),
    ("level_ends_at_the_pics_too", pics),
    ("device_hears_of_controllers_that_were_loaded", loaded),
    ("event_that_cannot_be_is_refused", refused),
];

/// A pin whose entry is level triggered.
const LEVEL: u32 = 1 << 15;

fn add(guest: &Guest, gsi: u32, event: &Event) -> IrqfdId {
    let added = guest.vm.add_irqfd(gsi, event.as_fd(), None);
    added.unwrap_or_else(|error| panic!("{error}"))
}

fn add_level(guest: &Guest, gsi: u32) -> (Event, Event, IrqfdId) {
    let (event, resample) = (Event::new(), Event::new());
    let added = guest.vm.add_irqfd(gsi, event.as_fd(), Some(resample.as_fd()));
    (event, resample, added.unwrap_or_else(|error| panic!("{error}")))
}

fn message(engine: Engine) {
    let mut guest = idle(engine, &[]);
    let (first, second) = (Event::new(), Event::new());
    add(&guest, 24, &first);
    add(&guest, 25, &second);
    for vector in [0x31, 0x33] {
        let routes = [(24, to_boot_cpu(vector)), (25, to_boot_cpu(vector + 1))];
        guest.vm.set_msi_routes(&routes).expect("lines");
        first.signal();
        assert_eq!(guest.out() as u8, vector);
        second.signal();
        assert_eq!(guest.out() as u8, vector + 1);
        expect(&mut guest, &[]);
    }
}

fn edge(engine: Engine) {
    let mut guest = idle(engine, &[(5, 0x31)]);
    let (event, other) = (Event::new(), Event::new());
    add(&guest, 5, &event);
    add(&guest, 5, &other);
    for event in [&event, &event, &other] {
        event.signal();
        assert_eq!(guest.out(), 0x31);
        expect(&mut guest, &[]);
    }
}

fn signalled_before(engine: Engine) {
    let mut guest = idle(engine, &[(5, 0x31)]);
    let event = Event::new();
    event.signal();
    event.signal();
    add(&guest, 5, &event);
    assert_eq!(guest.out(), 0x31);
    expect(&mut guest, &[]);
}

fn taken_away(engine: Engine) {
    let mut guest = idle(engine, &[(5, 0x31), (6, 0x32)]);
    let (event, other) = (Event::new(), Event::new());
    add(&guest, 6, &other);
    for _ in 0..20 {
        let id = add(&guest, 5, &event);
        event.signal();
        assert_eq!(guest.out(), 0x31);
        guest.vm.remove_irqfd(id).unwrap_or_else(|error| panic!("{error}"));
        event.signal();
        other.signal();
        assert_eq!(guest.out(), 0x32);
        expect(&mut guest, &[]);
        assert_eq!(event.take(), 1, "the signal is still there");
        assert!(guest.vm.remove_irqfd(id).is_err());
    }
}

fn held(engine: Engine) {
    let mut guest = idle(engine, &[(5, 0x31)]);
    guest.vm.set_msi_routes(&[(24, to_boot_cpu(0x32))]).expect("a line");
    let (line, message) = (Event::new(), Event::new());
    add(&guest, 5, &line);
    add(&guest, 24, &message);
    for event in [&line, &message] {
        guest.settle();
        guest.vm.clock().stop().expect("it runs");
        event.signal();
        guest.vcpu.save().expect("between two");
        guest.vm.save().expect("no vCPU runs");
        guest.vm.clock().start().expect("it stands");
        guest.out();
        expect(&mut guest, &[]);
    }
}

/// Whether an interrupt is in service until the guest ends it. A KVM without hardware
/// may end it when it delivers it.
fn guest_ends_interrupts(engine: Engine) -> bool {
    const IN_SERVICE: usize = 0x10; // one register for 32 vectors
    let mut guest = idle(engine, &[]);
    guest.vm.msi(BOOT_CPU, 0x31);
    assert_eq!(guest.out(), 0x31);
    guest.settle();
    let lapic = guest.vcpu.save().expect("between two").lapic;
    let kept = lapic.registers[IN_SERVICE + 0x31 / 32] >> (0x31 % 32) & 1 != 0;
    assert!(kept || engine == Engine::Kvm);
    if !kept {
        eprintln!("left out: this KVM does not wait for the end of an interrupt");
    }
    kept
}

fn level(engine: Engine) {
    let early = !guest_ends_interrupts(engine);
    let mut guest = idle(engine, &[(10, 0x31 | LEVEL), (11, 0x32 | LEVEL)]);
    let (event, resample, _) = add_level(&guest, 10);
    let (_other, silent, _) = add_level(&guest, 11);
    for _ in 0..3 {
        event.signal();
        assert_eq!(guest.out(), 0x31);
        let ended = resample.take();
        assert!(ended == 0 || early, "it is in service");
        expect(&mut guest, &[]);
        assert_eq!(ended + resample.take(), 1);
        // The device still wants service.
        event.signal();
        assert_eq!(guest.out(), 0x31);
        expect(&mut guest, &[]);
        assert_eq!((resample.take(), silent.take()), (1, 0));
    }
}

fn shared_line(engine: Engine) {
    if !guest_ends_interrupts(engine) {
        return;
    }
    let mut guest = idle(engine, &[(10, 0x31 | LEVEL)]);
    let (event, resample, _) = add_level(&guest, 10);
    let (_other, second_resample, _) = add_level(&guest, 10);
    event.signal();
    assert_eq!(guest.out(), 0x31);
    guest.vm.irq_line(10, true);
    assert_eq!(guest.out(), 0x31, "a device holds the line");
    assert_eq!((resample.take(), second_resample.take()), (1, 1));
    guest.vm.irq_line(10, false);
    expect(&mut guest, &[]);
    assert_eq!((resample.take(), second_resample.take()), (1, 1));
}

fn level_taken_away(engine: Engine) {
    if !guest_ends_interrupts(engine) {
        return;
    }
    let mut guest = idle(engine, &[(10, 0x31 | LEVEL)]);
    guest.vm.irq_line(10, true);
    assert_eq!(guest.out(), 0x31);
    // In service; the event holds the line beside the device.
    let (event, _resample, id) = add_level(&guest, 10);
    event.signal();
    guest.vm.save().expect("a look at it");
    guest.vm.remove_irqfd(id).expect("there");
    guest.vm.irq_line(10, false);
    expect(&mut guest, &[]);
}

fn pics(engine: Engine) {
    let mut code = Vec::new();
    for (port, value) in [
        (0x20u8, 0x11u8), // both PICs, from 0x20 and 0x28 on; lines 2 and 11 alone
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0xA0, 0x11),
        (0xA1, 0x28),
        (0xA1, 2),
        (0xA1, 1),
        (0x21, 0xFB),
        (0xA1, 0xF7),
    ] {
        code.extend([0xB0, value, 0xE6, port]);
    }
    // mov dx, 0x4d1 ; mov al, 8 ; out dx, al ; out 0x80, al ; sti ; hlt ; jmp to the hlt
    code.extend([0xBA, 0xD1, 4, 0xB0, 8, 0xEE, 0xE6, 0x80, 0xFB, 0xF4, 0xEB, 0xFD]);
    let mut guest = Guest::new(engine, &code);
    guest.write(0x2B * 4, &0x3000u32.to_le_bytes());
    // mov al, 1 ; out 0x80, al ; mov al, 0x20 ; out 0xa0, al ; out 0x20, al ; mov al, 2 ;
    // out 0x80, al ; iret
    guest.write(
        0x3000,
        &[0xB0, 1, 0xE6, 0x80, 0xB0, 0x20, 0xE6, 0xA0, 0xE6, 0x20, 0xB0, 2, 0xE6, 0x80, 0xCF],
    );
    guest.out();
    let (event, resample, _) = add_level(&guest, 11);
    for _ in 0..3 {
        event.signal();
        assert_eq!((guest.out(), resample.take()), (1, 0));
        assert_eq!((guest.out(), resample.take()), (2, 1));
        // No second interrupt comes: the next is that of the next signal.
    }
}

fn loaded(engine: Engine) {
    let mut guest = idle(engine, &[(10, 0x31 | LEVEL)]);
    let (event, resample, _) = add_level(&guest, 10);
    guest.settle();
    let state = guest.vm.save().expect("no vCPU runs");
    event.signal();
    assert_eq!(guest.out(), 0x31);
    guest.settle();
    resample.take();
    guest.vm.load(&state).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(resample.take(), 1, "the device is asked");
}

fn refused(engine: Engine) {
    let mut guest = idle(engine, &[(5, 0x31)]);
    let (event, resample) = (Event::new(), Event::new());
    let blocking: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
    let null: OwnedFd = std::fs::File::open("/dev/null").expect("there").into();
    let (ours, theirs) = (event.as_fd(), Some(resample.as_fd()));
    for (gsi, event, resample, cause) in [
        (MSI_GSIS.end, ours, None, "it is no line"),
        (u32::MAX, ours, None, "it is no line"),
        (24, ours, theirs, "messages, which nobody ends"),
        (0, ours, theirs, "the interval timer's"),
        (5, null.as_fd(), None, "no eventfd"),
        (5, ours, Some(null.as_fd()), "no eventfd"),
        (5, blocking.as_fd(), None, "lets its reader wait"),
    ] {
        let error = guest.vm.add_irqfd(gsi, event, resample).expect_err("cannot be");
        let (what, mend) = error.parts();
        assert!(what.contains(cause) && mend.is_some(), "{what}");
    }
    add(&guest, 5, &event);
    let again = ours.try_clone_to_owned().expect("a descriptor");
    let twice = guest.vm.add_irqfd(6, again.as_fd(), None).expect_err("taken").to_string();
    // Linux before 5.2 does not say which event a descriptor is.
    assert!(twice.contains("raises line 5 already") || engine == Engine::Kvm, "{twice}");
    event.signal();
    assert_eq!(guest.out(), 0x31);
}
