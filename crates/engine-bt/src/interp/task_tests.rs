//! Task switches: what is saved and loaded, and the fault of each check.

use super::*;
use crate::interp::exception::SoftwareInterrupt;
use crate::interp::exception::fixture::*;
use crate::interp::exception::{deliver, interrupt, software_interrupt};
use crate::state::fault::Fault;
use crate::state::reg;

/// A second 32-bit task and a 16-bit one.
const TASK: u16 = 0x68;
const TASK16: u16 = 0x70;
const TASK_AT: u64 = 0x3200;
const TASK16_AT: u64 = 0x3400;
const GATE: u16 = 0x78;
const LDT_AT: u64 = 0x4000;
const ENTRY: u64 = 0x1_2345;
const STACK: u64 = 0xB000;

fn descriptor(base: u64, limit: u64, access: u64) -> u64 {
    limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | access << 40 | (base >> 24) << 56
}

fn set32(cpu: &Cpu, address: u64, value: u32) {
    cpu.vm.memory.write(tetrarch_memory::GuestPhys(address), &value.to_le_bytes()).unwrap();
}

fn set16(cpu: &Cpu, address: u64, value: u16) {
    cpu.vm.memory.write(tetrarch_memory::GuestPhys(address), &value.to_le_bytes()).unwrap();
}

/// Offset of the selector of a segment register in a 32-bit TSS.
fn selector_at(index: usize) -> u64 {
    0x48 + 4 * index as u64
}

fn two_tasks() -> Cpu {
    let cpu = protected_mode();
    poke(&cpu, GDT + u64::from(TASK), descriptor(TASK_AT, 0x67, 0x89));
    poke(&cpu, GDT + u64::from(TASK16), descriptor(TASK16_AT, 0x2B, 0x81));
    poke(&cpu, GDT + u64::from(GATE), u64::from(TASK) << 16 | 0x8500 << 32);
    set32(&cpu, TASK_AT + 0x20, ENTRY as u32);
    set32(&cpu, TASK_AT + 0x24, 0x202);
    set16(&cpu, TASK16_AT + 0x0E, 0x2345);
    set16(&cpu, TASK16_AT + 0x10, 0x202);
    for n in 0..8 {
        set32(&cpu, TASK_AT + 0x28 + 4 * n, 0xABC0_0000 + n as u32);
        set16(&cpu, TASK16_AT + 0x12 + 2 * n, 0xAB00 + n as u16);
    }
    set32(&cpu, TASK_AT + 0x38, STACK as u32);
    set16(&cpu, TASK16_AT + 0x1A, STACK as u16);
    for index in SEGMENTS {
        let selector = if index == seg::CS { KERNEL_CS } else { KERNEL_DS };
        set16(&cpu, TASK_AT + selector_at(index), selector);
        if index < 4 {
            set16(&cpu, TASK16_AT + 0x22 + 2 * index as u64, selector);
        }
    }
    cpu
}

fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, low, high]
}

fn call(selector: u16) -> [u8; 7] {
    far(0x9A, selector)
}

fn jmp(selector: u16) -> [u8; 7] {
    far(0xEA, selector)
}

const IRETD: &[u8] = &[0xCF];

fn busy(cpu: &Cpu, selector: u16) -> bool {
    peek(cpu, GDT + u64::from(selector) + 5, 1) & 2 != 0
}

fn fault<T>(vector: u8, error: u16) -> R<T> {
    fail(vector, u32::from(error))
}

