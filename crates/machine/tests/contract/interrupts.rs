//! Interrupts from outside: lines that stand for messages.

use tetrarch_engine::{MSI_GSIS, Msi};

use super::Body;
use super::guest::{CODE, Engine, Guest};

pub const BODIES: &[(&str, Body)] = &[
    ("message_of_a_line_can_be_set_changed_and_removed", routes),
    ("message_of_a_line_changes_while_the_guest_runs", routes_of_a_running_guest),
    ("message_that_goes_to_no_local_apic_is_lost", other_address),
    ("every_line_has_a_message_and_no_other_can", all_lines),
];

/// Messages to the boot CPU go here.
pub const BOOT_CPU: u64 = 0xFEE0_0000;
const IOAPIC: u64 = 0xFEC0_0000;
/// Those that the guest has handlers for. The first is the last to be served.
const VECTORS: std::ops::Range<u8> = 0x30..0x38;

const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const HANDLERS: u64 = 0x8000;
/// Where the guest sees the local APIC and the I/O APIC.
const LAPIC: u32 = 0x10_1000;
const REDIRECTION: u32 = 0x10_2000;

fn mov_to(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xC7, 0x04, 0x25]; // mov dword [address], value
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

/// A 64-bit guest that halts, and writes to port 0x80 the vector of each interrupt that
/// comes before it ends it. `pins` are lines with the low halves of their entries.
pub fn idle(engine: Engine, pins: &[(u32, u32)]) -> Guest {
    let mut code = vec![0xB0, 0xFF, 0xE6, 0x21, 0xE6, 0xA1]; // all lines of the PICs masked
    code.extend(mov_to(LAPIC + 0xF0, 0x1FF)); // spurious vector, and on
    for &(pin, entry) in pins {
        for (register, value) in [(0x11 + pin * 2, 0), (0x10 + pin * 2, entry)] {
            code.extend(mov_to(REDIRECTION, register));
            code.extend(mov_to(REDIRECTION + 0x10, value));
        }
    }
    code.extend([0xE6, 0x80, 0xFB, 0xF4, 0xEB, 0xFD]); // out 0x80, al ; sti ; hlt ; jmp to the hlt
    let mut guest = Guest::new_64_bit(engine, &code);
    guest.map(LAPIC.into(), BOOT_CPU);
    guest.map(REDIRECTION.into(), IOAPIC);
    for (selector, descriptor) in [(8, 0x00AF_9B00_0000_FFFFu64), (16, 0x00CF_9300_0000_FFFF)] {
        guest.write(GDT + selector, &descriptor.to_le_bytes());
    }
    for vector in VECTORS {
        let at = HANDLERS + u64::from(vector) * 32;
        guest.write(IDT + u64::from(vector) * 16, &(at | 8 << 16 | 0x8E00 << 32).to_le_bytes());
        // push rax ; mov al, vector ; out 0x80, al ; end of interrupt ; pop rax ; iretq
        let mut handler = vec![0x50, 0xB0, vector, 0xE6, 0x80];
        handler.extend(mov_to(LAPIC + 0xB0, 0));
        handler.extend([0x58, 0x48, 0xCF]);
        guest.write(at, &handler);
    }
    let mut system = guest.vcpu.system_registers().expect("state");
    (system.gdt.base, system.gdt.limit) = (GDT, 23);
    (system.idt.base, system.idt.limit) = (IDT, 0xFFF);
    guest.vcpu.set_system_registers(&system).expect("tables");
    assert_eq!(guest.vcpu.registers().expect("state").rip, CODE);
    guest.out();
    guest
}

/// The vectors of the interrupts that wait, and no other.
pub fn expect(guest: &mut Guest, vectors: &[u8]) {
    guest.vm.msi(BOOT_CPU, VECTORS.start.into());
    for &vector in vectors {
        assert_eq!(guest.out() as u8, vector);
    }
    assert_eq!(guest.out() as u8, VECTORS.start, "no other");
}

pub fn to_boot_cpu(vector: u8) -> Option<Msi> {
    Some(Msi { address: BOOT_CPU, data: vector.into() })
}

fn routes(engine: Engine) {
    let mut guest = idle(engine, &[]);
    let set = |guest: &Guest, routes: &[(u32, Option<Msi>)]| {
        guest.vm.set_msi_routes(routes).unwrap_or_else(|error| panic!("{error}"));
    };
    guest.vm.irq_line(24, true);
    expect(&mut guest, &[]);
    set(&guest, &[(24, to_boot_cpu(0x31)), (25, to_boot_cpu(0x32))]);
    guest.vm.irq_line(24, true);
    expect(&mut guest, &[0x31]);
    guest.vm.irq_line(24, false);
    guest.vm.irq_line(25, true);
    expect(&mut guest, &[0x32]);
    set(&guest, &[(24, to_boot_cpu(0x33))]);
    guest.vm.irq_line(24, true);
    guest.vm.irq_line(25, true);
    expect(&mut guest, &[0x33, 0x32]);
    set(&guest, &[(25, None)]);
    guest.vm.irq_line(25, true);
    guest.vm.irq_line(24, true);
    expect(&mut guest, &[0x33]);
}

fn routes_of_a_running_guest(engine: Engine) {
    let mut guest = idle(engine, &[]);
    let vm = std::sync::Arc::clone(&guest.vm);
    for round in 0..50 {
        let vector = 0x31 + round % 4;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                vm.set_msi_routes(&[(30, to_boot_cpu(vector))]).expect("a line");
                vm.irq_line(30, true);
            });
            assert_eq!(guest.out() as u8, vector);
        });
    }
}

fn other_address(engine: Engine) {
    let mut guest = idle(engine, &[]);
    // RAM, what is below and above the local APICs, and beyond 4 GiB.
    for address in [0x1000, 0xFED0_0000, 0xFEF0_0000, BOOT_CPU | 1 << 32] {
        guest.vm.msi(address, 0x31);
        guest.vm.set_msi_routes(&[(24, Some(Msi { address, data: 0x32 }))]).expect("a line");
        guest.vm.irq_line(24, true);
        expect(&mut guest, &[]);
    }
}

fn all_lines(engine: Engine) {
    let mut guest = idle(engine, &[]);
    let all: Vec<_> = MSI_GSIS.map(|gsi| (gsi, to_boot_cpu(0x31))).collect();
    guest.vm.set_msi_routes(&all).unwrap_or_else(|error| panic!("{error}"));
    for gsi in [MSI_GSIS.start, MSI_GSIS.end - 1] {
        guest.vm.irq_line(gsi, true);
        expect(&mut guest, &[0x31]);
    }
    for gsi in [0, 23, MSI_GSIS.end, u32::MAX] {
        let change = [(24, None), (gsi, to_boot_cpu(0x32))];
        let error = guest.vm.set_msi_routes(&change).expect_err("no such line");
        assert!(error.parts().1.is_some(), "{error}");
    }
    // The list that was refused has changed nothing.
    guest.vm.irq_line(24, true);
    guest.vm.irq_line(MSI_GSIS.end, true);
    expect(&mut guest, &[0x31]);
}
