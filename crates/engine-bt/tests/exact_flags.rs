//! Arithmetic flags at a fault, and after a store into code: those of the last
//! instruction that wrote them, needed by what follows or not, in the same block or
//! in one that is linked to it.

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

/// Runs the body again and again, with rsi a page further each time: the last time
/// at [`ABSENT`], when all its branches are linked.
fn rounds(guest: &mut Guest, body: &[u8]) {
    // lea rsi, [rsi + 4096] ; jmp back
    let mut bytes = [body, &[0x48, 0x8D, 0xB6, 0, 0x10, 0, 0]].concat();
    let back = -(bytes.len() as i32 + 5);
    bytes.push(0xE9);
    bytes.extend_from_slice(&back.to_le_bytes());
    code(guest, &bytes);
    for page in 1..=ROUNDS {
        guest.map(ABSENT - page * PAGE, FREE + 3 * PAGE, P | W | U);
    }
}

const ROUNDS: u64 = 3;

/// How the guest comes from the instruction that makes flags to the access.
const WAYS: [(&str, &[u8]); 6] = [
    ("in one block", &[]),
    ("jmp", &[0xEB, 0]),
    ("jmp, jmp", &[0xEB, 0, 0xEB, 0]),
    ("jne", &[0x75, 0]),
    ("jbe or not", &[0x76, 2, 0xEB, 0]),
    ("call", &[0xE8, 0, 0, 0, 0]),
];

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

#[test]
fn fault_behind_a_link_shows_flags_from_before_it() {
    on_both(|guest, engine| {
        for access in [&[0x88, 0x06][..], &[0x8A, 0x06], &[0xFF, 0x36], &[0xF0, 0x01, 0x06]] {
            for (name, way) in WAYS {
                // push rdi ; popfq ; the way ; the access ; add eax, eax
                rounds(guest, &[&[0x57, 0x9D], way, access, &[0x01, 0xC0]].concat());
                for image in IMAGES {
                    let mut gpr = registers();
                    (gpr[6], gpr[7]) = (ABSENT - ROUNDS * PAGE, image);
                    let flags = flags_at_fault(guest, gpr, 0x202);
                    assert_eq!(flags, image & ARITH, "{engine}: {name}, {access:x?}, {image:#x}");
                }
            }
        }
    });
}

/// What the interpreter shows is right by its own tests; the translator must show
/// the same, for each kind of producer and each fate of its operands.
#[test]
fn flags_made_again_are_those_of_their_producer() {
    let producers: [(&str, &[u8]); 36] = [
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
        ("shr bl,3", &[0xC0, 0xEB, 3]),
        ("imul ebx,eax,7", &[0x6B, 0xD8, 7]),
        ("imul eax,eax", &[0x0F, 0xAF, 0xC0]),
        ("bt rax,rbx", &[0x48, 0x0F, 0xA3, 0xD8]),
        ("test [rsp],rbx", &[0x48, 0x85, 0x1C, 0x24]),
        ("cmp r14w,[rsp]", &[0x66, 0x44, 0x3B, 0x34, 0x24]),
        ("cmp byte [rsp],0x80", &[0x80, 0x3C, 0x24, 0x80]),
        ("sub rax,[rsp]", &[0x48, 0x2B, 0x04, 0x24]),
        ("add al,ah", &[0x00, 0xE0]),
        ("mul rbx", &[0x48, 0xF7, 0xE3]),
    ];
    let between: [(&str, &[u8]); 9] = [
        ("nothing", &[]),
        ("a load", &[0x48, 0x8B, 0x0C, 0x24]),
        ("mov eax,5", &[0xB8, 5, 0, 0, 0]),
        ("a load, mov ebx,5", &[0x48, 0x8B, 0x0C, 0x24, 0xBB, 5, 0, 0, 0]),
        ("a load, mov r13,rdx", &[0x48, 0x8B, 0x0C, 0x24, 0x49, 0x89, 0xD5]),
        ("inc edx, a load", &[0xFF, 0xC2, 0x48, 0x8B, 0x0C, 0x24]),
        ("push rbx", &[0x53]),
        ("pop rbx, pop rax", &[0x5B, 0x58]),
        ("xchg rax,rbx, inc edx, mov eax,5", &[0x48, 0x93, 0xFF, 0xC2, 0xB8, 5, 0, 0, 0]),
    ];
    let seen = std::cell::RefCell::new(Vec::new());
    on_both(|guest, engine| {
        let mut results = Vec::new();
        for (name, producer) in producers {
            // Undefined flags are the model's (SDM 1, appendix A).
            let undefined = match name.split(' ').next() {
                Some("imul" | "mul") => ARITH & !0x801,
                Some("shl" | "sar" | "shr") => 0x810,
                Some("ror") if !name.ends_with(",1") => 0x800,
                Some("xor" | "and" | "or" | "test") => 0x10,
                Some("bt") => 0x894,
                _ => 0,
            };
            for (fate, between) in between {
                for (way, branches) in WAYS {
                    for parts in [[producer, branches, between], [producer, between, branches]] {
                        // then: mov [rsi], al ; sub edx, edx
                        rounds(guest, &[&parts.concat()[..], &[0x88, 0x06, 0x29, 0xD2]].concat());
                        for image in IMAGES {
                            let mut gpr = registers();
                            (gpr[1], gpr[6]) = (image & 0x1F, ABSENT - ROUNDS * PAGE);
                            let flags = flags_at_fault(guest, gpr, image) & !undefined;
                            results.push((name, fate, way, image, flags));
                        }
                    }
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
    // The same with a jump to the next block between, before it, or both.
    let far = [
        &[0x66, 0xC7, 0x05, 2, 0, 0, 0, 0x90, 0x90][..],
        &[0xEB, 0],
        add,
        &[0x9C, 0x5B, 0x0F, 0x0B],
    ]
    .concat();
    let bodies = [&[][..], &[0xEB, 0]].map(|jump| [[jump, &near].concat(), [jump, &far].concat()]);
    on_both(|guest, engine| {
        for body in bodies.as_flattened() {
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
