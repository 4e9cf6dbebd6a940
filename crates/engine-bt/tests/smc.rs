//! Self-modifying code: what is executed is what was written last.
//!
//! On one CPU a branch is all that must lie between the writing and the running
//! (Intel SDM 3A, 8.1.3); the engine needs not even that.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::case::{Fault, PAGE};
use support::guest::{End, FREE, Guest, P, U, W, on_both};
use tetrarch_engine::Exit;
use tetrarch_memory::GuestPhys;

const AT: u64 = 0x40_0000;
const ALIAS: u64 = 0x80_0000;
const UD: End = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });

fn map(guest: &mut Guest, linear: u64, physical: u64, pages: u64) {
    for page in 0..pages {
        guest.map(linear + page * PAGE, physical + page * PAGE, P | W | U);
    }
}

fn run(guest: &mut Guest, rip: u64, gpr: [u64; 16]) -> [u64; 16] {
    guest.start(false, rip, gpr, 0x202);
    assert_eq!(guest.run(), UD);
    guest.vcpu.registers().expect("state").gpr
}

#[test]
fn write_ahead_in_the_same_block_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        guest.write(
            FREE,
            &[
                0xC6, 0x05, 0x01, 0, 0, 0,
                0x22, // mov byte [rip+1], 0x22: the immediate below
                0xB8, 0x11, 0, 0, 0, // mov eax, 0x11
                0x0F, 0x0B, // ud2
            ],
        );
        let gpr = run(guest, AT, [0; 16]);
        assert_eq!(gpr[0], 0x22, "{engine}");
    });
}

#[test]
fn write_behind_in_a_loop_is_seen_the_next_time_round() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        guest.write(
            FREE,
            &[
                0x83, 0xC0, 0x01, // 0: add eax, 1
                0x80, 0x05, 0xF8, 0xFF, 0xFF, 0xFF, 0x01, // 3: add byte [rip-8], 1: byte 2
                0xFF, 0xC9, // 10: dec ecx
                0x75, 0xF2, // 12: jnz 0
                0x0F, 0x0B,
            ],
        );
        let mut gpr = [0; 16];
        gpr[1] = 20;
        let gpr = run(guest, AT, gpr);
        assert_eq!(gpr[0], (1..=20).sum::<u64>(), "{engine}");
    });
}

#[test]
fn function_patched_between_calls_runs_anew() {
    on_both(|guest, engine| {
        // The caller on one page, the function on the next: a link between pages.
        map(guest, AT, FREE, 2);
        map(guest, ALIAS, FREE + 2 * PAGE, 1);
        guest.write(FREE + PAGE, &[0xB8, 0, 0, 0, 0, 0xC3]); // mov eax, 0 ; ret
        let mut code = vec![];
        for _ in 0..3 {
            code.extend_from_slice(&[0xFF, 0x46, 0x01]); // inc dword [rsi+1]
            let from = code.len() as u64 + 5;
            code.push(0xE8); // call AT + PAGE
            code.extend_from_slice(&((PAGE - from) as u32).to_le_bytes());
            code.extend_from_slice(&[0x01, 0xC3]); // add ebx, eax
        }
        code.extend_from_slice(&[0x0F, 0x0B]);
        guest.write(FREE, &code);
        let mut gpr = [0; 16];
        gpr[4] = ALIAS + PAGE;
        gpr[6] = AT + PAGE;
        let gpr = run(guest, AT, gpr);
        assert_eq!(gpr[3], 1 + 2 + 3, "{engine}");
    });
}

#[test]
fn write_through_an_alias_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        map(guest, ALIAS, FREE, 1);
        guest.write(
            FREE,
            &[
                0x83, 0xC0, 0x01, // 0: add eax, 1
                0xFE, 0x46, 0x02, // 3: inc byte [rsi+2]
                0xFF, 0xC9, // 6: dec ecx
                0x75, 0xF6, // 8: jnz 0
                0x0F, 0x0B,
            ],
        );
        let mut gpr = [0; 16];
        (gpr[1], gpr[6]) = (10, ALIAS);
        let gpr = run(guest, AT, gpr);
        assert_eq!(gpr[0], (1..=10).sum::<u64>(), "{engine}");
    });
}

#[test]
fn code_executed_at_two_aliases_changes_at_both() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        map(guest, ALIAS, FREE, 1);
        guest.write(FREE, &[0xB8, 1, 0, 0, 0, 0x0F, 0x0B]);
        assert_eq!(run(guest, AT, [0; 16])[0], 1, "{engine}");
        assert_eq!(run(guest, ALIAS, [0; 16])[0], 1, "{engine}");
        // mov byte [rsi], 7 ; jmp rdi, from a page of its own
        map(guest, ALIAS + PAGE, FREE + PAGE, 1);
        guest.write(FREE + PAGE, &[0xC6, 0x06, 7, 0xFF, 0xE7]);
        for to in [AT, ALIAS] {
            let mut gpr = [0; 16];
            (gpr[6], gpr[7]) = (AT + 1, to);
            assert_eq!(run(guest, ALIAS + PAGE, gpr)[0], 7, "{engine} at {to:#x}");
        }
    });
}

