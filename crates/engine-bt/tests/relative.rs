//! User code far from address 0, which is translated once for all places that its page is
//! mapped at.

mod support;

use iced_x86::code_asm::*;
use support::case::{Fault, PAGE};
use support::guest::{End, FREE, Guest, P, STACK, U, W, on_both};

const PLACES: [u64; 3] = [0x5555_5555_4000, 0x7F12_3456_7000, 0x7FFF_F7FC_A000];
const UD: End = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });

fn map(guest: &mut Guest, linear: u64, physical: u64) {
    guest.map(linear, physical, P | W | U);
}

/// Runs user code from `rip` to its UD2.
fn run(guest: &mut Guest, rip: u64, mut gpr: [u64; 16]) -> [u64; 16] {
    map(guest, STACK, STACK);
    gpr[4] = STACK + 0x800;
    guest.start(false, rip, gpr, 0x202);
    assert_eq!(guest.run(), UD);
    guest.vcpu.registers().expect("state").gpr
}

/// Maps the code's page at each place, and behind it a page of the place's own.
fn lay_out(guest: &mut Guest, code: &[u8], own: impl Fn(u64) -> Vec<u8>) {
    guest.write(FREE, code);
    for (number, &place) in PLACES.iter().enumerate() {
        let second = FREE + PAGE * (1 + number as u64);
        map(guest, place, FREE);
        map(guest, place + PAGE, second);
        guest.write(second, &own(number as u64));
    }
}

/// Code at the start of a page; `build` gets labels of it and of the page behind it.
fn assembled(
    build: impl Fn(&mut CodeAssembler, [CodeLabel; 2]) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let assemble = |filling: usize| {
        let mut a = CodeAssembler::new(64)?;
        let mut labels = [a.create_label(), a.create_label()];
        a.set_label(&mut labels[0])?;
        build(&mut a, labels)?;
        a.db(&vec![0xCC; filling])?;
        a.set_label(&mut labels[1])?;
        a.zero_bytes()?;
        a.assemble(PLACES[0])
    };
    let some = PAGE as usize / 2;
    let len = assemble(some).expect("it can be assembled").len();
    assemble(PAGE as usize + some - len).expect("as before")
}

#[test]
fn a_page_knows_where_it_is_mapped() {
    let code = assembled(|a, [page, next]| {
        let mut over = a.create_label();
        a.lea(rax, qword_ptr(page))?;
        a.lea(r13, qword_ptr(next))?;
        a.lea(esi, dword_ptr(page))?;
        a.call(over)?;
        a.set_label(&mut over)?;
        a.pop(rdx)?;
        a.mov(rbx, qword_ptr(next))?;
        a.add(qword_ptr(next), rbx)?;
        a.push(qword_ptr(next))?;
        a.pop(rdi)?;
        a.ud2()
    });
    on_both(|guest, engine| {
        lay_out(guest, &code, |number| (100 + number).to_le_bytes().to_vec());
        for round in 0..3 {
            for (number, place) in (0..).zip(PLACES) {
                let gpr = run(guest, place, [0; 16]);
                assert_eq!(gpr[0], place, "{engine}");
                assert_eq!(gpr[13], place + PAGE, "{engine}");
                assert_eq!(gpr[6], place & 0xFFFF_FFFF, "{engine}");
                assert!((place + 20..place + 40).contains(&gpr[2]), "{engine}: {:#x}", gpr[2]);
                assert_eq!(gpr[3], (100 + number) << round, "{engine}");
                assert_eq!(gpr[7], (100 + number) << (round + 1), "{engine}");
            }
        }
    });
}

#[test]
fn a_branch_out_of_the_page_goes_to_what_is_mapped_behind_it() {
    // jmp to the next page
    let code = [0xE9, 0xFB, 0x0F, 0, 0];
    on_both(|guest, engine| {
        lay_out(guest, &code, |number| vec![0xB8, number as u8, 0, 0, 0, 0x0F, 0x0B]);
        for _ in 0..3 {
            for (number, place) in (0..).zip(PLACES) {
                assert_eq!(run(guest, place, [0; 16])[0], number, "{engine}");
            }
        }
    });
}

/// A loop round two instructions, the second of which lies in both pages.
#[test]
fn an_instruction_across_pages_is_of_the_pages_mapped_there() {
    let mut code = vec![0x90; PAGE as usize];
    // add eax, imm32: two bytes of the immediate are in the second page.
    code[0xFFB..].copy_from_slice(&[0x90, 0x90, 0x05, 0, 0]);
    on_both(|guest, engine| {
        lay_out(guest, &code, |number| {
            // dec ecx ; jnz to the first page ; ud2
            [&[1 + number as u8, 0][..], &[0xFF, 0xC9, 0x75, 0xF5, 0x0F, 0x0B]].concat()
        });
        for _ in 0..3 {
            for (number, place) in (0..).zip(PLACES) {
                let mut gpr = [0; 16];
                gpr[1] = 50;
                let gpr = run(guest, place + 0xFFB, gpr);
                assert_eq!(gpr[0], (50 * (1 + number)) << 16, "{engine}");
            }
        }
        // The same linear page, and another one behind it.
        map(guest, PLACES[0] + PAGE, FREE + 3 * PAGE);
        let mut gpr = [0; 16];
        gpr[1] = 50;
        assert_eq!(run(guest, PLACES[0] + 0xFFB, gpr)[0], (50 * 3) << 16, "{engine}");
    });
}

