//! Doorbells: writes that signal an event and are no exit.

use std::os::fd::AsFd;

use tetrarch_engine::{Doorbell, DoorbellAddress, Exit, Reply};
use tetrarch_memory::GuestPhys;

use super::Body;
use super::guest::{Engine, Event, Guest};

pub const BODIES: &[(&str, Body)] = &[
    ("doorbell_takes_the_writes_of_its_size_and_value_alone", size_and_value),
    ("doorbell_in_memory_takes_writes_of_every_form", every_form_of_write),
    ("doorbell_rings_once_for_its_part_of_a_wide_write", part_of_a_write),
    ("doorbell_rings_for_each_item_of_a_string_instruction", string_instruction),
    ("doorbell_comes_and_goes_while_the_guest_runs", comes_and_goes),
    ("doorbell_under_ram_that_came_later_is_silent", under_ram),
    ("doorbell_that_cannot_be_is_refused", refused),
];

const NOTIFY: u64 = 0xD000_0050;

fn memory(size: Option<u8>, value: Option<u64>) -> Doorbell {
    Doorbell { address: DoorbellAddress::Memory(NOTIFY), size, value }
}

fn port(port: u16) -> Doorbell {
    Doorbell::at(DoorbellAddress::Port(port))
}

fn add(guest: &Guest, doorbell: Doorbell) -> Event {
    let event = Event::new();
    guest.vm.add_doorbell(doorbell, event.as_fd()).unwrap_or_else(|error| panic!("{error}"));
    event
}

/// Lets 64-bit code reach the page of [`NOTIFY`].
fn map_device(guest: &Guest) {
    guest.map(0x10_0000, NOTIFY & !0xFFF);
}

fn size_and_value(engine: Engine) {
    // mov al, 2 ; out 0x90, al ; mov al, 3 ; out 0x90, al ; out 0x90, ax ; out 0x92, eax ;
    // out 0x91, al ; out 0x80, al
    let code = [
        0xB0, 2, 0xE6, 0x90, 0xB0, 3, 0xE6, 0x90, 0xE7, 0x90, 0x66, 0xE7, 0x92, 0xE6, 0x91, 0xE6,
        0x80,
    ];
    let mut guest = Guest::new(engine, &code);
    let at = |size, value| Doorbell { address: DoorbellAddress::Port(0x90), size, value };
    let two = add(&guest, at(Some(1), Some(2)));
    let word = add(&guest, at(Some(2), None));
    let any = add(&guest, port(0x92));
    assert_eq!(guest.run(), Exit::PortOut { port: 0x90, size: 1, data: 3 });
    assert_eq!((two.take(), word.take(), any.take()), (1, 0, 0));
    guest.vcpu.reply(Reply::Done);
    assert_eq!(guest.run(), Exit::PortOut { port: 0x91, size: 1, data: 3 });
    assert_eq!((two.take(), word.take(), any.take()), (0, 1, 1));
    guest.vcpu.reply(Reply::Done);
    guest.out();
}

fn every_form_of_write(engine: Engine) {
    let mut code = Vec::new();
    let forms: &[&[u8]] = &[
        &[0x89, 0x04, 0x25],       // mov [...], eax
        &[0x66, 0x89, 0x04, 0x25], // mov [...], ax
        &[0x48, 0x89, 0x04, 0x25], // mov [...], rax
        &[0x88, 0x04, 0x25],       // mov [...], al
        &[0x0F, 0xC3, 0x04, 0x25], // movnti [...], eax
        &[0x66, 0x8C, 0x1C, 0x25], // mov [...], ds
    ];
    for form in forms {
        code.extend(*form);
        code.extend(0x10_0050u32.to_le_bytes());
    }
    // mov dword [0x100050], 9 ; mov eax, [0x100050] ; out 0x80, al ; jmp to the start
    code.extend([0xC7, 0x04, 0x25, 0x50, 0, 0x10, 0, 9, 0, 0, 0]);
    code.extend([0x8B, 0x04, 0x25, 0x50, 0, 0x10, 0, 0xE6, 0x80]);
    let back = -(code.len() as i32 + 5);
    code.push(0xE9);
    code.extend(back.to_le_bytes());
    let mut guest = Guest::new_64_bit(engine, &code);
    map_device(&guest);
    let event = add(&guest, memory(None, None));
    for _ in 0..3 {
        // A read is no ring.
        assert_eq!(guest.run(), Exit::MmioRead { address: NOTIFY, size: 4 });
        assert_eq!(event.take(), forms.len() as u64 + 1);
        guest.vcpu.reply(Reply::Value(7));
        assert_eq!(guest.out(), 7);
    }
}

