//! A 32-bit kernel that switches tasks by hardware, from the outside (Intel SDM
//! 3A, chapter 7; 6.14 on double faults).

mod support;

use support::guest::{FREE, Guest, on_both};
use tetrarch_engine::{Exit, Registers, Segment, SegmentTable, SystemRegisters};

const GDT: u64 = FREE;
const IDT: u64 = FREE + 0x1000;
/// Three TSSs.
const TASKS: [u64; 3] = [FREE + 0x2000, FREE + 0x2100, FREE + 0x2200];
const STACKS: [u64; 3] = [FREE + 0x4000, FREE + 0x5000, FREE + 0x6000];
const CODE: [u64; 3] = [FREE + 0x7000, FREE + 0x7100, FREE + 0x7200];

const CS: u16 = 0x08;
const DS: u16 = 0x10;
const SELECTORS: [u16; 3] = [0x18, 0x20, 0x28];

fn set32(guest: &Guest, at: u64, value: u64) {
    guest.write(at, &(value as u32).to_le_bytes());
}

fn tss_descriptor(base: u64, busy: bool) -> u64 {
    let kind = if busy { 0x8B } else { 0x89 };
    0x67 | (base & 0xFF_FFFF) << 16 | kind << 40 | (base >> 24) << 56
}

/// The tables, and tasks 1 and 2 at their entries; the CPU is task 0.
fn prepare(guest: &mut Guest, code: [&[u8]; 3]) {
    guest.write64(GDT + u64::from(CS), 0x00CF_9B00_0000_FFFF);
    guest.write64(GDT + u64::from(DS), 0x00CF_9300_0000_FFFF);
    for n in 0..3 {
        guest.write64(GDT + u64::from(SELECTORS[n]), tss_descriptor(TASKS[n], n == 0));
        guest.write(TASKS[n], &[0; 0x68]);
        set32(guest, TASKS[n] + 0x20, CODE[n]);
        set32(guest, TASKS[n] + 0x24, 2);
        set32(guest, TASKS[n] + 0x38, STACKS[n]);
        for (slot, selector) in [DS, CS, DS, DS, DS, DS].into_iter().enumerate() {
            set32(guest, TASKS[n] + 0x48 + slot as u64 * 4, u64::from(selector));
        }
        guest.write(CODE[n], code[n]);
    }
    guest.write(IDT, &[0; 256 * 8]);
    let data = Segment { base: 0, limit: 0xFFFF_FFFF, attributes: 0xC093, selector: DS };
    let system = SystemRegisters {
        cs: Segment { attributes: 0xC09B, selector: CS, ..data },
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        tr: Segment { base: TASKS[0], limit: 0x67, attributes: 0x8B, selector: SELECTORS[0] },
        ldt: Segment { attributes: 0x10082, ..Segment::default() },
        gdt: SegmentTable { base: GDT, limit: 0xFF },
        idt: SegmentTable { base: IDT, limit: 0x7FF },
        cr0: 0x11,
        ..SystemRegisters::default()
    };
    guest.set_system(&system);
    let mut gpr = [0; 16];
    gpr[4] = STACKS[0];
    guest.set_registers(&Registers { gpr, rip: CODE[0], rflags: 2 });
}

fn read32(guest: &Guest, at: u64) -> u64 {
    guest.read64(at) & 0xFFFF_FFFF
}

fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let [low, high] = selector.to_le_bytes();
    vec![opcode, 0, 0, 0, 0, low, high]
}

#[test]
fn two_tasks_take_turns() {
    on_both(|guest, engine| {
        // mov ecx, 1000 ; call task 1 ; loop ; hlt
        let mut main = vec![0xB9, 0xE8, 3, 0, 0];
        main.extend(far(0x9A, SELECTORS[1]));
        main.extend([0xE2, 0xF7, 0xF4]);
        // inc ebx ; iret ; jmp back
        prepare(guest, [&main, &[0x43, 0xCF, 0xEB, 0xFC], &[]]);
        assert_eq!(guest.run_raw(), Exit::Halt, "{engine}");
        assert_eq!(
            guest.vcpu.registers().expect("state").rip,
            CODE[0] + main.len() as u64,
            "{engine}"
        );
        assert_eq!(
            guest.vcpu.registers().expect("state").gpr[3],
            0,
            "{engine}: the registers are a task's own"
        );
        assert_eq!(read32(guest, TASKS[1] + 0x34), 1000, "{engine}");
        assert_eq!(
            guest.vcpu.system_registers().expect("state").tr.selector,
            SELECTORS[0],
            "{engine}"
        );
    });
}

