//! PUSHF, POPF, CLI, STI: the flags that are not arithmetic.

mod support;

use support::case::Fault;
use support::guest::{BASE, End, Guest, KERNEL_CODE, P, U, W, on_both};
use tetrarch_engine::Exit;

const USER: u64 = 0x40_0000;
const IF: u64 = 0x200;
const IOPL: u64 = 0x3000;
const UD: End = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });

fn kernel(guest: &mut Guest, code: &[u8], rax: u64, rflags: u64) -> End {
    guest.write(KERNEL_CODE, code);
    let mut gpr = [0; 16];
    gpr[0] = rax;
    gpr[4] = BASE + KERNEL_CODE + 0x800;
    guest.start(true, BASE + KERNEL_CODE, gpr, rflags);
    guest.run()
}

fn user(guest: &mut Guest, code: &[u8], rax: u64, rflags: u64) -> End {
    guest.map(USER, KERNEL_CODE, P | W | U);
    guest.write(KERNEL_CODE, code);
    let mut gpr = [0; 16];
    gpr[0] = rax;
    gpr[4] = USER + 0x800;
    guest.start(false, USER, gpr, rflags);
    guest.run()
}

/// push rax ; popf ; pushf ; pop rbx ; ud2
const POPF: [u8; 6] = [0x50, 0x9D, 0x9C, 0x5B, 0x0F, 0x0B];

#[test]
fn popf_in_the_kernel_sets_what_pushf_reads() {
    on_both(|guest, engine| {
        // All but TF, RF, VM and the reserved bits (SDM 1, 3.4.3).
        for value in [0x2, 0x202, 0x8D7, 0x3202, 0x4002, 0x4_0002, 0x20_0002, 0x402, 0x24_4ED7] {
            assert_eq!(kernel(guest, &POPF, value, 2), UD, "{engine}");
            assert_eq!(guest.vcpu.registers().expect("state").gpr[3], value, "{engine}");
            let pushed = guest.frame.rflags & !0x1_0000; // RF is set by the fault itself
            assert_eq!(pushed, value, "{engine}: the exception's frame");
        }
    });
}

#[test]
fn popf_leaves_fixed_bits_alone() {
    on_both(|guest, engine| {
        // Bits 3, 5, 15 and those over 21; VM; RF.
        assert_eq!(kernel(guest, &POPF, 0xFFFF_FFFF_FFC0_8028 | 0x3_0000, 2), UD, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 2, "{engine}");
    });
}

#[test]
fn popf_in_user_mode_cannot_change_if_and_iopl() {
    on_both(|guest, engine| {
        for start in [2, 2 | IF] {
            for value in [2, 2 | IF, 2 | IF | IOPL] {
                assert_eq!(user(guest, &POPF, value, start), UD, "{engine}");
                assert_eq!(guest.vcpu.registers().expect("state").gpr[3], start, "{engine}");
            }
        }
    });
}

#[test]
fn popf_in_user_mode_at_iopl_3_changes_if_alone() {
    on_both(|guest, engine| {
        assert_eq!(user(guest, &POPF, 2, 2 | IF | IOPL), UD, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 2 | IOPL, "{engine}");
        assert_eq!(user(guest, &POPF, 2 | IF, 2 | IOPL), UD, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 2 | IF | IOPL, "{engine}");
    });
}

#[test]
fn cli_and_sti_keep_the_arithmetic_flags() {
    on_both(|guest, engine| {
        // stc ; sti ; pushf ; pop rbx ; cli ; pushf ; pop rcx ; ud2
        let code = [0xF9, 0xFB, 0x9C, 0x5B, 0xFA, 0x9C, 0x59, 0x0F, 0x0B];
        assert_eq!(kernel(guest, &code, 0, 0x8D6), UD, "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[3], gpr[1]), (0x8D7 | IF, 0x8D7), "{engine}");
    });
}

#[test]
fn cli_in_user_mode_needs_iopl() {
    on_both(|guest, engine| {
        let gp = End::Fault(Fault { vector: 13, error: 0, cr2: 0 });
        for code in [[0xFA, 0x0F, 0x0B], [0xFB, 0x0F, 0x0B]] {
            assert_eq!(user(guest, &code, 0, 2 | IF), gp, "{engine}");
            assert_eq!(guest.frame.rip, USER, "{engine}");
            assert_eq!(user(guest, &code, 0, 2 | IF | IOPL), UD, "{engine}");
        }
    });
}

#[test]
fn sixteen_bit_popf_keeps_the_upper_flags() {
    on_both(|guest, engine| {
        // push ax ; popf (16 bits) ; pushf ; pop rbx ; ud2, with AC and ID set
        let code = [0x66, 0x50, 0x66, 0x9D, 0x9C, 0x5B, 0x0F, 0x0B];
        assert_eq!(kernel(guest, &code, 0x8D7, 0x24_0002), UD, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 0x24_08D7, "{engine}");
    });
}

#[test]
fn direction_flag_turns_string_instructions() {
    on_both(|guest, engine| {
        // std ; lodsb ; cld ; lodsb ; ud2
        let code = [0xFD, 0xAC, 0xFC, 0xAC, 0x0F, 0x0B];
        guest.write(KERNEL_CODE, &code);
        let mut gpr = [0; 16];
        gpr[6] = BASE + KERNEL_CODE + 2;
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), UD, "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[0], gpr[6]), (0xAC, BASE + KERNEL_CODE + 2), "{engine}");
    });
}

#[test]
fn hlt_with_interrupts_off_ends_the_run() {
    on_both(|guest, engine| {
        assert_eq!(kernel(guest, &[0xFA, 0xF4], 0, 2 | IF), End::Exit(Exit::Halt), "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").rip, BASE + KERNEL_CODE + 2, "{engine}");
    });
}
