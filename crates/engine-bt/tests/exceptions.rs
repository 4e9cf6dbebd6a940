//! Exceptions, their delivery and their end (Intel SDM 3A, chapter 6).

mod support;

use support::case::{Fault, PAGE};
use support::guest::{
    BASE, CS0, CS3, DS0, DS3, End, FREE, Guest, KERNEL_CODE, P, STACK0, U, W, on_both,
};
use tetrarch_engine::Exit;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;
const HANDLER: u64 = KERNEL_CODE + 0x400;

fn fault(vector: u8, error: u64) -> End {
    End::Fault(Fault { vector, error, cr2: 0 })
}

/// Two pages of user code and one of data, with `code` at `CODE + offset`.
fn prepare(guest: &mut Guest, offset: u64, code: &[u8]) {
    for page in 0..2 {
        guest.map(CODE + page * PAGE, FREE + page * PAGE, P | W | U);
    }
    guest.map(DATA, FREE + 2 * PAGE, P | W | U);
    guest.write(FREE + offset, code);
}

fn run_user(guest: &mut Guest, offset: u64, gpr: [u64; 16]) -> End {
    let mut gpr = gpr;
    gpr[4] = DATA + 0x800;
    guest.start(false, CODE + offset, gpr, 0x202);
    guest.run()
}

#[test]
fn fault_in_the_middle_of_a_block_is_precise() {
    // inc ebx ; X ; inc ebx ; ud2
    let cases: [(&[u8], u8, u64, u64); 8] = [
        (&[0xF7, 0xF1], 0, 0, 0),             // div ecx, by zero
        (&[0xF7, 0xF9], 0, 0, 0),             // idiv ecx
        (&[0x0F, 0x0B], 6, 0, 0),             // ud2
        (&[0xCC], 3, 0, 1),                   // int3: a trap
        (&[0xF4], 13, 0, 0),                  // hlt at CPL 3
        (&[0x0F, 0x20, 0xC0], 13, 0, 0),      // mov rax, cr0
        (&[0xE6, 0x80], 13, 0, 0),            // out 0x80, al at IOPL 0
        (&[0xCD, 0x50], 13, 0x50 * 8 + 2, 0), // int 0x50: past the IDT
    ];
    on_both(|guest, engine| {
        for (bytes, vector, error, skip) in cases {
            let mut code = vec![0xFF, 0xC3];
            code.extend_from_slice(bytes);
            code.extend_from_slice(&[0xFF, 0xC3, 0x0F, 0x0B]);
            prepare(guest, 0, &code);
            assert_eq!(run_user(guest, 0, [0; 16]), fault(vector, error), "{engine} {bytes:x?}");
            assert_eq!(guest.frame.rip, CODE + 2 + skip, "{engine} {bytes:x?}");
            assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 1, "{engine} {bytes:x?}");
            assert_eq!(guest.frame.cs, u64::from(CS3), "{engine} {bytes:x?}");
            assert_eq!(guest.frame.ss, u64::from(DS3), "{engine} {bytes:x?}");
            assert_eq!(guest.frame.rsp, DATA + 0x800, "{engine} {bytes:x?}");
        }
    });
}

#[test]
fn lock_on_what_cannot_be_locked_is_undefined() {
    on_both(|guest, engine| {
        for code in [
            &[0xF0, 0x89, 0x07, 0x0F, 0x0B][..], // lock mov [rdi], eax
            &[0xF0, 0x01, 0xC0, 0x0F, 0x0B],     // lock add eax, eax
            &[0xF0, 0x39, 0x07, 0x0F, 0x0B],     // lock cmp [rdi], eax
        ] {
            prepare(guest, 0, code);
            let mut gpr = [0; 16];
            gpr[7] = DATA;
            assert_eq!(run_user(guest, 0, gpr), fault(6, 0), "{engine} {code:x?}");
            assert_eq!(guest.frame.rip, CODE, "{engine} {code:x?}");
        }
    });
}

