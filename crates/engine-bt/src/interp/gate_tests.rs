//! Call gates: frames, privilege levels, and the fault of each check.

use super::*;
use crate::interp::exception::fixture::*;

const GATE: u16 = 0x68;
const TARGET: u64 = 0x1_2345;

/// A call gate of `kind` with access byte and parameter count.
fn gate(cpu: &Cpu, selector: u16, access: u64, count: u64) {
    let raw = TARGET & 0xFFFF
        | u64::from(selector) << 16
        | count << 32
        | access << 40
        | (TARGET >> 16) << 48;
    poke(cpu, GDT + u64::from(GATE), raw);
    poke(cpu, GDT + u64::from(GATE) + 8, 0);
}

fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, low, high]
}

const CALL: u8 = 0x9A;
const JMP: u8 = 0xEA;

/// CALL m16:16, [rdi]: 64-bit code has no direct far branches.
const CALL_AT_RDI: &[u8] = &[0x66, 0xFF, 0x1F];
const POINTER: u64 = 0x6000;

fn words(cpu: &Cpu, size: usize, count: u64) -> Vec<u64> {
    let sp = cpu.st.gpr[reg::RSP];
    (0..count).map(|n| peek(cpu, sp + n * size as u64, size)).collect()
}

#[test]
fn call_to_an_inner_level_copies_parameters() {
    for (access, size) in [(0xEC, 4), (0xE4, 2)] {
        let mut cpu = protected_mode();
        to_user(&mut cpu);
        gate(&cpu, KERNEL_CS, access, 3);
        cpu.st.gpr[reg::RSP] = USER_STACK - 3 * size as u64;
        for n in 0..3 {
            poke(&cpu, USER_STACK - 3 * size as u64 + n * size as u64, 0x1111 * (n + 1));
        }
        let user_sp = cpu.st.gpr[reg::RSP];
        run(&mut cpu, &far(CALL, GATE | 3)).unwrap();
        let target = if size == 4 { TARGET } else { TARGET & 0xFFFF };
        assert_eq!((cpu.st.rip, cpu.st.cpl), (target, 0));
        assert_eq!(cpu.st.seg[seg::CS].selector, KERNEL_CS);
        assert_eq!(cpu.st.seg[seg::SS].selector, KERNEL_DS);
        let expected =
            [CODE + 7, u64::from(USER_CS), 0x1111, 0x2222, 0x3333, user_sp, u64::from(USER_DS)]
                .map(|value| value & mask(size));
        assert_eq!(words(&cpu, size, 7), expected);
        // RETF 3 * size releases both stacks.
        let release = (3 * size) as u8;
        let ret: &[u8] = if size == 4 { &[0xCA, release, 0] } else { &[0x66, 0xCA, release, 0] };
        run(&mut cpu, ret).unwrap();
        assert_eq!((cpu.st.cpl, cpu.st.gpr[reg::RSP]), (3, USER_STACK));
        assert_eq!(cpu.st.rip, (CODE + 7) & mask(size));
    }
}

#[test]
fn call_at_the_same_level_copies_nothing() {
    for (access, size) in [(0x8C, 4), (0x84, 2)] {
        let mut cpu = protected_mode();
        gate(&cpu, KERNEL_CS, access, 7);
        run(&mut cpu, &far(CALL, GATE)).unwrap();
        assert_eq!(cpu.st.gpr[reg::RSP], KERNEL_STACK - 2 * size as u64);
        assert_eq!(words(&cpu, size, 2), [(CODE + 7) & mask(size), u64::from(KERNEL_CS)]);
    }
}

#[test]
fn conforming_code_keeps_the_level() {
    for opcode in [CALL, JMP] {
        let mut cpu = protected_mode();
        to_user(&mut cpu);
        gate(&cpu, CONFORMING, 0xEC, 0);
        run(&mut cpu, &far(opcode, GATE)).unwrap();
        assert_eq!((cpu.st.cpl, cpu.st.rip), (3, TARGET));
        assert_eq!(cpu.st.seg[seg::CS].selector, CONFORMING | 3);
        assert_eq!(cpu.st.seg[seg::SS].selector, USER_DS);
        let pushed = if opcode == CALL { 8 } else { 0 };
        assert_eq!(cpu.st.gpr[reg::RSP], USER_STACK - pushed);
    }
}

#[test]
fn jmp_goes_through_a_gate_at_its_level_only() {
    let mut cpu = protected_mode();
    gate(&cpu, KERNEL_CS, 0x8C, 0);
    run(&mut cpu, &far(JMP, GATE)).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RSP]), (TARGET, KERNEL_STACK));
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    gate(&cpu, KERNEL_CS, 0xEC, 0);
    assert_eq!(run(&mut cpu, &far(JMP, GATE)), gp(u32::from(KERNEL_CS)));
}