#[test]
fn code_that_changes_changes_at_all_places() {
    on_both(|guest, engine| {
        // mov eax, 1 ; ud2
        lay_out(guest, &[0xB8, 1, 0, 0, 0, 0x0F, 0x0B], |_| vec![]);
        // call rdi at each place ; mov byte [rsi], 7 ; call rdi again ; ud2
        let writer = 0x7000_0000_0000;
        map(guest, writer, FREE + 8 * PAGE);
        guest.write(FREE + 8 * PAGE, &[0xC6, 0x06, 7, 0xFF, 0xE7]);
        for place in PLACES {
            assert_eq!(run(guest, place, [0; 16])[0], 1, "{engine}");
        }
        for place in PLACES {
            let mut gpr = [0; 16];
            (gpr[6], gpr[7]) = (PLACES[1] + 1, place);
            assert_eq!(run(guest, writer, gpr)[0], 7, "{engine} at {place:#x}");
        }
    });
}

/// In one run, without a flush of the tables between them.
#[test]
fn code_called_at_two_places_changes_at_both() {
    on_both(|guest, engine| {
        // mov eax, 1 ; ret
        lay_out(guest, &[0xB8, 1, 0, 0, 0, 0xC3], |_| vec![]);
        let caller = 0x7000_0000_0000;
        map(guest, caller, FREE + 8 * PAGE);
        let code = assembled(|a, _| {
            a.mov(ecx, 5)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            for place in [rdi, rsi, rdx] {
                a.call(place)?;
                a.add(rbx, rax)?;
            }
            a.inc(byte_ptr(rsi + 1))?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.ud2()
        });
        guest.write(FREE + 8 * PAGE, &code);
        let mut gpr = [0; 16];
        (gpr[7], gpr[6], gpr[2]) = (PLACES[0], PLACES[1], PLACES[2]);
        assert_eq!(run(guest, caller, gpr)[3], 3 * (1 + 2 + 3 + 4 + 5), "{engine}");
    });
}

#[test]
fn another_page_at_the_same_place_is_seen() {
    on_both(|guest, engine| {
        for (physical, number) in [(FREE, 1), (FREE + PAGE, 2), (FREE, 1)] {
            map(guest, PLACES[0], physical);
            guest.write(physical, &[0xB8, number, 0, 0, 0, 0x0F, 0x0B]);
            assert_eq!(run(guest, PLACES[0], [0; 16])[0], u64::from(number), "{engine}");
        }
    });
}

/// What is left to the interpreter has its operand where it is mapped.
#[test]
fn an_interpreted_instruction_finds_its_operand() {
    // Translated code has no XSAVE64.
    let code = assembled(|a, [_, next]| {
        a.mov(eax, 1)?;
        a.xor(edx, edx)?;
        a.fldpi()?;
        a.fnstenv(ptr(next))?;
        a.fstp(st0)?;
        a.fldpi()?;
        a.xsave64(ptr(next))?;
        a.fstp(st0)?;
        a.ud2()
    });
    on_both(|guest, engine| {
        lay_out(guest, &code, |_| vec![0; PAGE as usize]);
        for (number, place) in (1..).zip(PLACES) {
            run(guest, place, [0; 16]);
            let page = FREE + PAGE * number;
            assert_eq!(guest.read64(page + 512), 1, "{engine}: XSTATE_BV");
            assert_eq!(guest.read64(page + 32), 0xC90F_DAA2_2168_C235, "{engine}: pi");
        }
    });
}

#[test]
fn a_system_call_returns_where_it_came_from() {
    on_both(|guest, engine| {
        // syscall ; ud2
        lay_out(guest, &[0x0F, 0x05, 0x0F, 0x0B], |_| vec![]);
        let kernel = 0xFFFF_FFFF_8000_0000;
        guest.map(kernel, FREE + 8 * PAGE, P | W);
        guest.write(FREE + 8 * PAGE, &[0x0F, 0x0B]);
        guest.vcpu.set_msr(0xC000_0082, kernel).expect("LSTAR");
        for place in PLACES {
            assert_eq!(run(guest, place, [0; 16])[1], place + 2, "{engine}");
        }
    });
}