#[test]
fn call_nests_and_iret_returns() {
    let mut cpu = two_tasks();
    cpu.st.dr[7] = 0x7FF;
    cpu.st.gpr[reg::RBX] = 0x1234_5678;
    run(&mut cpu, &call(TASK)).unwrap();
    assert_eq!(cpu.st.rip, ENTRY);
    assert_eq!(cpu.st.rflags(), 0x202 | flag::NT);
    assert_eq!((cpu.st.gpr[reg::RAX], cpu.st.gpr[reg::RDI]), (0xABC0_0000, 0xABC0_0007));
    assert_eq!(cpu.st.gpr[reg::RSP], STACK);
    assert_eq!(cpu.st.seg[seg::TR].selector, TASK);
    assert_eq!(cpu.st.seg[seg::TR].base, TASK_AT);
    assert_ne!(cpu.st.cr0 & cr::CR0_TS, 0);
    assert_eq!(cpu.st.dr[7], 0x7AA, "local breakpoints are of the task");
    assert!(busy(&cpu, TASK) && busy(&cpu, TSS_SELECTOR));
    assert_eq!(peek(&cpu, TASK_AT, 2), u64::from(TSS_SELECTOR));
    assert_eq!(peek(&cpu, TSS + 0x20, 4), CODE + 7);
    assert_eq!(peek(&cpu, TSS + 0x34, 4), 0x1234_5678);
    assert_eq!(peek(&cpu, TSS + 0x38, 4), KERNEL_STACK);
    assert_eq!(peek(&cpu, TSS + selector_at(seg::CS), 2), u64::from(KERNEL_CS));

    cpu.st.nmi_blocked = 1;
    cpu.st.gpr[reg::RAX] = 77;
    run(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.rflags() & flag::NT), (CODE + 7, 0));
    assert_eq!((cpu.st.gpr[reg::RBX], cpu.st.gpr[reg::RSP]), (0x1234_5678, KERNEL_STACK));
    assert_eq!(cpu.st.seg[seg::TR].selector, TSS_SELECTOR);
    assert_eq!(cpu.st.nmi_blocked, 0);
    assert!(!busy(&cpu, TASK) && busy(&cpu, TSS_SELECTOR));
    // The task goes on behind its IRET when it is called again, NT clear.
    assert_eq!(peek(&cpu, TASK_AT + 0x20, 4), ENTRY + 1);
    assert_eq!(peek(&cpu, TASK_AT + 0x24, 4), 0x202);
    assert_eq!(peek(&cpu, TASK_AT + 0x28, 4), 77);
}

#[test]
fn jmp_ends_the_old_task() {
    for selector in [TASK, GATE] {
        let mut cpu = two_tasks();
        run(&mut cpu, &jmp(selector)).unwrap();
        assert_eq!((cpu.st.rip, cpu.st.rflags()), (ENTRY, 0x202));
        assert!(busy(&cpu, TASK) && !busy(&cpu, TSS_SELECTOR));
        assert_eq!(peek(&cpu, TASK_AT, 2), 0, "no link");
        run(&mut cpu, &jmp(TSS_SELECTOR)).unwrap();
        assert_eq!(cpu.st.rip, CODE + 7);
    }
}

#[test]
fn sixteen_bit_tasks_hold_sixteen_bits() {
    let mut cpu = two_tasks();
    cpu.st.seg[seg::FS] = cpu.st.seg[seg::DS];
    run(&mut cpu, &call(TASK16)).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RCX] & 0xFFFF), (0x2345, 0xAB01));
    assert_eq!(cpu.st.rflags(), 0x202 | flag::NT);
    assert_eq!(cpu.st.seg[seg::FS].selector, 0);
    assert_eq!(peek(&cpu, TASK16_AT, 2), u64::from(TSS_SELECTOR));
    run(&mut cpu, IRETD).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.seg[seg::FS].selector), (CODE + 7, KERNEL_DS));
    assert_eq!(peek(&cpu, TASK16_AT + 0x0E, 2), 0x2346);
    assert_eq!(peek(&cpu, TASK16_AT + 0x2A, 2), 0, "the LDT is not saved");
}

