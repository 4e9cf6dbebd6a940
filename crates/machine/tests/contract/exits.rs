//! Exits and their answers.

use tetrarch_engine::{Exit, Reply};

use super::Body;
use super::guest::{CODE, Engine, Guest};

pub const BODIES: &[(&str, Body)] = &[
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
    assert_eq!(guest.vcpu.registers().gpr[0] & 0xFFFF, 0x1234);
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
    assert_eq!(guest.vcpu.registers().rip, CODE + 2);
    assert_eq!(guest.run(), Exit::PortIn { port: 0x81, size: 1 });
    guest.vcpu.reply(Reply::Value(0x77));
    guest.settle();
    let registers = guest.vcpu.registers();
    assert_eq!((registers.rip, registers.gpr[0]), (CODE + 4, 0x77));
}