#[test]
fn both_halves_of_an_instruction_across_pages_can_change() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 2);
        // mov eax, imm32 with two of its five bytes on the first page.
        let start = PAGE - 2;
        guest.write(FREE + start, &[0xB8, 1, 0, 0, 0, 0x0F, 0x0B]);
        assert_eq!(run(guest, AT + start, [0; 16])[0], 1, "{engine}");
        // mov byte [rsi], dl ; jmp rdi
        map(guest, ALIAS, FREE + 2 * PAGE, 1);
        guest.write(FREE + 2 * PAGE, &[0x88, 0x16, 0xFF, 0xE7]);
        let mut expected = 1;
        for (at, value) in [(1, 2u64), (2, 3), (4, 4), (1, 5)] {
            let mut gpr = [0; 16];
            (gpr[2], gpr[6], gpr[7]) = (value, AT + start + at, AT + start);
            let shift = (at - 1) * 8;
            expected = expected & !(0xFF << shift) | value << shift;
            assert_eq!(run(guest, ALIAS, gpr)[0], expected, "{engine}: byte {at}");
        }
    });
}

#[test]
fn second_page_mapped_elsewhere_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 2);
        let start = PAGE - 1;
        for (page, value) in [(1, 1), (2, 2)] {
            guest.write(FREE + page * PAGE, &[value, 0, 0, 0, 0x0F, 0x0B]);
        }
        guest.write(FREE + start, &[0xB8]);
        assert_eq!(run(guest, AT + start, [0; 16])[0], 1, "{engine}");
        guest.map(AT + PAGE, FREE + 2 * PAGE, P | W | U);
        assert_eq!(run(guest, AT + start, [0; 16])[0], 2, "{engine}");
        guest.map(AT + PAGE, FREE + PAGE, P | W | U);
        assert_eq!(run(guest, AT + start, [0; 16])[0], 1, "{engine}");
    });
}

#[test]
fn string_store_over_code_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 2);
        guest.write(FREE + PAGE, &[0xB8, 1, 0, 0, 0, 0x0F, 0x0B]);
        assert_eq!(run(guest, AT + PAGE, [0; 16])[0], 1, "{engine}");
        // rep movsb over the code, then to it
        guest.write(FREE, &[0xF3, 0xA4, 0xFF, 0xE2]);
        guest.write(FREE + 0x100, &[0xB8, 9, 0, 0, 0, 0x0F, 0x0B]);
        let mut gpr = [0; 16];
        (gpr[1], gpr[2], gpr[6], gpr[7]) = (7, AT + PAGE, AT + 0x100, AT + PAGE);
        assert_eq!(run(guest, AT, gpr)[0], 9, "{engine}");
    });
}

#[test]
fn vector_store_over_code_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 2);
        guest.write(FREE + PAGE, &[0xB8, 1, 0, 0, 0, 0x0F, 0x0B]);
        assert_eq!(run(guest, AT + PAGE, [0; 16])[0], 1, "{engine}");
        // movups xmm0, [rsi] ; movups [rdi], xmm0 ; jmp rdi
        guest.write(FREE, &[0x0F, 0x10, 0x06, 0x0F, 0x11, 0x07, 0xFF, 0xE7]);
        guest.write(FREE + 0x100, &[0xB8, 8, 0, 0, 0, 0x0F, 0x0B]);
        let mut gpr = [0; 16];
        (gpr[6], gpr[7]) = (AT + 0x100, AT + PAGE);
        assert_eq!(run(guest, AT, gpr)[0], 8, "{engine}");
    });
}

#[test]
fn device_write_into_a_running_loop_ends_it() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        guest.write(FREE, &[0xFF, 0xC0, 0xEB, 0xFC]); // inc eax ; jmp back
        let memory = Arc::clone(&guest.memory);
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            memory.write(GuestPhys(FREE + 2), &[0x0F, 0x0B]).unwrap();
        });
        let gpr = run(guest, AT, [0; 16]);
        writer.join().unwrap();
        assert!(gpr[0] > 1000, "{engine}: the loop ran {} times", gpr[0]);
    });
}

#[test]
fn device_write_between_runs_is_seen() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        for value in 1..=5u8 {
            guest.write(FREE, &[0xB8, value, 0, 0, 0, 0x0F, 0x0B]);
            assert_eq!(run(guest, AT, [0; 16])[0], u64::from(value), "{engine}");
        }
    });
}

#[test]
fn kick_ends_a_loop_without_any_exit() {
    on_both(|guest, engine| {
        map(guest, AT, FREE, 1);
        guest.write(FREE, &[0xEB, 0xFE]);
        let kicker = guest.vcpu.kicker();
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            seen.store(true, Ordering::SeqCst);
            kicker.kick();
        });
        guest.start(false, AT, [0; 16], 0x202);
        assert_eq!(guest.run(), End::Exit(Exit::Kicked), "{engine}");
        assert!(done.load(Ordering::SeqCst), "{engine}");
        thread.join().unwrap();
    });
}
