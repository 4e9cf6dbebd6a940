//! Debug exceptions at the edges of other instructions (Intel SDM 3B, 17.2 and
//! 17.3; 3A, 6.8.3).

mod support;

use support::case::{Fault, PAGE};
use support::guest::{BASE, CS3, DS0, End, FREE, Guest, KERNEL_CODE, P, U, W, on_both};
use tetrarch_engine::{Exit, Reply};

const USER: u64 = 0x40_0000;
const TF: u64 = 0x100;
const DB: End = End::Fault(Fault { vector: 1, error: 0, cr2: 0 });
const START: u64 = BASE + KERNEL_CODE;
/// A selector of SS that MOV SS reads.
const WATCHED: u64 = BASE + FREE;
const DR6_BS: u64 = 1 << 14;
const MOV_SS: [u8; 2] = [0x8E, 0x17]; // mov ss, [rdi]

/// Runs `setup`, then `code` with TF as given, to the first exception.
fn run(guest: &mut Guest, code: &[u8], flags: u64) -> End {
    guest.write(KERNEL_CODE, code);
    let mut gpr = [0; 16];
    gpr[4] = START + 0x800;
    gpr[7] = WATCHED;
    guest.start(true, START, gpr, flags);
    guest.run()
}

/// DR0 watches the selector at [`WATCHED`], reads and writes of two bytes.
fn watch(guest: &mut Guest) {
    guest.write(FREE, &DS0.to_le_bytes());
    // mov dr0, rdi ; mov dr6, rbx ; mov dr7, rax ; hlt
    let code = [0x0F, 0x23, 0xC7, 0x0F, 0x23, 0xF3, 0x0F, 0x23, 0xF8, 0xF4];
    guest.write(KERNEL_CODE, &code);
    let mut gpr = [0; 16];
    (gpr[0], gpr[7]) = (1 | 0b0111 << 16, WATCHED);
    guest.start(true, START, gpr, 2);
    assert_eq!(guest.run_raw(), Exit::Halt);
}

/// What DR6 says of causes.
fn dr6(guest: &mut Guest) -> u64 {
    // mov rax, dr6 ; hlt
    guest.write(KERNEL_CODE + 0x400, &[0x0F, 0x21, 0xF0, 0xF4]);
    guest.start(true, START + 0x400, [0; 16], 2);
    assert_eq!(guest.run_raw(), Exit::Halt);
    guest.vcpu.registers().expect("state").gpr[0] & 0xE00F
}