#[test]
fn instruction_longer_than_15_bytes_is_a_general_protection_fault() {
    on_both(|guest, engine| {
        let mut code = vec![0x66; 15];
        code.extend_from_slice(&[0x90, 0x0F, 0x0B]);
        prepare(guest, 0, &code);
        assert_eq!(run_user(guest, 0, [0; 16]), fault(13, 0), "{engine}");
        assert_eq!(guest.frame.rip, CODE, "{engine}");
        prepare(guest, 0, &code[1..]);
        assert_eq!(run_user(guest, 0, [0; 16]), fault(6, 0), "{engine}");
        assert_eq!(guest.frame.rip, CODE + 15, "{engine}");
    });
}

#[test]
fn page_fault_leaves_earlier_instructions_done_and_later_ones_not() {
    on_both(|guest, engine| {
        // mov [rdi], ecx ; inc ecx ; mov [rsi], ecx ; inc ecx ; ud2
        prepare(guest, 0, &[0x89, 0x0F, 0xFF, 0xC1, 0x89, 0x0E, 0xFF, 0xC1, 0x0F, 0x0B]);
        let mut gpr = [0; 16];
        (gpr[1], gpr[6], gpr[7]) = (7, 0x66_6000, DATA);
        let end = run_user(guest, 0, gpr);
        assert_eq!(end, End::Fault(Fault { vector: 14, error: 6, cr2: 0x66_6000 }), "{engine}");
        assert_eq!(guest.frame.rip, CODE + 4, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[1], 8, "{engine}");
        assert_eq!(guest.read64(FREE + 2 * PAGE) & 0xFFFF_FFFF, 7, "{engine}");
    });
}

#[test]
fn fetch_across_pages_faults_at_the_second_page() {
    on_both(|guest, engine| {
        let offset = PAGE - 3;
        prepare(guest, offset, &[0xFF, 0xC3, 0xB8, 1, 0, 0, 0, 0x0F, 0x0B]);
        guest.unmap(CODE + PAGE);
        let end = run_user(guest, offset, [0; 16]);
        assert_eq!(end, End::Fault(Fault { vector: 14, error: 20, cr2: CODE + PAGE }), "{engine}");
        assert_eq!(guest.frame.rip, CODE + PAGE - 1, "{engine}: of the instruction's start");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 1, "{engine}");
        guest.map(CODE + PAGE, FREE + PAGE, P | U);
        assert_eq!(run_user(guest, offset, [0; 16]), fault(6, 0), "{engine}: mapped now");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[0], 1, "{engine}");
    });
}

#[test]
fn stack_address_that_is_not_canonical_is_a_stack_fault() {
    on_both(|guest, engine| {
        // mov rsp, rax ; push rbx ; and mov rax, [rbp]
        for code in [&[0x48, 0x89, 0xC4, 0x53][..], &[0x48, 0x8B, 0x45, 0x00]] {
            prepare(guest, 0, code);
            let mut gpr = [0; 16];
            (gpr[0], gpr[5]) = (1 << 60, 1 << 60);
            assert_eq!(run_user(guest, 0, gpr), fault(12, 0), "{engine} {code:x?}");
        }
    });
}

#[test]
fn pushf_that_faults_leaves_the_registers() {
    on_both(|guest, engine| {
        for rsp in [1 << 63, (1 << 63) + 0x808, 0x66_6000] {
            // mov rsp, rbx ; pushfq
            prepare(guest, 0, &[0x48, 0x89, 0xDC, 0x9C]);
            guest.unmap(0x66_5000);
            let mut gpr = [0; 16];
            (gpr[0], gpr[3]) = (0xABCD, rsp);
            let End::Fault(fault) = run_user(guest, 0, gpr) else { panic!("{engine}: no fault") };
            assert!(fault.vector == 12 || fault.vector == 14, "{engine} {rsp:#x}: {fault:x?}");
            let gpr = guest.vcpu.registers().expect("state").gpr;
            assert_eq!(gpr[0], 0xABCD, "{engine} {rsp:#x}");
            assert_eq!(guest.frame.rsp, rsp, "{engine} {rsp:#x}");
        }
    });
}

