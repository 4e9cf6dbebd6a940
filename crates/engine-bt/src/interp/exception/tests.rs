use super::fixture::*;
use super::*;
use crate::state::cr;

fn page_fault(address: u64) -> Fault {
    Fault::page(address, 2)
}

#[test]
fn long_mode_frame_from_user_mode() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    deliver(&mut cpu, page_fault(0xDEAD)).unwrap();
    let rsp = cpu.st.gpr[reg::RSP];
    assert_eq!(rsp, KERNEL_STACK - 48);
    let frame: Vec<u64> = (0..6).map(|n| peek(&cpu, rsp + n * 8, 8)).collect();
    let flags = flag::FIXED | flag::IF | flag::RF;
    let expected = [2, CODE, u64::from(USER_CS), flags, USER_STACK, u64::from(USER_DS)];
    assert_eq!(frame, expected);
    assert_eq!(cpu.st.cr2, 0xDEAD);
    assert_eq!(cpu.st.rip, HANDLERS + 14 * 16);
    assert_eq!((cpu.st.cpl, cpu.st.iflag), (0, 0));
    assert_eq!((cpu.st.seg[seg::CS].selector, cpu.st.seg[seg::SS].selector), (KERNEL_CS, 0));
}

#[test]
fn long_mode_stack_is_aligned_and_kept_at_the_same_level() {
    let mut cpu = long_mode();
    cpu.st.gpr[reg::RSP] = KERNEL_STACK - 4;
    cpu.st.set_rflags(flag::IF | flag::TF | flag::NT);
    interrupt(&mut cpu, 0x40).unwrap();
    let rsp = cpu.st.gpr[reg::RSP];
    assert_eq!(rsp, KERNEL_STACK - 16 - 40);
    assert_eq!(peek(&cpu, rsp + 24, 8), KERNEL_STACK - 4);
    assert_eq!(cpu.st.seg[seg::SS].selector, KERNEL_DS);
    assert_eq!(cpu.st.rflags() & (flag::IF | flag::TF | flag::NT), 0);
    assert_eq!(peek(&cpu, rsp + 16, 8) & flag::RF, 0);
}

#[test]
fn ist_is_used_at_any_level() {
    let mut cpu = long_mode();
    set_gate(&cpu, vector::NMI, KERNEL_CS, 0x8E, 1, true);
    nmi(&mut cpu).unwrap();
    assert_eq!(cpu.st.gpr[reg::RSP], IST_STACK - 40);
    assert_eq!(cpu.st.nmi_blocked, 1);
}

#[test]
fn trap_gates_leave_interrupts_on() {
    let mut cpu = long_mode();
    cpu.st.iflag = 1;
    set_gate(&cpu, vector::DE, KERNEL_CS, 0x8F, 0, true);
    deliver(&mut cpu, Fault::new(vector::DE)).unwrap();
    assert_eq!(cpu.st.iflag, 1);
}

#[test]
fn contributory_faults_make_a_double_fault() {
    let mut cpu = long_mode();
    // #GP(0) whose gate is not present: #NP, contributory.
    set_gate(&cpu, vector::GP, KERNEL_CS, 0x0E, 0, true);
    deliver(&mut cpu, Fault::with_error(vector::GP, 0)).unwrap();
    assert_eq!(cpu.st.rip, HANDLERS + 8 * 16);
    assert_eq!(peek(&cpu, cpu.st.gpr[reg::RSP], 8), 0);
}

#[test]
fn benign_exceptions_give_way_with_ext() {
    let mut cpu = long_mode();
    set_gate(&cpu, vector::UD, KERNEL_CS, 0x0E, 0, true);
    deliver(&mut cpu, Fault::new(vector::UD)).unwrap();
    assert_eq!(cpu.st.rip, HANDLERS + 11 * 16);
    assert_eq!(peek(&cpu, cpu.st.gpr[reg::RSP], 8), 6 << 3 | 2 | 1);
}

#[test]
fn page_fault_on_the_way_of_a_page_fault() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    // RSP0 where nothing is mapped: #PF, #PF, and the double fault finds it too.
    poke(&cpu, TSS + 4, 0x40_0000_0000);
    set_gate(&cpu, vector::DF, KERNEL_CS, 0x8E, 1, true);
    deliver(&mut cpu, page_fault(0x1234)).unwrap();
    assert_eq!(cpu.st.rip, HANDLERS + 8 * 16);
    assert_eq!(cpu.st.gpr[reg::RSP], IST_STACK - 48);
    assert_eq!(cpu.st.cr2, 0x40_0000_0000 - 8, "the first push");
    assert_eq!(peek(&cpu, IST_STACK - 40, 8), CODE);
}

#[test]
fn triple_fault_shuts_down() {
    let mut cpu = long_mode();
    cpu.st.idt.limit = 0;
    assert_eq!(deliver(&mut cpu, Fault::new(vector::UD)), Err(Stop::Shutdown));
    let mut cpu = real_mode();
    cpu.st.idt.limit = 0;
    assert_eq!(deliver(&mut cpu, Fault::new(vector::UD)), Err(Stop::Shutdown));
}