fn part_of_a_write(engine: Engine) {
    // movups [0x100050], xmm0 ; out 0x80, al ; jmp to the start
    let code = [0x0F, 0x11, 0x04, 0x25, 0x50, 0, 0x10, 0, 0xE6, 0x80, 0xEB, 0xF4];
    let mut guest = Guest::new_64_bit(engine, &code);
    let mut system = guest.vcpu.system_registers().expect("state");
    system.cr4 |= 0x200; // OSFXSR
    guest.vcpu.set_system_registers(&system).expect("SSE");
    map_device(&guest);
    let event = add(&guest, memory(Some(8), None));
    for _ in 0..2 {
        assert_eq!(guest.run(), Exit::MmioWrite { address: NOTIFY + 8, size: 8, data: 0 });
        guest.vcpu.reply(Reply::Done);
        guest.out();
        assert_eq!(event.take(), 1);
    }
}

fn string_instruction(engine: Engine) {
    // mov cx, 5 ; mov si, 0x2000 ; mov dx, 0x90 ; rep outsw ; out 0x80, al
    let code = [0xB9, 5, 0, 0xBE, 0, 0x20, 0xBA, 0x90, 0, 0xF3, 0x6F, 0xE6, 0x80];
    let mut guest = Guest::new(engine, &code);
    for (index, item) in [7u16, 7, 8, 7, 7].into_iter().enumerate() {
        guest.write(0x2000 + index as u64 * 2, &item.to_le_bytes());
    }
    let address = DoorbellAddress::Port(0x90);
    let event = add(&guest, Doorbell { address, size: Some(2), value: Some(7) });
    assert_eq!(guest.run(), Exit::PortOut { port: 0x90, size: 2, data: 8 });
    assert_eq!(event.take(), 2);
    guest.vcpu.reply(Reply::Done);
    guest.out();
    assert_eq!(event.take(), 2);
}

fn comes_and_goes(engine: Engine) {
    // mov [0x100050], eax ; out 0x80, al ; jmp to the start
    let code = [0x89, 0x04, 0x25, 0x50, 0, 0x10, 0, 0xE6, 0x80, 0xEB, 0xF5];
    let mut guest = Guest::new_64_bit(engine, &code);
    map_device(&guest);
    let write = Exit::MmioWrite { address: NOTIFY, size: 4, data: 0 };
    for _ in 0..3 {
        assert_eq!(guest.run(), write);
        // In the middle of the instruction: this write is the machine's.
        let event = add(&guest, memory(Some(4), Some(0)));
        guest.vcpu.reply(Reply::Done);
        guest.out();
        assert_eq!(event.take(), 0);
        guest.out();
        assert_eq!(event.take(), 1);
        // Another event takes its place.
        let doorbell = memory(Some(4), Some(0));
        guest.vm.remove_doorbell(&doorbell).expect("there");
        let other = add(&guest, doorbell);
        guest.out();
        assert_eq!((event.take(), other.take()), (0, 1));
        guest.vm.remove_doorbell(&doorbell).expect("there");
        assert!(guest.vm.remove_doorbell(&doorbell).is_err());
    }
    assert_eq!(guest.run(), write);
}

fn under_ram(engine: Engine) {
    // mov [0x100050], eax ; out 0x80, al ; jmp to the start
    let code = [0x89, 0x04, 0x25, 0x50, 0, 0x10, 0, 0xE6, 0x80, 0xEB, 0xF5];
    let mut guest = Guest::new_64_bit(engine, &code);
    map_device(&guest);
    let event = add(&guest, memory(None, None));
    guest.out();
    assert_eq!(event.take(), 1);
    let start = GuestPhys(NOTIFY & !0xFFF);
    guest.memory.add_region(start, 0x1000).expect("free");
    guest.write(NOTIFY, &[0xFF]);
    guest.out();
    assert_eq!((event.take(), guest.read(NOTIFY)), (0, [0; 4]));
    drop(guest.memory.remove_region(start).expect("there"));
    guest.out();
    assert_eq!(event.take(), 1);
}

fn refused(engine: Engine) {
    let guest = Guest::new(engine, &[]);
    let event = add(&guest, memory(Some(4), Some(1)));
    for (doorbell, cause) in [
        (memory(Some(4), Some(1)), "is there already"),
        (memory(None, None), "takes another's writes"),
        (memory(Some(3), None), "no writes of 3 bytes"),
        (port(0x20), "the primary interrupt controller"),
        (Doorbell::at(DoorbellAddress::Memory(0x1000)), "is RAM"),
    ] {
        let error = guest.vm.add_doorbell(doorbell, event.as_fd()).expect_err("cannot be");
        let (what, mend) = error.parts();
        assert!(what.contains(cause) && mend.is_some(), "{what}");
    }
    // Not an eventfd; a host may notice, and then nothing is left of it.
    let null = std::fs::File::open("/dev/null").expect("there");
    if guest.vm.add_doorbell(memory(Some(2), None), null.as_fd()).is_err() {
        guest.vm.add_doorbell(memory(Some(2), None), event.as_fd()).expect("free");
    }
}