/// Each check before the switch, which leaves everything as it was.
#[test]
fn refused_switches_change_nothing() {
    use vector::{GP, NP, TS};
    type Break = fn(&mut Cpu);
    let slot = |selector: u16| GDT + u64::from(selector);
    let _ = slot;
    let cases: [(&str, Break, u16, u8, u16); 10] = [
        ("busy", |c| poke(c, GDT + 0x68, descriptor(TASK_AT, 0x67, 0x8B)), TASK, GP, TASK),
        ("absent", |c| poke(c, GDT + 0x68, descriptor(TASK_AT, 0x67, 0x09)), TASK, NP, TASK),
        ("short", |c| poke(c, GDT + 0x68, descriptor(TASK_AT, 0x66, 0x89)), TASK, TS, TASK),
        ("short 16", |c| poke(c, GDT + 0x70, descriptor(TASK_AT, 0x2A, 0x81)), TASK16, TS, TASK16),
        (
            "in an LDT",
            |c| {
                c.st.seg[seg::LDT] = Descriptor(descriptor(GDT, 0xFF, 0x82)).segment(LDT_SELECTOR);
            },
            TASK | 4,
            GP,
            TASK | 4,
        ),
        ("RPL over DPL", |_| {}, TASK | 1, GP, TASK),
        ("behind the table", |_| {}, 0x100, GP, 0x100),
        ("absent gate", |c| poke(c, GDT + 0x78, 0x0500 << 32 | 0x68 << 16), GATE, NP, GATE),
        ("gate to no TSS", |c| poke(c, GDT + 0x78, 0x8500 << 32 | 0x08 << 16), GATE, GP, 8),
        ("old TSS too short", |c| c.st.seg[seg::TR].limit = 0x5E, TASK, TS, TSS_SELECTOR),
    ];
    for (name, spoil, selector, vector, error) in cases {
        for code in [call(selector), jmp(selector)] {
            let mut cpu = two_tasks();
            spoil(&mut cpu);
            let before = (cpu.st.rip, cpu.st.gpr, cpu.st.seg, cpu.st.rflags(), cpu.st.cr0);
            let tables: Vec<u64> = (0..32).map(|n| peek(&cpu, GDT + n * 8, 8)).collect();
            assert_eq!(run(&mut cpu, &code), fault(vector, error), "{name}");
            assert_eq!(before, (cpu.st.rip, cpu.st.gpr, cpu.st.seg, cpu.st.rflags(), cpu.st.cr0));
            let now: Vec<u64> = (0..32).map(|n| peek(&cpu, GDT + n * 8, 8)).collect();
            assert_eq!(tables, now, "{name}");
        }
    }
}

/// Each check of what the TSS holds: the fault of the new task.
#[test]
fn bad_contents_are_faults_of_the_new_task() {
    use vector::{GP, NP, SS, TS};
    let set = |c: &Cpu, index: usize, s: u16| set16(c, TASK_AT + selector_at(index), s);
    let not_present_code = |c: &Cpu| poke(c, GDT + 0x80, 0x00CF_1A00_0000_FFFF);
    type Break<'a> = &'a dyn Fn(&Cpu);
    let cases: [(&str, Break, u8, u16); 16] = [
        ("CS null", &|c| set(c, seg::CS, 0), TS, 0),
        ("CS of data", &|c| set(c, seg::CS, KERNEL_DS), TS, KERNEL_DS),
        ("CS of another level", &|c| set(c, seg::CS, KERNEL_CS | 3), TS, KERNEL_CS),
        (
            "CS conforming, DPL over RPL",
            &|c| {
                poke(c, GDT + 0x60, 0x00CF_FE00_0000_FFFF);
                set(c, seg::CS, CONFORMING);
            },
            TS,
            CONFORMING,
        ),
        (
            "CS absent",
            &|c| {
                not_present_code(c);
                set(c, seg::CS, 0x80);
            },
            NP,
            0x80,
        ),
        ("CS behind the table", &|c| set(c, seg::CS, 0x100), TS, 0x100),
        ("SS null", &|c| set(c, seg::SS, 0), TS, 0),
        ("SS read-only", &|c| set(c, seg::SS, READ_ONLY), TS, READ_ONLY),
        ("SS of another level", &|c| set(c, seg::SS, USER_DS), TS, USER_DS & !3),
        ("SS absent", &|c| set(c, seg::SS, NOT_PRESENT), SS, NOT_PRESENT),
        ("DS absent", &|c| set(c, seg::DS, NOT_PRESENT), NP, NOT_PRESENT),
        ("ES of a TSS", &|c| set(c, seg::ES, TSS_SELECTOR), TS, TSS_SELECTOR),
        ("FS with too high an RPL", &|c| set(c, seg::FS, KERNEL_DS | 1), TS, KERNEL_DS),
        ("LDT of data", &|c| set16(c, TASK_AT + 0x60, KERNEL_DS), TS, KERNEL_DS),
        (
            "LDT absent",
            &|c| {
                poke(c, GDT + 0x40, descriptor(LDT_AT, 0xFF, 0x02));
                set16(c, TASK_AT + 0x60, LDT_SELECTOR);
            },
            TS,
            LDT_SELECTOR,
        ),
        ("EIP over the limit", &|c| poke(c, GDT + 0x08, 0x0040_9A00_0000_FFFF), GP, 0),
    ];
    for (name, spoil, vector, error) in cases {
        let mut cpu = two_tasks();
        spoil(&cpu);
        assert_eq!(run(&mut cpu, &call(TASK)), fault(vector, error), "{name}");
        assert_eq!((cpu.st.rip, cpu.st.seg[seg::TR].selector), (ENTRY, TASK), "{name}");
        assert!(busy(&cpu, TASK) && busy(&cpu, TSS_SELECTOR), "{name}");
        assert_eq!(peek(&cpu, TSS + 0x20, 4), CODE + 7, "{name}: the old task is saved");
    }
}

