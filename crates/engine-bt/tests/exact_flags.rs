//! Arithmetic flags at a fault, and after a store into code: those of the last
//! instruction that wrote them, needed by what follows or not.

mod support;

use support::case::{Fault, PAGE};
use support::guest::{End, FREE, Guest, P, U, W, on_both};

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;
const ABSENT: u64 = 0x80_0000;
const ARITH: u64 = 0x8D5;
/// Bits that a flag image can have in user mode.
const IMAGES: [u64; 6] = [0x202, 0x203, 0xA93, 0x246, 0x2C6, 0xAD7];

fn code(guest: &mut Guest, bytes: &[u8]) {
    for page in 0..2 {
        guest.map(CODE + page * PAGE, FREE + page * PAGE, P | W | U);
    }
    guest.map(DATA, FREE + 2 * PAGE, P | W | U);
    guest.write(FREE, bytes);
}

fn registers() -> [u64; 16] {
    let mut gpr = [0; 16];
    for (number, value) in gpr.iter_mut().enumerate() {
        *value = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(number as u64 + 1);
    }
    (gpr[4], gpr[6]) = (DATA + 0x800, ABSENT);
    gpr
}

/// The flags in the frame of the page fault that the code comes to.
fn flags_at_fault(guest: &mut Guest, gpr: [u64; 16], rflags: u64) -> u64 {
    guest.start(false, CODE, gpr, rflags);
    let end = guest.run();
    assert!(
        matches!(end, End::Fault(Fault { vector: 14, cr2, .. }) if cr2 & !0xFFF == ABSENT),
        "{end:x?}"
    );
    guest.frame.rflags & ARITH
}

#[test]
fn fault_shows_flags_that_the_next_instruction_overwrites() {
    on_both(|guest, engine| {
        for access in [&[0x88, 0x06][..], &[0x8A, 0x06], &[0xFF, 0x36], &[0xF3, 0xA4]] {
            // push rdi ; popfq ; the access ; add eax, eax
            let bytes = [&[0x57, 0x9D], access, &[0x01, 0xC0, 0x0F, 0x0B]].concat();
            code(guest, &bytes);
            for image in IMAGES {
                let mut gpr = registers();
                gpr[7] = image;
                (gpr[1], gpr[0]) = (2, 1);
                let flags = flags_at_fault(guest, gpr, 0x202);
                assert_eq!(flags, image & ARITH, "{engine}: {access:x?} with {image:#x}");
            }
        }
    });
}

