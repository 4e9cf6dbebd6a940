//! Exits and their answers.

use tetrarch_engine::{Exit, Reply};

use super::Body;
use super::guest::{CODE, Engine, Guest};

pub const BODIES: &[(&str, Body)] = &[
    ("unanswered_exits_of_every_kind_refuse_the_next_run", unanswered_exits),
    ("items_of_string_instructions_come_one_at_a_time", items_of_string_instructions),
    ("registers_are_those_between_two_instructions", registers_between_two_instructions),
];

fn items_of_string_instructions(engine: Engine) {
    // mov al, 5 ; out 0x80, al ; in ax, 0x82 ; mov cx, 3 ; mov si, 0x2000 ;
    // mov dx, 0x84 ; rep outsw ; mov cx, 2 ; mov di, 0x3000 ; rep insb ; cli ; hlt
    let code = [
        0xB0, 5, 0xE6, 0x80, 0xE5, 0x82, 0xB9, 3, 0, 0xBE, 0, 0x20, 0xBA, 0x84, 0, 0xF3, 0x6F,
        0xB9, 2, 0, 0xBF, 0, 0x30, 0xF3, 0x6C, 0xFA, 0xF4,
    ];
    let mut guest = Guest::new(engine, &code);
    guest.write(0x2000, &[1, 0, 2, 0, 3, 0]);
    assert_eq!(guest.out(), 5);
    assert_eq!(guest.run(), Exit::PortIn { port: 0x82, size: 2 });
    guest.vcpu.reply(Reply::Value(0xFFFF_1234));
    for data in 1..=3 {
        assert_eq!(guest.run(), Exit::PortOut { port: 0x84, size: 2, data });
        guest.vcpu.reply(Reply::Done);
    }
    assert_eq!(guest.vcpu.registers().expect("state").gpr[0] & 0xFFFF, 0x1234);
    for value in [0x41, 0x42] {
        assert_eq!(guest.run(), Exit::PortIn { port: 0x84, size: 1 });
        guest.vcpu.reply(Reply::Value(value));
    }
    guest.run();
    assert_eq!(&guest.read(0x3000), b"AB");
}

fn registers_between_two_instructions(engine: Engine) {
    // out 0x80, al ; in al, 0x81 ; hlt
    let mut guest = Guest::new(engine, &[0xE6, 0x80, 0xE4, 0x81, 0xF4]);
    guest.out();
    guest.settle();
    assert_eq!(guest.vcpu.registers().expect("state").rip, CODE + 2);
    assert_eq!(guest.run(), Exit::PortIn { port: 0x81, size: 1 });
    guest.vcpu.reply(Reply::Value(0x77));
    guest.settle();
    let registers = guest.vcpu.registers().expect("state");
    assert_eq!((registers.rip, registers.gpr[0]), (CODE + 4, 0x77));
}

fn unanswered_exits(engine: Engine) {
    // out 0x80, al ; in al, 0x81 ; mov [bx], al ; mov al, [bx] ; mov dx, 0x84 ;
    // mov cx, 2 ; es rep outsb ; out 0x80, al
    let code = [
        0xE6, 0x80, 0xE4, 0x81, 0x88, 0x07, 0x8A, 0x07, 0xBA, 0x84, 0, 0xB9, 2, 0, 0x26, 0xF3,
        0x6E, 0xE6, 0x80,
    ];
    let mut guest = Guest::new(engine, &code);
    // Where there is no RAM: the accesses through DS go to the bus.
    let mut system = guest.vcpu.system_registers().expect("state");
    system.ds.base = 0xD000_0000;
    guest.vcpu.set_system_registers(&system).expect("real mode");
    let mut kinds = 0;
    for (at, value) in [0u64, 0x55, 0, 0x66, 0, 0, 0].into_iter().enumerate() {
        let exit = guest.run();
        for _ in 0..2 {
            let error = guest.vcpu.run().expect_err("an unanswered exit").to_string();
            assert!(error.contains("not answered"), "exit {at}, {exit:?}: {error}");
        }
        kinds += 1;
        let wants_value = matches!(exit, Exit::PortIn { .. } | Exit::MmioRead { .. });
        guest.vcpu.reply(if wants_value { Reply::Value(value) } else { Reply::Done });
        if at == 6 {
            let last = Exit::PortOut { port: 0x80, size: 1, data: 0x66 };
            assert_eq!(exit, last, "each exit came once");
        }
    }
    assert_eq!(kinds, 7);
}