#[test]
fn iret_checks_its_link() {
    use vector::{NP, TS};
    for (link, access, vector, error) in [
        (TASK, 0x89, TS, TASK), // not busy
        (TASK, 0x0B, NP, TASK), // absent
        (TASK | 4, 0x8B, TS, TASK | 4),
        (KERNEL_DS, 0x8B, TS, KERNEL_DS),
        (0, 0x8B, TS, 0),
    ] {
        let mut cpu = two_tasks();
        poke(&cpu, GDT + u64::from(TASK), descriptor(TASK_AT, 0x67, access));
        set16(&cpu, TSS, link);
        cpu.st.flags |= flag::NT;
        assert_eq!(run(&mut cpu, IRETD), fault(vector, error), "{link:#x} {access:#x}");
        assert_eq!(cpu.st.rip, CODE);
    }
    let mut cpu = long_mode();
    cpu.st.flags |= flag::NT;
    assert_eq!(run(&mut cpu, &[0x48, 0xCF]), gp(0));
}

fn task_gate(cpu: &Cpu, vector: u8, selector: u16, dpl: u64) {
    let gate = u64::from(selector) << 16 | (0x85 | dpl << 5) << 40;
    poke(cpu, IDT + u64::from(vector) * 8, gate);
}

#[test]
fn exceptions_through_task_gates_push_their_error_code() {
    for (task, width) in [(TASK, 4), (TASK16, 2)] {
        let mut cpu = two_tasks();
        to_user(&mut cpu);
        task_gate(&cpu, vector::GP, task, 0);
        deliver(&mut cpu, Fault::with_error(vector::GP, 0x1234)).unwrap();
        assert_eq!((cpu.st.cpl, cpu.st.seg[seg::TR].selector), (0, task));
        assert_eq!(cpu.st.gpr[reg::RSP] & 0xFFFF, STACK - width as u64);
        assert_eq!(peek(&cpu, STACK - width as u64, width), 0x1234);
        assert_eq!(peek(&cpu, TSS + 0x20, 4), CODE, "a fault is restarted");
        assert_ne!(peek(&cpu, TSS + 0x24, 4) & flag::RF, 0);
        run(&mut cpu, IRETD).unwrap();
        assert_eq!((cpu.st.cpl, cpu.st.rip), (3, CODE));
    }
}

#[test]
fn interrupts_through_task_gates() {
    let mut cpu = two_tasks();
    task_gate(&cpu, 0x30, TASK, 0);
    interrupt(&mut cpu, 0x30).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RSP]), (ENTRY, STACK));

    // INT n needs the right to the gate; EXT is clear in its errors.
    let mut cpu = two_tasks();
    to_user(&mut cpu);
    task_gate(&cpu, 0x30, TASK, 0);
    let int = |cpu: &mut Cpu| software_interrupt(cpu, 0x30, CODE + 2, SoftwareInterrupt::IntN);
    assert_eq!(int(&mut cpu), gp(0x30 << 3 | 2));
    task_gate(&cpu, 0x30, KERNEL_DS, 3);
    assert_eq!(int(&mut cpu), gp(u32::from(KERNEL_DS)));
    task_gate(&cpu, 0x30, TASK, 3);
    int(&mut cpu).unwrap();
    assert_eq!(peek(&cpu, TSS + 0x20, 4), CODE + 2);
}