#[test]
fn handler_returns_with_iret_to_the_instruction_that_faulted() {
    on_both(|guest, engine| {
        // The handler maps the page: add rsp, 8 ; mov [rsi], r8 ; iretq
        let handler = [0x48, 0x83, 0xC4, 8, 0x4C, 0x89, 0x06, 0x48, 0xCF];
        guest.write(HANDLER, &handler);
        guest.gate(14, BASE + HANDLER, 0, 0);
        // stc ; mov rax, [rdi] ; setc bl ; ud2
        prepare(guest, 0, &[0xF9, 0x48, 0x8B, 0x07, 0x0F, 0x92, 0xC3, 0x0F, 0x0B]);
        guest.write64(FREE + 3 * PAGE, 0xABCD);
        guest.unmap(0x66_6000);
        let slot = guest.slot(0x66_6000, 0);
        let mut gpr = [0; 16];
        (gpr[6], gpr[7], gpr[8]) = (BASE + slot, 0x66_6000, (FREE + 3 * PAGE) | P | W | U);
        assert_eq!(run_user(guest, 0, gpr), fault(6, 0), "{engine}");
        let gpr = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((gpr[0], gpr[3]), (0xABCD, 1), "{engine}");
        assert_eq!(guest.frame.rsp, DATA + 0x800, "{engine}: the user's stack is back");
    });
}

#[test]
fn exception_from_user_mode_switches_to_rsp0_and_aligns_in_the_kernel() {
    on_both(|guest, engine| {
        guest.write(HANDLER, &[0xF4]);
        guest.gate(6, BASE + HANDLER, 0, 0);
        prepare(guest, 0, &[0x0F, 0x0B]);
        assert_eq!(run_user(guest, 0, [0; 16]), End::Exit(Exit::Halt), "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[4], BASE + STACK0 - 40, "{engine}");
        assert_eq!(
            guest.vcpu.registers().expect("state").rflags & 0x300,
            0,
            "{engine}: IF and TF are off"
        );
        // In the kernel the frame goes below RSP, aligned to 16 (SDM 3A, 6.14.2).
        guest.write(KERNEL_CODE, &[0x0F, 0x0B]);
        let mut gpr = [0; 16];
        gpr[4] = BASE + KERNEL_CODE + 0x80D;
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), End::Exit(Exit::Halt), "{engine}");
        assert_eq!(
            guest.vcpu.registers().expect("state").gpr[4],
            BASE + KERNEL_CODE + 0x800 - 40,
            "{engine}"
        );
    });
}

#[test]
fn second_fault_while_delivering_is_a_double_fault() {
    on_both(|guest, engine| {
        guest.no_gate(13);
        prepare(guest, 0, &[0xFF, 0xC3, 0xF4]); // #GP whose gate is not present: #NP
        assert_eq!(run_user(guest, 0, [0; 16]), fault(8, 0), "{engine}");
        // Contributory after #PF.
        guest.no_gate(14);
        prepare(guest, 0, &[0x48, 0x8B, 0x07]);
        let mut gpr = [0; 16];
        gpr[7] = 0x66_6000;
        assert_eq!(run_user(guest, 0, gpr), fault(8, 0), "{engine}: #PF, then #NP");
        // #UD is benign: what its delivery raises is delivered itself (table 6-5).
        guest.no_gate(6);
        prepare(guest, 0, &[0x0F, 0x0B]);
        // Its error code names the gate, with EXT: an exception was on its way (6.13).
        assert_eq!(run_user(guest, 0, [0; 16]), fault(11, 6 * 8 + 3), "{engine}");
    });
}

#[test]
fn third_fault_shuts_the_cpu_down() {
    on_both(|guest, engine| {
        guest.no_gate(8);
        guest.no_gate(13);
        prepare(guest, 0, &[0xF4]);
        assert_eq!(run_user(guest, 0, [0; 16]), End::Exit(Exit::Shutdown), "{engine}");
        assert_eq!(guest.run_raw(), Exit::Shutdown, "{engine}: until a reset");
    });
}

