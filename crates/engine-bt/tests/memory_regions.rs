//! Memory that comes and goes between two runs of a vCPU.

mod support;

use support::case::PAGE;
use support::guest::{FREE, Guest, P, W, on_both};
use tetrarch_engine::{Exit, Reply};
use tetrarch_memory::GuestPhys;

const AT: u64 = 0x40_0000;
const CODE_AT: u64 = 0x50_0000;
/// Where no RAM is at first: two pages, for code and for data.
const REGION: u64 = 0x1000_0000;

/// Maps the region at [`AT`] and a loop with a stack at [`CODE_AT`], and goes
/// there with RSI at the region's data and RDX at its code.
fn start(guest: &mut Guest, code: &[u8]) {
    guest.map(AT, REGION, P | W);
    guest.map(AT + PAGE, REGION + PAGE, P | W);
    guest.map(CODE_AT, FREE, P | W);
    guest.map(CODE_AT + PAGE, FREE + PAGE, P | W);
    guest.write(FREE, code);
    let mut gpr = [0; 16];
    (gpr[2], gpr[4], gpr[6]) = (AT, CODE_AT + 2 * PAGE - 8, AT + PAGE);
    guest.start(true, CODE_AT, gpr, 0x202);
}

/// Adds the region: code `mov eax, value ; ret`, and `value` as data.
fn add(guest: &Guest, value: u8) {
    guest.memory.add_region(GuestPhys(REGION), 2 * PAGE).unwrap();
    guest.write(REGION, &[0xB8, value, 0, 0, 0, 0xC3]);
    guest.write64(REGION + PAGE, u64::from(value));
}

/// Its pages may be taken by anything in this process from now on.
fn remove(guest: &Guest) {
    drop(guest.memory.remove_region(GuestPhys(REGION)).unwrap());
}

/// Runs on to the next write to a port, and gives what was written.
fn written(guest: &mut Guest) -> u32 {
    match guest.vcpu.run().unwrap() {
        Exit::PortOut { port: 0x80, data, .. } => {
            guest.vcpu.reply(Reply::Done);
            data
        }
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn data_is_in_the_region_that_is_there_now() {
    on_both(|guest, engine| {
        // again: mov rax, [rsi] ; mov [rsi+8], rax ; out 0x80, al ; jmp again
        start(guest, &[0x48, 0x8B, 0x06, 0x48, 0x89, 0x46, 0x08, 0xE6, 0x80, 0xEB, 0xF5]);
        for value in 1..=3 {
            add(guest, value);
            for _ in 0..4 {
                assert_eq!(written(guest), u32::from(value), "{engine}");
                assert_eq!(guest.read64(REGION + PAGE + 8), u64::from(value), "{engine}");
            }
            remove(guest);
            let exit = guest.vcpu.run().unwrap();
            assert_eq!(exit, Exit::MmioRead { address: REGION + PAGE, size: 8 }, "{engine}");
            guest.vcpu.reply(Reply::Value(0x77));
            let exit = guest.vcpu.run().unwrap();
            let address = REGION + PAGE + 8;
            assert_eq!(exit, Exit::MmioWrite { address, size: 8, data: 0x77 }, "{engine}");
            guest.vcpu.reply(Reply::Done);
            assert_eq!(written(guest), 0x77, "{engine}");
        }
    });
}

#[test]
fn code_is_that_of_the_region_that_is_there_now() {
    on_both(|guest, engine| {
        // again: call rdx ; out 0x80, al ; jmp again
        start(guest, &[0xFF, 0xD2, 0xE6, 0x80, 0xEB, 0xFA]);
        for value in 1..=3 {
            add(guest, value);
            for _ in 0..4 {
                assert_eq!(written(guest), u32::from(value), "{engine}");
            }
            // A write from outside, too.
            guest.write(REGION + 1, &[value + 0x10]);
            assert_eq!(written(guest), u32::from(value) + 0x10, "{engine}");
            remove(guest);
        }
        // Nothing is written to the last one: add [rax], al at an address that is
        // not mapped, and the exception's handler halts.
        guest.memory.add_region(GuestPhys(REGION), 2 * PAGE).unwrap();
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Halt, "{engine}");
    });
}