#[test]
fn a_kernel_without_handlers_survives_its_double_fault() {
    on_both(|guest, engine| {
        // xor eax, eax ; mov ss, eax: #GP(0), whose own gate is missing, so #GP again
        let main = [0x31, 0xC0, 0x8E, 0xD0];
        prepare(guest, [&main, &[0x5A, 0xF4], &[]]); // pop edx ; hlt
        // Only the double fault has a gate, of task 1.
        guest.write64(IDT + 8 * 8, u64::from(SELECTORS[1]) << 16 | 0x8500 << 32);
        assert_eq!(guest.run_raw(), Exit::Halt, "{engine}");
        let registers = guest.vcpu.registers().expect("state");
        assert_eq!(registers.rip, CODE[1] + 2, "{engine}");
        assert_eq!((registers.gpr[2], registers.gpr[4]), (0, STACKS[1]), "{engine}: error code 0");
        assert_eq!(read32(guest, TASKS[0] + 0x20), CODE[0] + 2, "{engine}: MOV SS is the culprit");
        assert_eq!(read32(guest, TASKS[1]) as u16, SELECTORS[0], "{engine}");
        assert_ne!(registers.rflags & 1 << 14, 0, "{engine}: NT");
    });
}

#[test]
fn faults_of_the_new_task_are_handled_in_it() {
    on_both(|guest, engine| {
        prepare(guest, [&far(0xEA, SELECTORS[1]), &[0x90], &[0x5A, 0x5B, 0xF4]]);
        // DS of task 1 is no segment: #TS, whose handler runs on the stack of task 1.
        set32(guest, TASKS[1] + 0x54, 0x18);
        let gate = |at: u64| at & 0xFFFF | u64::from(CS) << 16 | 0x8E00 << 32 | at >> 16 << 48;
        guest.write64(IDT + 10 * 8, gate(CODE[2]));
        assert_eq!(guest.run_raw(), Exit::Halt, "{engine}");
        let registers = guest.vcpu.registers().expect("state");
        assert_eq!((registers.gpr[2], registers.gpr[3]), (0x18, CODE[1]), "{engine}");
        assert_eq!(registers.gpr[4], STACKS[1] - 8, "{engine}");
        assert_eq!(
            guest.vcpu.system_registers().expect("state").tr.selector,
            SELECTORS[1],
            "{engine}"
        );
    });
}

#[test]
fn the_trap_bit_stops_a_task_before_its_first_instruction() {
    on_both(|guest, engine| {
        // mov eax, dr6 ; pop ebx ; hlt
        let handler = [0x0F, 0x21, 0xF0, 0x5B, 0xF4];
        prepare(guest, [&far(0xEA, SELECTORS[1]), &[0x41, 0x90], &handler]); // inc ecx
        set32(guest, TASKS[1] + 0x64, 1);
        let gate = |at: u64| at & 0xFFFF | u64::from(CS) << 16 | 0x8E00 << 32 | at >> 16 << 48;
        guest.write64(IDT + 8, gate(CODE[2]));
        assert_eq!(guest.run_raw(), Exit::Halt, "{engine}");
        let registers = guest.vcpu.registers().expect("state");
        assert_eq!(registers.gpr[0] & 0xE00F, 1 << 15, "{engine}: DR6.BT");
        assert_eq!((registers.gpr[3], registers.gpr[1]), (CODE[1], 0), "{engine}");
    });
}

/// The MSRs that hold an address take any canonical one, in any mode, odd ones
/// too (Intel SDM 2B, "WRMSR").
#[test]
fn base_msrs_take_what_is_canonical() {
    on_both(|guest, engine| {
        // wrmsr ; rdmsr ; hlt
        let code = [0x0F, 0x30, 0x0F, 0x32, 0xF4];
        // #GP: pop edx ; hlt
        let gate = |at: u64| at & 0xFFFF | u64::from(CS) << 16 | 0x8E00 << 32 | at >> 16 << 48;
        for msr in
            [0xC000_0100u64, 0xC000_0101, 0xC000_0102, 0xC000_0082, 0xC000_0083, 0x175, 0x176]
        {
            for value in [1, 0x1234_5677, 0x1234_5678_9ABC, 0xFFFF_8000_0000_0001, 1 << 47, !0 >> 1]
            {
                prepare(guest, [&code, &[], &[0xF4]]);
                guest.write64(IDT + 13 * 8, gate(CODE[2]));
                let mut registers = guest.vcpu.registers().expect("state");
                registers.gpr[0] = value & 0xFFFF_FFFF;
                (registers.gpr[1], registers.gpr[2]) = (msr, value >> 32);
                guest.set_registers(&registers);
                assert_eq!(guest.run_raw(), Exit::Halt, "{engine}: {msr:#x} {value:#x}");
                let after = guest.vcpu.registers().expect("state");
                let canonical = (value as i64) << 16 >> 16 == value as i64;
                let end = if canonical { CODE[0] + 5 } else { CODE[2] + 1 };
                assert_eq!(after.rip, end, "{engine}: {msr:#x} {value:#x}");
                if canonical {
                    assert_eq!(after.gpr[2] << 32 | after.gpr[0], value, "{engine}: {msr:#x}");
                }
            }
        }
    });
}