#[test]
fn iret_goes_to_user_mode_and_back_by_int3() {
    on_both(|guest, engine| {
        prepare(guest, 0, &[0xB3, 0x33, 0xCC]); // mov bl, 0x33 ; int3
        // The frame is made by the kernel: push ss, rsp, flags, cs, rip ; iretq
        let mut code = vec![0x6A, DS3 as u8, 0x57, 0x68, 0x02, 0x02, 0, 0, 0x6A, CS3 as u8, 0x56];
        code.extend_from_slice(&[0x48, 0xCF]);
        guest.write(KERNEL_CODE, &code);
        let mut gpr = [0; 16];
        (gpr[4], gpr[6], gpr[7]) = (BASE + KERNEL_CODE + 0x800, CODE, DATA + 0x800);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), fault(3, 0), "{engine}");
        let frame = guest.frame;
        assert_eq!((frame.cs, frame.ss), (u64::from(CS3), u64::from(DS3)), "{engine}");
        assert_eq!((frame.rip, frame.rsp), (CODE + 3, DATA + 0x800), "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 0x33, "{engine}");
        let system = guest.vcpu.system_registers().expect("state");
        assert_eq!((system.cs.selector, system.ss.selector & 3), (CS0, 0), "{engine}");
    });
}

#[test]
fn iret_to_an_address_that_is_not_canonical_faults_in_the_kernel() {
    on_both(|guest, engine| {
        let mut code = vec![0x6A, DS0 as u8, 0x57, 0x6A, 0x02, 0x6A, CS0 as u8, 0x56];
        code.extend_from_slice(&[0x48, 0xCF]);
        guest.write(KERNEL_CODE, &code);
        let mut gpr = [0; 16];
        (gpr[4], gpr[6], gpr[7]) =
            (BASE + KERNEL_CODE + 0x800, 1 << 50, BASE + KERNEL_CODE + 0x800);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), fault(13, 0), "{engine}");
        assert_eq!(guest.frame.cs, u64::from(CS0), "{engine}");
    });
}

/// The 8259A as firmware sets it up: vectors from 0x20, all masked but IRQ 0.
const PIC: [u8; 34] = [
    0xB0, 0x11, 0xE6, 0x20, // mov al, 0x11 ; out 0x20, al (ICW1)
    0xB0, 0x20, 0xE6, 0x21, // vectors from 0x20
    0xB0, 0x04, 0xE6, 0x21, // the second chip is at IR2
    0xB0, 0x01, 0xE6, 0x21, // 8086 mode
    0xB0, 0xFE, 0xE6, 0x21, // IMR: all but IRQ 0
    0xB0, 0x30, 0xE6, 0x43, // PIT channel 0, mode 0, both bytes
    0xB0, 0x01, 0xE6, 0x40, // the count is 1
    0xB0, 0x00, 0xE6, 0x40, 0x90, 0x90,
];

/// Sets an interrupt on its way, then waits without interrupts long enough for
/// it to be pending, then runs `tail`.
fn with_interrupt_pending(guest: &mut Guest, tail: &[u8]) -> End {
    let mut code = PIC.to_vec();
    // mov ecx, 0x200000 ; dec ecx ; jnz
    code.extend_from_slice(&[0xB9, 0, 0, 0x20, 0, 0xFF, 0xC9, 0x75, 0xFC]);
    code.extend_from_slice(tail);
    guest.write(KERNEL_CODE, &code);
    let mut gpr = [0; 16];
    gpr[4] = BASE + KERNEL_CODE + 0xC00;
    guest.start(true, BASE + KERNEL_CODE, gpr, 2);
    guest.run()
}

const TAIL: u64 = BASE + KERNEL_CODE + PIC.len() as u64 + 9;

#[test]
fn sti_holds_interrupts_off_for_one_instruction() {
    on_both(|guest, engine| {
        // sti ; inc ebx ; inc ebx ; ud2
        let end = with_interrupt_pending(guest, &[0xFB, 0xFF, 0xC3, 0xFF, 0xC3, 0x0F, 0x0B]);
        assert_eq!(end, fault(0x20, 0), "{engine}");
        assert_eq!(guest.frame.rip, TAIL + 3, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 1, "{engine}");
    });
}