#[test]
fn failed_delivery_leaves_the_state() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    poke(&cpu, TSS + 4, 0x40_0000_0000);
    let before = (cpu.st.rip, cpu.st.gpr, cpu.st.cpl, cpu.st.rflags(), cpu.st.seg);
    let stop = software_interrupt(&mut cpu, 3, CODE + 1, SoftwareInterrupt::Int3);
    assert_eq!(stop, Err(Fault::page(0x40_0000_0000 - 8, 2).into()));
    assert_eq!(before, (cpu.st.rip, cpu.st.gpr, cpu.st.cpl, cpu.st.rflags(), cpu.st.seg));
}

#[test]
fn software_interrupts_need_the_right_to_the_gate() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    let stop = software_interrupt(&mut cpu, 0x80, CODE + 2, SoftwareInterrupt::IntN);
    assert_eq!(stop, gp(0x80 << 3 | 2));
    software_interrupt(&mut cpu, 3, CODE + 1, SoftwareInterrupt::Int3).unwrap();
    assert_eq!(peek(&cpu, cpu.st.gpr[reg::RSP], 8), CODE + 1);
    let mut cpu = long_mode();
    to_user(&mut cpu);
    software_interrupt(&mut cpu, vector::DB, CODE + 1, SoftwareInterrupt::Int1).unwrap();
}

#[test]
fn protected_mode_changes_stacks() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    deliver(&mut cpu, Fault::with_error(vector::GP, 0x50)).unwrap();
    let esp = cpu.st.gpr[reg::RSP];
    assert_eq!(esp, KERNEL_STACK - 24);
    let frame: Vec<u64> = (0..6).map(|n| peek(&cpu, esp + n * 4, 4)).collect();
    let flags = flag::FIXED | flag::IF | flag::RF;
    let (cs, ss) = (u64::from(USER_CS), u64::from(USER_DS));
    assert_eq!(frame, [0x50, CODE, cs, flags, USER_STACK, ss]);
    assert_eq!(cpu.st.seg[seg::SS].selector, KERNEL_DS);
    assert_eq!(cpu.st.cpl, 0);
    assert_eq!(peek(&cpu, GDT + 8 + 5, 1) & 1, 1, "accessed bit of CS");
}

#[test]
fn protected_mode_refuses_bad_stacks_and_long_mode_task_gates() {
    let mut cpu = long_mode();
    set_gate(&cpu, 0x30, KERNEL_CS, 0x85, 0, true);
    let stop = software_interrupt(&mut cpu, 0x30, CODE, SoftwareInterrupt::IntN);
    assert_eq!(stop, gp(0x30 << 3 | 2));

    let mut cpu = protected_mode();
    to_user(&mut cpu);
    poke(&cpu, TSS + 4, KERNEL_STACK | u64::from(READ_ONLY) << 32);
    let stop = software_interrupt(&mut cpu, 3, CODE, SoftwareInterrupt::Int3);
    assert_eq!(stop, fail(vector::TS, u32::from(READ_ONLY)));
}

#[test]
fn vm86_saves_and_clears_data_segments() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    cpu.st.set_rflags(flag::FIXED | flag::VM | flag::IOPL);
    for (n, index) in [seg::ES, seg::DS, seg::FS, seg::GS].into_iter().enumerate() {
        cpu.st.seg[index] = crate::interp::segment::real_segment(&cpu, index, 0x100 + n as u16);
    }
    interrupt(&mut cpu, 0x20).unwrap();
    let esp = cpu.st.gpr[reg::RSP];
    assert_eq!(esp, KERNEL_STACK - 36);
    assert_eq!(peek(&cpu, esp + 8, 4) & flag::VM, flag::VM);
    let selectors: Vec<u64> = (5..9).map(|n| peek(&cpu, esp + n * 4, 4)).collect();
    assert_eq!(selectors, [0x100, 0x101, 0x102, 0x103]);
    assert!(!cpu.st.vm86());
    assert_eq!(cpu.st.seg[seg::DS].attributes & attr::UNUSABLE, attr::UNUSABLE);
}

#[test]
fn vm86_software_interrupts_depend_on_iopl() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    cpu.st.set_rflags(flag::FIXED | flag::VM);
    let stop = software_interrupt(&mut cpu, 0x10, CODE, SoftwareInterrupt::IntN);
    assert_eq!(stop, gp(0));
}