/// Each check of a gate and of its code segment (SDM 2A, "CALL").
#[test]
fn gates_are_checked() {
    use vector::{GP, NP, SS, TS};
    let user_ss0 = |c: &mut Cpu, selector: u16| {
        poke(c, TSS + 4, KERNEL_STACK | u64::from(selector) << 32);
    };
    type Break<'a> = &'a dyn Fn(&mut Cpu);
    let cases: [(&str, Break, u16, u8, u16); 15] = [
        ("DPL under CPL", &|c| gate(c, KERNEL_CS, 0x8C, 0), GATE, GP, GATE),
        ("absent", &|c| gate(c, KERNEL_CS, 0x6C, 0), GATE, NP, GATE),
        ("to a null selector", &|c| gate(c, 3, 0xEC, 0), GATE, GP, 0),
        ("to data", &|c| gate(c, KERNEL_DS, 0xEC, 0), GATE, GP, KERNEL_DS),
        ("behind the table", &|c| gate(c, 0x100, 0xEC, 0), GATE, GP, 0x100),
        (
            "to absent code",
            &|c| {
                poke(c, GDT + 0x78, 0x00CF_1A00_0000_FFFF);
                gate(c, 0x78, 0xEC, 0);
            },
            GATE,
            NP,
            0x78,
        ),
        (
            "over the limit",
            &|c| {
                poke(c, GDT + 0x78, 0x0040_9A00_0000_FFFF);
                gate(c, 0x78, 0xEC, 0);
            },
            GATE,
            GP,
            0,
        ),
        ("TSS too short", &|c| c.st.seg[seg::TR].limit = 8, GATE, TS, TSS_SELECTOR),
        ("SS0 null", &|c| user_ss0(c, 0), GATE, TS, 0),
        ("SS0 read-only", &|c| user_ss0(c, READ_ONLY), GATE, TS, READ_ONLY),
        ("SS0 of level 3", &|c| user_ss0(c, USER_DS), GATE, TS, USER_DS & !3),
        ("SS0 absent", &|c| user_ss0(c, NOT_PRESENT), GATE, SS, NOT_PRESENT),
        (
            "no room on SS0",
            &|c| {
                poke(c, TSS + 4, 0x10 | u64::from(KERNEL_DS) << 32);
                poke(c, GDT + 0x10, 0x0040_9600_0000_0000 | 0x0F);
            },
            GATE,
            SS,
            KERNEL_DS,
        ),
        ("an interrupt gate", &|c| gate(c, KERNEL_CS, 0xEE, 0), GATE, GP, GATE),
        ("an LDT", &|_| {}, LDT_SELECTOR, GP, LDT_SELECTOR),
    ];
    for (name, spoil, selector, vector, error) in cases {
        let mut cpu = protected_mode();
        to_user(&mut cpu);
        gate(&cpu, KERNEL_CS, 0xEC, 1);
        spoil(&mut cpu);
        let before = (cpu.st.rip, cpu.st.gpr, cpu.st.cpl, cpu.st.seg);
        let result = run(&mut cpu, &far(CALL, selector));
        assert_eq!(result, fail(vector, u32::from(error)), "{name}");
        assert_eq!(before, (cpu.st.rip, cpu.st.gpr, cpu.st.cpl, cpu.st.seg), "{name}");
    }
}

fn long_gate(user: bool) -> Cpu {
    let mut cpu = long_mode();
    if user {
        to_user(&mut cpu);
    }
    gate(&cpu, KERNEL_CS, 0xEC, 0);
    poke(&cpu, POINTER, u64::from(GATE) << 16);
    cpu.st.gpr[reg::RDI] = POINTER;
    cpu
}

#[test]
fn long_mode_gates_change_to_the_stack_of_the_tss() {
    let mut cpu = long_gate(true);
    run(&mut cpu, CALL_AT_RDI).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.cpl), (TARGET, 0));
    assert_eq!(cpu.st.gpr[reg::RSP], KERNEL_STACK - 32);
    let expected = [CODE + 3, u64::from(USER_CS), USER_STACK, u64::from(USER_DS)];
    assert_eq!(words(&cpu, 8, 4), expected);
    assert_eq!(cpu.st.seg[seg::SS].selector, 0);
    run(&mut cpu, &[0x48, 0xCB]).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.cpl, cpu.st.gpr[reg::RSP]), (CODE + 3, 3, USER_STACK));
}

#[test]
fn long_mode_gates_at_the_same_level_push_quadwords() {
    let mut cpu = long_gate(false);
    run(&mut cpu, CALL_AT_RDI).unwrap();
    assert_eq!(words(&cpu, 8, 2), [CODE + 3, u64::from(KERNEL_CS)]);
    assert_eq!(cpu.st.gpr[reg::RSP], KERNEL_STACK - 16);
}

#[test]
fn long_mode_gates_are_checked() {
    let code = u32::from(GATE);
    let mut cpu = long_gate(true);
    poke(&cpu, GDT + u64::from(GATE) + 8, 0x0100 << 32);
    assert_eq!(run(&mut cpu, CALL_AT_RDI), gp(code), "a type in the upper half");
    let mut cpu = long_gate(true);
    poke(&cpu, GDT + u64::from(GATE) + 8, 0x1_0000);
    assert_eq!(run(&mut cpu, CALL_AT_RDI), gp(0), "an offset that is not canonical");
    let mut cpu = long_gate(true);
    gate(&cpu, USER_CS32, 0xEC, 0);
    assert_eq!(run(&mut cpu, CALL_AT_RDI), gp(u32::from(USER_CS32 & !3)), "32-bit code");
    for kind in [0xE4, 0xE5, 0xE9, 0xEB, 0xE1] {
        let mut cpu = long_gate(true);
        gate(&cpu, KERNEL_CS, kind, 0);
        assert_eq!(run(&mut cpu, CALL_AT_RDI), gp(code), "{kind:#x} is no gate of long mode");
    }
    let mut cpu = long_gate(true);
    cpu.st.gdt.limit = GATE + 7;
    assert_eq!(run(&mut cpu, CALL_AT_RDI), gp(code), "half outside the table");
}