#[test]
fn sti_hlt_with_a_pending_interrupt_wakes_behind_hlt() {
    on_both(|guest, engine| {
        let end = with_interrupt_pending(guest, &[0xFB, 0xF4, 0x0F, 0x0B]);
        assert_eq!(end, fault(0x20, 0), "{engine}");
        assert_eq!(guest.frame.rip, TAIL + 2, "{engine}");
    });
}

#[test]
fn popf_that_sets_if_takes_the_interrupt_at_once() {
    on_both(|guest, engine| {
        // push 0x202 ; popf ; inc ebx ; ud2: POPF has no shadow
        let tail = [0x68, 0x02, 0x02, 0, 0, 0x9D, 0xFF, 0xC3, 0x0F, 0x0B];
        assert_eq!(with_interrupt_pending(guest, &tail), fault(0x20, 0), "{engine}");
        assert_eq!(guest.frame.rip, TAIL + 6, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 0, "{engine}");
    });
}

#[test]
fn interrupt_ends_a_loop_in_user_mode() {
    on_both(|guest, engine| {
        prepare(guest, 0, &[0xFF, 0xC3, 0xEB, 0xFC]); // inc ebx ; jmp back
        // To user mode by IRET with the timer running.
        let mut code = PIC.to_vec();
        code.extend_from_slice(&[0x6A, DS3 as u8, 0x57, 0x68, 0x02, 0x02, 0, 0, 0x6A, CS3 as u8]);
        code.extend_from_slice(&[0x56, 0x48, 0xCF]);
        // A count of 0x1000 ticks: 3.4 ms.
        code[29] = 0x10;
        guest.write(KERNEL_CODE, &code);
        let mut gpr = [0; 16];
        (gpr[4], gpr[6], gpr[7]) = (BASE + KERNEL_CODE + 0xC00, CODE, DATA + 0x800);
        guest.start(true, BASE + KERNEL_CODE, gpr, 2);
        assert_eq!(guest.run(), fault(0x20, 0), "{engine}");
        assert_eq!(guest.frame.cs, u64::from(CS3), "{engine}");
        assert_eq!(guest.frame.rip & !3, CODE, "{engine}");
    });
}

#[test]
fn trap_flag_stops_after_each_instruction() {
    on_both(|guest, engine| {
        prepare(guest, 0, &[0xFF, 0xC3, 0xFF, 0xC3, 0x0F, 0x0B]);
        let mut gpr = [0; 16];
        gpr[4] = DATA + 0x800;
        guest.start(false, CODE, gpr, 0x302);
        assert_eq!(guest.run(), fault(1, 0), "{engine}");
        assert_eq!(guest.frame.rip, CODE + 2, "{engine}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[3], 1, "{engine}");
        assert_ne!(guest.frame.rflags & 0x100, 0, "{engine}: TF is in the frame");
    });
}

#[test]
fn far_pointers_with_rex_w_are_the_vendors() {
    on_both(|guest, engine| {
        let [_, ebx, ..] = guest.cpuid(0, 0);
        let amd = ebx == u32::from_le_bytes(*b"Auth");
        // jmp far [rdi], call far [rdi] with REX.W: AMD ignores it and reads m16:32
        // (APM 3, "JMP (Far)"), Intel reads m16:64 (SDM 2A, "JMP").
        for code in [[0x48, 0xFF, 0x2F], [0x48, 0xFF, 0x1F]] {
            prepare(guest, 0, &[0x0F, 0x0B]);
            guest.write(KERNEL_CODE, &code);
            // As m16:64 the offset has the selector in it and the selector is null.
            guest.write64(FREE + 2 * PAGE, CODE | u64::from(CS0) << 32);
            guest.write64(FREE + 2 * PAGE + 8, 0);
            let mut gpr = [0; 16];
            (gpr[4], gpr[7]) = (BASE + KERNEL_CODE + 0x800, DATA);
            guest.start(true, BASE + KERNEL_CODE, gpr, 2);
            let (end, rip) = if amd { (6, CODE) } else { (13, BASE + KERNEL_CODE) };
            assert_eq!(guest.run(), fault(end, 0), "{engine}");
            assert_eq!(guest.frame.rip, rip, "{engine}");
        }
    });
}