#[test]
fn real_mode_goes_through_the_vector_table() {
    let mut cpu = real_mode();
    poke(&cpu, 0x10 * 4, 0xF000_1234);
    cpu.st.iflag = 1;
    software_interrupt(&mut cpu, 0x10, 0x7C02, SoftwareInterrupt::IntN).unwrap();
    assert_eq!((cpu.st.seg[seg::CS].base, cpu.st.rip), (0xF_0000, 0x1234));
    assert_eq!(cpu.st.gpr[reg::RSP], 0x7000 - 6);
    assert_eq!(peek(&cpu, 0x7000 - 6, 4), 0x7C02);
    assert_eq!(peek(&cpu, 0x7000 - 2, 2), flag::FIXED | flag::IF);
    assert_eq!(cpu.st.iflag, 0);
}

#[test]
fn debug_exceptions_set_dr6_and_clear_gd() {
    let mut cpu = long_mode();
    cpu.st.dr[7] |= 1 << 13;
    deliver(&mut cpu, Fault { vector: vector::DB, error: None, address: 1 << 14 }).unwrap();
    assert_eq!(cpu.st.dr[6] & DR6_CAUSES, 1 << 14);
    assert_eq!(cpu.st.dr[7] & DR7_GD, 0);
    assert_eq!(peek(&cpu, cpu.st.gpr[reg::RSP] + 16, 8) & flag::RF, 0);
}

#[test]
fn interrupts_end_halt_and_the_shadow() {
    let mut cpu = long_mode();
    cpu.st.halted = 1;
    cpu.st.shadow = 1;
    interrupt(&mut cpu, 0x30).unwrap();
    assert_eq!((cpu.st.halted, cpu.st.shadow), (0, 0));
}

#[test]
fn short_tss_is_ts() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    cpu.st.seg[seg::TR].limit = 3;
    let stop = software_interrupt(&mut cpu, 3, CODE, SoftwareInterrupt::Int3);
    assert_eq!(stop, fail(vector::TS, u32::from(TSS_SELECTOR)));
    assert_ne!(cpu.st.cr0 & cr::CR0_PE, 0);
}

#[test]
fn sixteen_bit_gates_push_words() {
    for (kind, iflag) in [(0x86, 0), (0x87, 1)] {
        let mut cpu = protected_mode();
        cpu.st.iflag = 1;
        set_gate(&cpu, vector::GP, KERNEL_CS, kind, 0, false);
        deliver(&mut cpu, Fault::with_error(vector::GP, 0x12)).unwrap();
        let esp = cpu.st.gpr[reg::RSP];
        assert_eq!(esp, KERNEL_STACK - 8);
        let frame: Vec<u64> = (0..4).map(|n| peek(&cpu, esp + n * 2, 2)).collect();
        let flags = flag::FIXED | flag::IF;
        assert_eq!(frame, [0x12, CODE & 0xFFFF, u64::from(KERNEL_CS), flags]);
        assert_eq!((cpu.st.rip, cpu.st.iflag), ((HANDLERS + 13 * 16) & 0xFFFF, iflag));
    }
}

#[test]
fn conforming_handlers_keep_the_level() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    set_gate(&cpu, vector::DE, CONFORMING, 0x8E, 0, false);
    deliver(&mut cpu, Fault::new(vector::DE)).unwrap();
    assert_eq!((cpu.st.cpl, cpu.st.gpr[reg::RSP]), (3, USER_STACK - 12));
    assert_eq!(cpu.st.seg[seg::CS].selector, CONFORMING | 3);
}

/// What a second fault on the way of a first one comes to (SDM 3A, table 6-5).
#[test]
fn pairs_of_exceptions() {
    use vector::{AC, BR, DB, DE, GP, MF, NM, NP, OF, PF, SS, TS, UD, XM};
    let contributory = [DE, TS, NP, SS, GP];
    let benign = [DB, OF, BR, UD, NM, MF, AC, XM];
    // The second is always #NP: the gate of the first is not present.
    for first in contributory.into_iter().chain(benign).chain([PF]) {
        let mut cpu = long_mode();
        set_gate(&cpu, first, KERNEL_CS, 0x0E, 0, true);
        if first == NP {
            set_gate(&cpu, NP, USER_CS, 0x8E, 0, true); // #GP: an outer level
        }
        let fault = match first {
            PF => page_fault(0x5000),
            TS | NP | SS | GP | AC => Fault::with_error(first, 0),
            _ => Fault::new(first),
        };
        deliver(&mut cpu, fault).unwrap();
        let handled = if benign.contains(&first) { NP } else { vector::DF };
        assert_eq!(cpu.st.rip, HANDLERS + u64::from(handled) * 16, "{first}");
        assert_eq!(cpu.st.gpr[reg::RSP] & 15, 0);
    }
}

#[test]
fn the_next_debug_exception_clears_the_breakpoints_of_the_last() {
    let mut cpu = long_mode();
    cpu.st.dr[6] = 0xFFFF_0FF3 | 1 << 13;
    deliver(&mut cpu, Fault::debug(1 << 2 | 1 << 14)).unwrap();
    assert_eq!(cpu.st.dr[6] & DR6_CAUSES, 1 << 2 | 1 << 14 | 1 << 13);
}