#[test]
fn a_double_fault_with_a_bad_stack_is_saved_by_a_task_gate() {
    let mut cpu = two_tasks();
    // No room for any frame: #SS, #SS, then the double fault's own stack.
    cpu.st.seg[seg::SS].limit = 3;
    task_gate(&cpu, vector::DF, TASK, 0);
    deliver(&mut cpu, Fault::with_error(vector::GP, 0)).unwrap();
    assert_eq!((cpu.st.rip, peek(&cpu, STACK - 4, 4)), (ENTRY, 0));
}

#[test]
fn the_trap_bit_makes_a_debug_exception_before_the_first_instruction() {
    let mut cpu = two_tasks();
    set16(&cpu, TASK_AT + 0x64, 1);
    run(&mut cpu, &call(TASK)).unwrap();
    assert_eq!(cpu.st.pending_debug, DR6_BT);
    assert_eq!(cpu.st.rip, ENTRY);
}

#[test]
fn tasks_bring_their_local_descriptors() {
    let mut cpu = two_tasks();
    poke(&cpu, GDT + 0x40, descriptor(LDT_AT, 0xFF, 0x82));
    poke(&cpu, LDT_AT + 8, descriptor(0x5000, 0xFFF, 0x93));
    set16(&cpu, TASK_AT + 0x60, LDT_SELECTOR);
    set16(&cpu, TASK_AT + selector_at(seg::DS), 8 | 4);
    run(&mut cpu, &call(TASK)).unwrap();
    assert_eq!((cpu.st.seg[seg::LDT].base, cpu.st.seg[seg::DS].base), (LDT_AT, 0x5000));
    run(&mut cpu, IRETD).unwrap();
    assert_eq!(cpu.st.seg[seg::LDT].attributes & attr::UNUSABLE, attr::UNUSABLE);
}

/// Page directories that map the first 4 MiB to itself, and of which the second
/// has none of it where the first has its code.
#[test]
fn tasks_bring_their_address_space() {
    let mut cpu = two_tasks();
    let (first, second) = (0x1_0000, 0x1_1000);
    for directory in [first, second] {
        set32(&cpu, directory, 0x83);
    }
    // 4 MiB and up: RAM from 0 again, in the second space only.
    set32(&cpu, second + 4, 0x83);
    cpu.st.cr3 = first;
    cpu.st.cr4 = cr::CR4_PSE;
    cpu.st.cr0 |= cr::CR0_PG;
    set32(&cpu, TASK_AT + 0x1C, second as u32);
    set32(&cpu, TSS + 0x1C, first as u32);
    set32(&cpu, TASK_AT + 0x38, (STACK + 0x40_0000) as u32);
    task_gate(&cpu, vector::GP, TASK, 0);
    deliver(&mut cpu, Fault::with_error(vector::GP, 0x55)).unwrap();
    assert_eq!((cpu.st.cr3, peek(&cpu, STACK - 4, 4)), (second, 0x55));
    run(&mut cpu, IRETD).unwrap();
    assert_eq!(cpu.st.cr3, first);

    // A stack that only the old space has is a page fault of the new task.
    set32(&cpu, second + 4, 0);
    set32(&cpu, TASK_AT + 0x38, (STACK + 0x40_0000) as u32);
    let stop = super::switch(&mut cpu, TASK, Reason::Nest, From { rip: CODE, flags: 2 }, Some(0));
    assert_eq!(stop, Err(Fault::page(STACK + 0x40_0000 - 4, 2).into()));
    assert_eq!((cpu.st.cr3, cpu.st.seg[seg::TR].selector), (second, TASK));
}