/// What the interpreter shows is right by its own tests; the translator must show
/// the same, for each kind of producer and each fate of its operands.
#[test]
fn flags_made_again_are_those_of_their_producer() {
    let producers: [(&str, &[u8]); 26] = [
        ("add rax,rbx", &[0x48, 0x01, 0xD8]),
        ("add al,-7", &[0x04, 0xF9]),
        ("add rax,rax", &[0x48, 0x01, 0xC0]),
        ("sub rax,rbx", &[0x48, 0x29, 0xD8]),
        ("sub ax,dx", &[0x66, 0x29, 0xD0]),
        ("sub eax,eax", &[0x29, 0xC0]),
        ("xor rax,rbx", &[0x48, 0x31, 0xD8]),
        ("xor eax,eax", &[0x31, 0xC0]),
        ("and ah,bl", &[0x20, 0xDC]),
        ("and rax,[rsp]", &[0x48, 0x23, 0x04, 0x24]),
        ("xor bl,[rsp]", &[0x32, 0x1C, 0x24]),
        ("or r13,rbx", &[0x49, 0x09, 0xDD]),
        ("cmp rax,rbx", &[0x48, 0x39, 0xD8]),
        ("cmp al,0x7f", &[0x3C, 0x7F]),
        ("test rax,rbx", &[0x48, 0x85, 0xD8]),
        ("inc rax", &[0x48, 0xFF, 0xC0]),
        ("dec r14b", &[0x41, 0xFE, 0xCE]),
        ("neg rax", &[0x48, 0xF7, 0xD8]),
        ("shl rax,3", &[0x48, 0xC1, 0xE0, 3]),
        ("sar eax,cl", &[0xD3, 0xF8]),
        ("imul rax,rbx", &[0x48, 0x0F, 0xAF, 0xC3]),
        ("adc rax,rbx", &[0x48, 0x11, 0xD8]),
        ("cmp [rsp],rbx", &[0x48, 0x39, 0x1C, 0x24]),
        ("ror rax,1", &[0x48, 0xD1, 0xC8]),
        ("rol ebx,1", &[0xD1, 0xC3]),
        ("ror ebx,7", &[0xC1, 0xCB, 7]),
    ];
    let between: [(&str, &[u8]); 7] = [
        ("nothing", &[]),
        ("a load", &[0x48, 0x8B, 0x0C, 0x24]),
        ("mov eax,5", &[0xB8, 5, 0, 0, 0]),
        ("a load, mov ebx,5", &[0x48, 0x8B, 0x0C, 0x24, 0xBB, 5, 0, 0, 0]),
        ("a load, mov r13,rdx", &[0x48, 0x8B, 0x0C, 0x24, 0x49, 0x89, 0xD5]),
        ("inc edx, a load", &[0xFF, 0xC2, 0x48, 0x8B, 0x0C, 0x24]),
        ("push rbx", &[0x53]),
    ];
    let seen = std::cell::RefCell::new(Vec::new());
    on_both(|guest, engine| {
        let mut results = Vec::new();
        for (name, producer) in producers {
            for (fate, between) in between {
                // then: mov [rsi], al ; sub edx, edx
                let bytes =
                    [&[0x90], producer, between, &[0x88, 0x06, 0x29, 0xD2, 0x0F, 0x0B]].concat();
                code(guest, &bytes);
                for image in IMAGES {
                    let mut gpr = registers();
                    gpr[1] = image & 0x1F;
                    // Undefined flags are the model's (SDM 1, appendix A).
                    let undefined = match name.split(' ').next() {
                        Some("imul") => ARITH & !0x801,
                        Some("shl" | "sar") => 0x810,
                        Some("ror") if !name.ends_with(",1") => 0x800,
                        Some("xor" | "and" | "or" | "test") => 0x10,
                        _ => 0,
                    };
                    let flags = flags_at_fault(guest, gpr, image) & !undefined;
                    results.push((name, fate, image, flags));
                }
            }
        }
        if engine == "interpreter" {
            *seen.borrow_mut() = results;
        } else {
            for (theirs, ours) in seen.borrow().iter().zip(&results) {
                assert_eq!(theirs, ours);
            }
        }
    });
}

/// push rdi ; popfq, a store that makes NOPs of the ADD which made the flags dead,
/// and what they are then.
#[test]
fn store_into_the_code_that_overwrites_flags_keeps_them() {
    let add: &[u8] = &[0x01, 0xC0];
    // mov word [rip + n], 0x9090 ; add eax, eax ; pushfq ; pop rbx ; ud2
    let near =
        [&[0x66, 0xC7, 0x05, 0, 0, 0, 0, 0x90, 0x90], add, &[0x9C, 0x5B, 0x0F, 0x0B]].concat();
    // The same with a jump to the next block between.
    let far = [
        &[0x66, 0xC7, 0x05, 2, 0, 0, 0, 0x90, 0x90][..],
        &[0xEB, 0],
        add,
        &[0x9C, 0x5B, 0x0F, 0x0B],
    ]
    .concat();
    on_both(|guest, engine| {
        for body in [&near, &far] {
            for image in IMAGES {
                code(guest, &[&[0x57, 0x9D][..], body].concat());
                let mut gpr = registers();
                gpr[7] = image;
                guest.start(false, CODE, gpr, 0x202);
                guest.run();
                let flags = guest.vcpu.registers().expect("state").gpr[3] & ARITH;
                assert_eq!(flags, image & ARITH, "{engine}: {image:#x}");
            }
            for (left, right) in [(1u64, 2u64), (2, 1), (7, 7), (1 << 63, 1)] {
                // cmp rdi, rdx in place of the push and POPFQ
                code(guest, &[&[0x48, 0x39, 0xD7][..], body].concat());
                let mut gpr = registers();
                (gpr[7], gpr[2]) = (left, right);
                guest.start(false, CODE, gpr, 0xAD7);
                guest.run();
                let flags = guest.vcpu.registers().expect("state").gpr[3];
                let carry = left < right;
                assert_eq!(flags & 1 != 0, carry, "{engine}: {left} and {right}");
                assert_eq!(flags & 0x40 != 0, left == right, "{engine}: {left} and {right}");
            }
        }
    });
}