#[test]
fn single_step_ends_hlt() {
    on_both(|guest, engine| {
        for flags in [2 | TF, 0x202 | TF] {
            assert_eq!(run(guest, &[0xF4, 0x90], flags), DB, "{engine}");
            assert_eq!(guest.frame.rip, START + 1, "{engine}");
        }
        // The handler returns behind HLT, to code that runs.
        // In the handler: mov rax, [rsp+16] less TF ; mov [rsp+16], rax ; iretq
        let handler = [0x80, 0x64, 0x24, 0x11, 0xFE, 0x48, 0xCF]; // and byte [rsp+17], 0xfe
        guest.write(KERNEL_CODE + 0x200, &handler);
        guest.gate(1, START + 0x200, 1, 3);
        // hlt ; mov ebx, 7 ; ud2
        let code = [0xF4, 0xBB, 7, 0, 0, 0, 0x0F, 0x0B];
        let end = run(guest, &code, 2 | TF);
        assert_eq!(end, End::Fault(Fault { vector: 6, error: 0, cr2: 0 }), "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 7, "{engine}");
    });
}

#[test]
fn mov_ss_holds_its_data_breakpoint_back_for_one_instruction() {
    on_both(|guest, engine| {
        watch(guest);
        let code = [MOV_SS[0], MOV_SS[1], 0xFF, 0xC3, 0xFF, 0xC3]; // inc ebx, twice
        assert_eq!(run(guest, &code, 2), DB, "{engine}");
        assert_eq!(guest.frame.rip, START + 4, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 1, "{engine}");
        assert_eq!(dr6(guest), 1, "{engine}");
    });
}

#[test]
fn a_step_over_mov_ss_comes_behind_the_next_instruction() {
    on_both(|guest, engine| {
        watch(guest);
        let code = [MOV_SS[0], MOV_SS[1], 0xFF, 0xC3, 0xFF, 0xC3];
        assert_eq!(run(guest, &code, 2 | TF), DB, "{engine}");
        assert_eq!(guest.frame.rip, START + 4, "{engine}");
        assert_eq!(dr6(guest), 1 | DR6_BS, "{engine}");
    });
}

/// A handler that counts in r15 and returns.
fn count(guest: &mut Guest, vector: u8) {
    guest.write(KERNEL_CODE + 0x200, &[0x49, 0xFF, 0xC7, 0x48, 0xCF]); // inc r15 ; iretq
    guest.gate(vector, START + 0x200, 0, 3);
}

#[test]
fn int1_behind_mov_ss_is_one_exception_with_the_breakpoint() {
    on_both(|guest, engine| {
        for flags in [2, 2 | TF] {
            watch(guest);
            let code = [MOV_SS[0], MOV_SS[1], 0xF1, 0x90];
            assert_eq!(run(guest, &code, flags), DB, "{engine}");
            assert_eq!(guest.frame.rip, START + 3, "{engine}");
            assert_eq!(dr6(guest), 1, "{engine}: no single step of INT1");
            // Only the one.
            watch(guest);
            count(guest, 1);
            let code = [MOV_SS[0], MOV_SS[1], 0xF1, 0x0F, 0x0B];
            let ud = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
            assert_eq!(run(guest, &code, 2), ud, "{engine}");
            assert_eq!(guest.vcpu.registers().expect("state").gpr[15], 1, "{engine}");
            let handlers = 0x5_3000;
            guest.gate(1, BASE + handlers + 16, 1, 3);
        }
    });
}

#[test]
fn int_n_behind_mov_ss_meets_the_breakpoint_in_its_handler() {
    on_both(|guest, engine| {
        for (int, len) in [([0xCD, 0x20], 2), ([0xCC, 0x90], 1)] {
            watch(guest);
            let code = [MOV_SS[0], MOV_SS[1], int[0], int[1]];
            assert_eq!(run(guest, &code, 2), DB, "{engine}");
            let vector = if len == 2 { 0x20 } else { 3 };
            let handlers = BASE + 0x5_3000;
            assert_eq!(guest.frame.rip, handlers + vector * 16, "{engine}");
            assert_eq!(dr6(guest), 1, "{engine}");
        }
    });
}

#[test]
fn a_fault_behind_mov_ss_meets_the_breakpoint_in_its_handler() {
    on_both(|guest, engine| {
        watch(guest);
        let code = [MOV_SS[0], MOV_SS[1], 0x0F, 0x0B];
        assert_eq!(run(guest, &code, 2), DB, "{engine}");
        assert_eq!(guest.frame.rip, BASE + 0x5_3000 + 6 * 16, "{engine}");
    });
}

#[test]
fn code_breakpoint_behind_mov_ss_does_not_fire() {
    on_both(|guest, engine| {
        guest.write(FREE, &DS0.to_le_bytes());
        // mov dr0, rsi ; mov dr7, rax ; mov ss, [rdi] ; (nop) ; ud2
        let head = [0x0F, 0x23, 0xC6, 0x0F, 0x23, 0xF8];
        for (middle, hit) in [([0x8E, 0x17, 0x90], false), ([0x90, 0x90, 0x90], true)] {
            let mut code = head.to_vec();
            code.extend_from_slice(&middle);
            code.extend_from_slice(&[0x0F, 0x0B]);
            guest.write(KERNEL_CODE, &code);
            let mut gpr = [0; 16];
            (gpr[0], gpr[6], gpr[7]) = (1, START + 8, WATCHED);
            gpr[4] = START + 0x800;
            guest.start(true, START, gpr, 2);
            let ud = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
            assert_eq!(guest.run(), if hit { DB } else { ud }, "{engine}");
        }
    });
}

#[test]
fn breakpoint_bits_of_the_last_exception_are_cleared_by_the_next() {
    on_both(|guest, engine| {
        watch(guest);
        // mov dr6, rcx ; mov eax, [rdi] with DR6.B1 and B2 set by software
        guest.write(KERNEL_CODE, &[0x0F, 0x23, 0xF1, 0x8B, 0x07, 0x90]);
        let mut gpr = [0; 16];
        (gpr[1], gpr[7]) = (6, WATCHED);
        guest.start(true, START, gpr, 2);
        assert_eq!(guest.run(), DB, "{engine}");
        assert_eq!(dr6(guest), 1, "{engine}");
    });
}

#[test]
fn sysret_that_sets_tf_traps_before_user_code() {
    on_both(|guest, engine| {
        for page in 0..2 {
            guest.map(USER + page * PAGE, FREE + page * PAGE, P | W | U);
        }
        guest.write(FREE, &[0xFF, 0xC3, 0xFF, 0xC3]); // inc ebx
        // mov ecx, 0xc0000081 ; wrmsr ; mov rcx, rsi ; sysretq
        let code = [0xB9, 0x81, 0, 0, 0xC0, 0x0F, 0x30, 0x48, 0x89, 0xF1, 0x48, 0x0F, 0x07];
        guest.write(KERNEL_CODE, &code);
        let mut gpr = [0; 16];
        // STAR: SYSRET's base so that CS is CS3 and SS the one before it.
        gpr[2] = (u64::from(CS3 & !3) - 16) << 16 | 8;
        (gpr[6], gpr[11]) = (USER, 0x202 | TF);
        guest.start(true, START, gpr, 2);
        assert_eq!(guest.run(), DB, "{engine}");
        assert_eq!((guest.frame.rip, guest.frame.cs), (USER, u64::from(CS3)), "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 0, "{engine}");
        assert_eq!(dr6(guest), DR6_BS, "{engine}");
    });
}

#[test]
fn syscall_that_clears_tf_goes_unstepped() {
    on_both(|guest, engine| {
        guest.map(USER, FREE, P | W | U);
        guest.write(FREE, &[0x0F, 0x05]);
        for (mask, traps) in [(TF, false), (0, true)] {
            let setup = |msr: u32| {
                let [a, b, c, d] = msr.to_le_bytes();
                vec![0xB9, a, b, c, d, 0x0F, 0x30] // mov ecx, msr ; wrmsr
            };
            let mut msrs = vec![
                (0xC000_0081u32, 8u64 << 32),
                (0xC000_0082, BASE + KERNEL_CODE + 0x300),
                (0xC000_0084, mask),
            ];
            for (msr, value) in msrs.drain(..) {
                let mut code = setup(msr);
                code.push(0xF4);
                guest.write(KERNEL_CODE, &code);
                let mut gpr = [0; 16];
                (gpr[0], gpr[2]) = (value & 0xFFFF_FFFF, value >> 32);
                guest.start(true, START, gpr, 2);
                assert_eq!(guest.run_raw(), Exit::Halt);
            }
            guest.write(KERNEL_CODE + 0x300, &[0x0F, 0x0B]);
            guest.start(false, USER, [0; 16], 0x202 | TF);
            let ud = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
            assert_eq!(guest.run(), if traps { DB } else { ud }, "{engine}");
            assert_eq!(guest.frame.rip, BASE + KERNEL_CODE + 0x300, "{engine}");
        }
    });
}

#[test]
fn new_registers_forget_a_held_back_exception() {
    on_both(|guest, engine| {
        watch(guest);
        // mov ss, [rdi] ; out 0x80, al: it stops there with the breakpoint held back.
        assert_eq!(
            run(guest, &[MOV_SS[0], MOV_SS[1], 0xE6, 0x80], 2),
            End::Exit(Exit::PortOut { port: 0x80, size: 1, data: 0 }),
            "{engine}"
        );
        guest.vcpu.reply(Reply::Done);
        let ud = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
        assert_eq!(run(guest, &[0x0F, 0x0B], 2), ud, "{engine}");
        // Else it comes behind the answered instruction.
        watch(guest);
        let out = [MOV_SS[0], MOV_SS[1], 0xE6, 0x80, 0x90];
        assert!(matches!(run(guest, &out, 2), End::Exit(_)), "{engine}");
        guest.vcpu.reply(Reply::Done);
        assert_eq!(guest.run(), DB, "{engine}");
        assert_eq!(guest.frame.rip, START + 4, "{engine}");
    });
}