#[test]
fn a_task_can_run_in_virtual_8086_mode() {
    let mut cpu = two_tasks();
    set32(&cpu, TASK_AT + 0x20, 0x100);
    set32(&cpu, TASK_AT + 0x24, (flag::VM | 0x202) as u32);
    set16(&cpu, TASK_AT + selector_at(seg::CS), 0x1234);
    set16(&cpu, TASK_AT + selector_at(seg::DS), 0x2000);
    run(&mut cpu, &jmp(TASK)).unwrap();
    assert!(cpu.st.vm86());
    assert_eq!((cpu.st.cpl, cpu.st.rip), (3, 0x100));
    assert_eq!((cpu.st.seg[seg::CS].base, cpu.st.seg[seg::DS].base), (0x1_2340, 0x2_0000));
    assert_eq!(cpu.st.seg[seg::DS].attributes, 0xF3);
}

#[test]
fn descriptor_tables_in_device_memory_are_asked_for_before_anything_changes() {
    let mut cpu = two_tasks();
    // The new task's LDT is where no RAM is.
    poke(&cpu, GDT + 0x40, descriptor(0x8000_0000, 0xFF, 0x82));
    set16(&cpu, TASK_AT + 0x60, LDT_SELECTOR);
    set16(&cpu, TASK_AT + selector_at(seg::DS), 8 | 4);
    let before = (cpu.st.rip, cpu.st.gpr, cpu.st.seg);
    let stop = run(&mut cpu, &call(TASK));
    assert!(matches!(stop, Err(Stop::Exit(_))), "{stop:?}");
    assert_eq!(before, (cpu.st.rip, cpu.st.gpr, cpu.st.seg));
    assert!(!busy(&cpu, TASK));
    cpu.replay.answer(descriptor(0x5000, 0xFFF, 0x93));
    run(&mut cpu, &call(TASK)).unwrap();
    assert_eq!(cpu.st.seg[seg::DS].base, 0x5000);
}

/// Tables of any content: each switch ends as one of the ways that the contract
/// has, with a state that the rest of the engine can stand.
#[test]
fn random_tables_are_no_danger() {
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut cpu = two_tasks();
    let start = (cpu.st.seg, cpu.st.gdt, cpu.st.idt, cpu.st.cr0, cpu.st.gpr);
    let mut tables = vec![0; 0x3000];
    let first = tetrarch_memory::GuestPhys(GDT);
    cpu.vm.memory.read(first, &mut tables).unwrap();
    let mut switched = 0;
    for _ in 0..20_000 {
        cpu.vm.memory.write(first, &tables).unwrap();
        (cpu.st.seg, cpu.st.gdt, cpu.st.idt, cpu.st.cr0, cpu.st.gpr) = start;
        (cpu.st.cpl, cpu.st.rip) = (0, CODE);
        cpu.st.set_rflags(flag::FIXED | if random() & 3 == 0 { flag::NT } else { 0 });
        // Some words of the tables are spoilt.
        for n in 0..3 {
            let kind = [0x89, 0x8B, 0x81, 0x83][(random() & 3) as usize];
            let (at, limit) = (TASK_AT + 0x100 * n, 0x67 - (random() & 1));
            poke(&cpu, GDT + u64::from(TASK) + 8 * n, descriptor(at, limit, kind));
        }
        for _ in 0..random() & 7 {
            let (table, size) =
                [(GDT, 0x100), (TASK_AT, 0x70), (TASK16_AT, 0x30), (TSS, 0x70), (IDT, 0x800)]
                    [(random() % 5) as usize];
            poke(&cpu, table + ((random() % size) & !7), random());
        }
        let selector = (TASK + 8 * (random() & 3) as u16) | (random() & 7 & random()) as u16;
        cpu.replay.clear();
        let result = match random() & 3 {
            0 => run(&mut cpu, &call(selector)),
            1 => run(&mut cpu, &jmp(selector)),
            2 => run(&mut cpu, IRETD),
            _ => {
                task_gate(&cpu, vector::GP, selector, 0);
                deliver(&mut cpu, Fault::with_error(vector::GP, 0))
            }
        };
        switched += u32::from(result.is_ok());
        assert!(cpu.st.cpl <= 3);
        assert!(cpu.st.rip <= 0xFFFF_FFFF && cpu.st.gpr[reg::RSP] <= 0xFFFF_FFFF);
    }
    assert!(switched > 1000, "only {switched} switches came through");
}
