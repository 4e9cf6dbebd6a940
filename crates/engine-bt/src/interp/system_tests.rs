//! Privileged instructions, far transfers, segments, ports and system calls.

use tetrarch_engine::Exit;

use super::*;
use crate::cpu::cpuid::{CpuidTable, Vendor};
use crate::interp::exception::fixture::*;
use crate::interp::segment::{self as sg, load_segment};
use crate::state::fault::{Stop, vector};
use crate::state::flag;

fn push_all(cpu: &mut Cpu, size: u64, values: &[u64]) {
    for &value in values.iter().rev() {
        let sp = cpu.st.gpr[reg::RSP] - size;
        cpu.st.gpr[reg::RSP] = sp;
        let bytes = &value.to_le_bytes()[..size as usize];
        cpu.vm.memory.write(tetrarch_memory::GuestPhys(sp), bytes).unwrap();
    }
}

const IRETQ: &[u8] = &[0x48, 0xCF];
const IRETD: &[u8] = &[0xCF];

#[test]
fn iretq_to_user_mode_drops_kernel_segments() {
    let mut cpu = long_mode();
    cpu.st.nmi_blocked = 1;
    let flags = flag::IF | flag::TF | flag::FIXED;
    let (cs, ss) = (u64::from(USER_CS), u64::from(USER_DS));
    push_all(&mut cpu, 8, &[0x1234, cs, flags, USER_STACK, ss]);
    run(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RSP]), (0x1234, USER_STACK));
    assert_eq!((cpu.st.cpl, cpu.st.rflags(), cpu.st.nmi_blocked), (3, flags, 0));
    assert_eq!(cpu.st.seg[seg::DS].attributes & attr::UNUSABLE, attr::UNUSABLE);
    assert_eq!(cpu.st.seg[seg::SS].selector, USER_DS);
}

#[test]
fn iretq_keeps_its_level_with_a_null_stack_segment() {
    let mut cpu = long_mode();
    push_all(&mut cpu, 8, &[0x1234, u64::from(KERNEL_CS), flag::FIXED, 0x7000, 0]);
    run(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.st.gpr[reg::RSP], cpu.st.seg[seg::SS].selector), (0x7000, 0));
    let mut cpu = long_mode();
    push_all(&mut cpu, 8, &[0x1234, u64::from(USER_CS), flag::FIXED, 0x7000, 3]);
    assert_eq!(run(&mut cpu, IRETQ), gp(0));
    assert_eq!((cpu.st.cpl, cpu.st.rip), (0, CODE));
}

#[test]
fn iretq_goes_to_compatibility_mode() {
    let mut cpu = long_mode();
    let (cs, ss) = (u64::from(USER_CS32), u64::from(USER_DS));
    push_all(&mut cpu, 8, &[0x1234, cs, flag::FIXED, USER_STACK, ss]);
    run(&mut cpu, IRETQ).unwrap();
    assert_eq!(cpu.st.code_bits(), 32);
}

#[test]
fn iret_refuses_bad_frames() {
    let (cs, ss) = (u64::from(USER_CS), u64::from(USER_DS));
    for (frame, error) in [
        ([1 << 47, cs, 2, 0, ss], 0),
        ([0, 0, 2, 0, ss], 0),
        ([0, cs, 2, 0, u64::from(KERNEL_DS)], u32::from(KERNEL_DS)),
        ([0, u64::from(KERNEL_DS), 2, 0, ss], u32::from(KERNEL_DS)),
        ([0, 0xF000, 2, 0, ss], 0xF000),
    ] {
        let mut cpu = long_mode();
        push_all(&mut cpu, 8, &frame);
        assert_eq!(run(&mut cpu, IRETQ), gp(error), "{frame:x?}");
    }
    let mut cpu = long_mode();
    cpu.st.flags |= flag::NT;
    assert_eq!(run(&mut cpu, IRETQ), gp(0));
}

#[test]
fn iret_flags_depend_on_privilege() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    push_all(&mut cpu, 4, &[0x1234, u64::from(USER_CS), flag::IOPL | flag::CF | flag::FIXED]);
    run(&mut cpu, IRETD).unwrap();
    // IF stays on and IOPL at 0.
    assert_eq!(cpu.st.rflags(), flag::IF | flag::CF | flag::FIXED);
    assert_eq!(cpu.st.gpr[reg::RSP], USER_STACK);
}

#[test]
fn iret_enters_virtual_8086_mode() {
    let mut cpu = protected_mode();
    let flags = flag::VM | flag::IF | flag::FIXED;
    push_all(&mut cpu, 4, &[0x10, 0xF000, flags, 0x2000, 0x300, 1, 2, 3, 4]);
    run(&mut cpu, IRETD).unwrap();
    assert!(cpu.st.vm86());
    assert_eq!((cpu.st.cpl, cpu.st.rip, cpu.st.gpr[reg::RSP]), (3, 0x10, 0x2000));
    assert_eq!(cpu.st.seg[seg::CS].base, 0xF_0000);
    assert_eq!(cpu.st.seg[seg::GS].base, 0x40);
    assert_eq!(cpu.st.code_bits(), 16);
}

#[test]
fn real_mode_iret_and_far_call() {
    let mut cpu = real_mode();
    // CALL 1000:0020, then RETF.
    run(&mut cpu, &[0x9A, 0x20, 0x00, 0x00, 0x10]).unwrap();
    assert_eq!((cpu.st.seg[seg::CS].base, cpu.st.rip), (0x1_0000, 0x20));
    assert_eq!(peek(&cpu, 0x7000 - 4, 4), 0x7C05);
    run(&mut cpu, &[0xCB]).unwrap();
    assert_eq!((cpu.st.seg[seg::CS].base, cpu.st.rip), (0, 0x7C05));
    push_all(&mut cpu, 2, &[0x99, 0x2000, flag::IF | flag::IOPL]);
    run(&mut cpu, &[0xCF]).unwrap();
    assert_eq!((cpu.st.seg[seg::CS].base, cpu.st.rip), (0x2_0000, 0x99));
    assert_eq!(cpu.st.rflags(), flag::IF | flag::IOPL | flag::FIXED);
}

#[test]
fn far_return_to_user_mode_releases_both_stacks() {
    let mut cpu = protected_mode();
    let (cs, ss) = (u64::from(USER_CS), u64::from(USER_DS));
    push_all(&mut cpu, 4, &[0x1234, cs, 0xAAAA, 0xBBBB, 0x6000, ss]);
    // RETF 8.
    run(&mut cpu, &[0xCA, 0x08, 0x00]).unwrap();
    assert_eq!((cpu.st.cpl, cpu.st.rip, cpu.st.gpr[reg::RSP]), (3, 0x1234, 0x6008));
}

#[test]
fn far_jump_checks_the_code_segment() {
    let jump = |selector: u16| {
        let mut cpu = protected_mode();
        let s = selector.to_le_bytes();
        let result = run(&mut cpu, &[0xEA, 0x34, 0x12, 0, 0, s[0], s[1]]);
        result.map(|()| (cpu.st.seg[seg::CS].selector, cpu.st.rip))
    };
    assert_eq!(jump(KERNEL_CS), Ok((KERNEL_CS, 0x1234)));
    assert_eq!(jump(CONFORMING), Ok((CONFORMING, 0x1234)));
    assert_eq!(jump(0), gp(0));
    assert_eq!(jump(KERNEL_DS), gp(u32::from(KERNEL_DS)));
    assert_eq!(jump(USER_CS), gp(u32::from(USER_CS & !3)));
    assert_eq!(jump(TSS_SELECTOR), gp(u32::from(TSS_SELECTOR)));
}

#[test]
fn protected_mode_round_trip_keeps_unreal_limits() {
    let mut cpu = real_mode();
    poke(&cpu, GDT + 0x10, 0x00CF_9200_0000_FFFF);
    cpu.st.gdt = SegmentTable { base: GDT, limit: 0x1F };
    cpu.st.gpr[reg::RAX] = 1;
    // LMSW AX; load FS; MOV CR0 to clear PE; load FS again.
    run(&mut cpu, &[0x0F, 0x01, 0xF0]).unwrap();
    assert!(cpu.st.protected());
    load_segment(&mut cpu, seg::FS, 0x10).unwrap();
    cpu.st.gpr[reg::RAX] = cr::CR0_ET;
    run(&mut cpu, &[0x0F, 0x22, 0xC0]).unwrap();
    load_segment(&mut cpu, seg::FS, 0x1234).unwrap();
    let fs = cpu.st.seg[seg::FS];
    assert_eq!((fs.base, fs.limit), (0x1_2340, 0xFFFF_FFFF));
}

#[test]
fn segment_loads_are_checked() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    for (index, selector, expected) in [
        (seg::DS, USER_DS, Ok(())),
        (seg::DS, 0, Ok(())),
        (seg::SS, 3, gp(0)),
        (seg::SS, KERNEL_DS, gp(u32::from(KERNEL_DS))),
        (seg::DS, KERNEL_DS | 3, gp(u32::from(KERNEL_DS))),
        (seg::DS, TSS_SELECTOR | 3, gp(u32::from(TSS_SELECTOR))),
        (seg::DS, 0x1000 | 3, gp(0x1000)),
        (seg::DS, 0x0C, gp(0x0C)),
        (seg::ES, CONFORMING | 3, Ok(())),
    ] {
        assert_eq!(load_segment(&mut cpu, index, selector), expected, "{selector:x}");
    }
    let mut cpu = protected_mode();
    let not_present = u32::from(NOT_PRESENT);
    assert_eq!(load_segment(&mut cpu, seg::DS, NOT_PRESENT), sg::fail(vector::NP, not_present));
    assert_eq!(load_segment(&mut cpu, seg::SS, NOT_PRESENT), sg::fail(vector::SS, not_present));
    assert_eq!(load_segment(&mut cpu, seg::SS, READ_ONLY), gp(u32::from(READ_ONLY)));
    load_segment(&mut cpu, seg::DS, READ_ONLY).unwrap();
    assert_eq!(peek(&cpu, GDT + u64::from(READ_ONLY) + 5, 1), 0x91);
}

#[test]
fn mov_ss_opens_a_shadow() {
    let mut cpu = protected_mode();
    cpu.st.gpr[reg::RAX] = u64::from(KERNEL_DS);
    run(&mut cpu, &[0x8E, 0xD0]).unwrap();
    assert_eq!(cpu.st.shadow, 1);
}

#[test]
fn lsl_and_lar_read_descriptors() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    cpu.st.gpr[reg::RCX] = u64::from(USER_DS);
    run(&mut cpu, &[0x0F, 0x03, 0xC1]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0xFFFF_FFFF);
    assert_ne!(cpu.st.flags & flag::ZF, 0);
    run(&mut cpu, &[0x0F, 0x02, 0xC1]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0x00CF_F200);
    cpu.st.gpr[reg::RCX] = u64::from(TSS_SELECTOR | 3);
    run(&mut cpu, &[0x0F, 0x03, 0xC1]).unwrap();
    assert_eq!(cpu.st.flags & flag::ZF, 0, "the DPL hides it");
}

#[test]
fn ltr_and_lldt_take_16_byte_descriptors() {
    let mut cpu = long_mode();
    cpu.st.gpr[reg::RAX] = u64::from(TSS_SELECTOR);
    let ltr = [0x0F, 0x00, 0xD8];
    assert_eq!(run(&mut cpu, &ltr), gp(u32::from(TSS_SELECTOR)), "busy");
    poke(&cpu, GDT + u64::from(TSS_SELECTOR), 0x8900_0000_0067 | TSS << 16);
    poke(&cpu, GDT + u64::from(TSS_SELECTOR) + 8, 0xFFFF_8000);
    run(&mut cpu, &ltr).unwrap();
    assert_eq!(cpu.st.seg[seg::TR].base, 0xFFFF_8000_0000_0000 | TSS);
    assert_eq!(peek(&cpu, GDT + u64::from(TSS_SELECTOR) + 5, 1), 0x8B);
    cpu.st.gpr[reg::RAX] = u64::from(LDT_SELECTOR);
    run(&mut cpu, &[0x0F, 0x00, 0xD0]).unwrap();
    assert_eq!((cpu.st.seg[seg::LDT].base, cpu.st.seg[seg::LDT].limit), (0x4000, 0xFFF));
}

#[test]
fn long_mode_starts_with_paging() {
    let mut cpu = protected_mode();
    cpu.st.efer = cr::EFER_LME;
    cpu.st.gpr[reg::RAX] = cpu.st.cr0 | cr::CR0_PG;
    let mov_cr0 = [0x0F, 0x22, 0xC0];
    assert_eq!(run(&mut cpu, &mov_cr0), gp(0), "without PAE");
    cpu.st.cr4 = cr::CR4_PAE;
    run(&mut cpu, &mov_cr0).unwrap();
    assert!(cpu.st.long_mode() && !cpu.st.code64());
    cpu.st.gpr[reg::RAX] = cpu.st.cr0 & !cr::CR0_PG;
    run(&mut cpu, &mov_cr0).unwrap();
    assert!(!cpu.st.long_mode());
}

#[test]
fn control_registers_refuse_reserved_bits() {
    let mut cpu = long_mode();
    for (value, mov) in [
        (cr::CR0_PG, [0x0F, 0x22, 0xC0].as_slice()),
        (cpu.st.cr0 | cr::CR0_NW, &[0x0F, 0x22, 0xC0]),
        (cpu.st.cr0 | 1 << 32, &[0x0F, 0x22, 0xC0]),
        (cpu.st.cr0 & !cr::CR0_PG, &[0x0F, 0x22, 0xC0]),
        (1 << 63, &[0x0F, 0x22, 0xD8]),
        (cpu.st.cr4 & !cr::CR4_PAE, &[0x0F, 0x22, 0xE0]),
        (cpu.st.cr4 | 1 << 21, &[0x0F, 0x22, 0xE0]),
        (cpu.st.cr4 | 1 << 15, &[0x0F, 0x22, 0xE0]),
        (16, &[0x44, 0x0F, 0x22, 0xC0]),
    ] {
        cpu.st.gpr[reg::RAX] = value;
        assert_eq!(run(&mut cpu, mov), gp(0), "{value:#x} {mov:x?}");
    }
    cpu.st.gpr[reg::RAX] = 9;
    run(&mut cpu, &[0x44, 0x0F, 0x22, 0xC0]).unwrap();
    assert_eq!(cpu.vm.irqchip.cr8(0), 9);
}

#[test]
fn debug_registers() {
    let mut cpu = long_mode();
    cpu.st.gpr[reg::RAX] = 0xFFFF_FFFF;
    run(&mut cpu, &[0x0F, 0x23, 0xF0]).unwrap();
    assert_eq!(cpu.st.dr[6], 0xFFFF_EFFF);
    run(&mut cpu, &[0x0F, 0x23, 0xF8]).unwrap();
    assert_eq!(cpu.st.dr[7], 0xFFFF_27FF);
    let fault = Fault { vector: vector::DB, error: None, address: DR6_BD };
    assert_eq!(run(&mut cpu, &[0x0F, 0x21, 0xC0]), Err(Stop::Fault(fault)));
    cpu.st.dr[7] = DR7_ONES;
    // DR4 is DR6 until CR4.DE.
    run(&mut cpu, &[0x0F, 0x21, 0xE0]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0xFFFF_EFFF);
    cpu.st.cr4 |= cr::CR4_DE;
    assert_eq!(run(&mut cpu, &[0x0F, 0x21, 0xE0]), ud());
}

#[test]
fn user_mode_may_not() {
    let mut cpu = long_mode();
    to_user(&mut cpu);
    let refused: [&[u8]; 12] = [
        &[0xF4],
        &[0x0F, 0x06],
        &[0x0F, 0x30],
        &[0x0F, 0x32],
        &[0x0F, 0x09],
        &[0x0F, 0x20, 0xC0],
        &[0x0F, 0x21, 0xC0],
        &[0x0F, 0x01, 0xF8],
        &[0x0F, 0x01, 0x38],
        &[0x0F, 0x01, 0x10],
        &[0x0F, 0x00, 0xD8],
        &[0xE4, 0x60],
    ];
    for bytes in refused {
        assert_eq!(run(&mut cpu, bytes), gp(0), "{bytes:x?}");
    }
    cpu.st.cr4 |= cr::CR4_TSD;
    assert_eq!(run(&mut cpu, &[0x0F, 0x31]), gp(0));
    assert_eq!(run(&mut cpu, &[0xF3, 0x0F, 0xAE, 0xC0]), ud(), "RDFSBASE");
}

#[test]
fn descriptor_tables_are_loaded_and_stored() {
    let mut cpu = long_mode();
    cpu.st.gpr[reg::RAX] = 0x5000;
    poke(&cpu, 0x5000, 0x8678_0000_1234_0FFF);
    poke(&cpu, 0x5008, 0xFFFF);
    assert_eq!(run(&mut cpu, &[0x0F, 0x01, 0x18]), Ok(()));
    assert_eq!(cpu.st.idt.limit, 0xFFF);
    assert_eq!(cpu.st.idt.base, 0xFFFF_8678_0000_1234);
    run(&mut cpu, &[0x0F, 0x01, 0x08]).unwrap();
    assert_eq!(peek(&cpu, 0x5000, 8), cpu.st.idt.base << 16 | 0xFFF);
    poke(&cpu, 0x5008, 0x1FFF);
    assert_eq!(run(&mut cpu, &[0x0F, 0x01, 0x18]), gp(0));
}

#[test]
fn syscall_and_sysret() {
    let mut cpu = long_mode();
    cpu.st.star = 0x001B_0008 << 32;
    cpu.st.lstar = 0x5_0000;
    cpu.st.sfmask = flag::IF | flag::CF;
    to_user(&mut cpu);
    cpu.st.flags |= flag::CF | flag::ZF;
    let flags = cpu.st.rflags();
    run(&mut cpu, &[0x0F, 0x05]).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.cpl), (0x5_0000, 0));
    assert_eq!((cpu.st.gpr[reg::RCX], cpu.st.gpr[11]), (CODE + 2, flags));
    assert_eq!(cpu.st.rflags(), flag::ZF | flag::FIXED);
    assert_eq!((cpu.st.seg[seg::CS].selector, cpu.st.seg[seg::SS].selector), (0x08, 0x10));
    run(&mut cpu, &[0x48, 0x0F, 0x07]).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.cpl, cpu.st.rflags()), (CODE + 2, 3, flags));
    assert_eq!((cpu.st.seg[seg::CS].selector, cpu.st.seg[seg::SS].selector), (0x2B, 0x23));
    assert!(cpu.st.code64());
    assert_eq!(run(&mut cpu, &[0x48, 0x0F, 0x07]), gp(0), "SYSRET at CPL 3");
    cpu.st.efer &= !cr::EFER_SCE;
    assert_eq!(run(&mut cpu, &[0x0F, 0x05]), ud());
}

#[test]
fn sysenter_and_sysexit_in_protected_mode() {
    let mut cpu = protected_mode();
    to_user(&mut cpu);
    assert_eq!(run(&mut cpu, &[0x0F, 0x34]), gp(0), "no code segment set");
    cpu.st.sysenter_cs = u64::from(KERNEL_CS);
    cpu.st.sysenter_esp = 0x6000;
    cpu.st.sysenter_eip = 0x5_0000;
    run(&mut cpu, &[0x0F, 0x34]).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RSP], cpu.st.cpl), (0x5_0000, 0x6000, 0));
    assert_eq!(cpu.st.iflag, 0);
    cpu.st.gpr[reg::RDX] = 0x1111;
    cpu.st.gpr[reg::RCX] = 0x2222;
    run(&mut cpu, &[0x0F, 0x35]).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.gpr[reg::RSP], cpu.st.cpl), (0x1111, 0x2222, 3));
    assert_eq!(cpu.st.seg[seg::SS].selector, 0x23);
}

#[test]
fn ports_are_asked_for_and_replayed() {
    let mut cpu = real_mode();
    cpu.st.gpr[reg::RDX] = 0x3FD;
    let exit = Exit::PortIn { port: 0x3FD, size: 1 };
    assert_eq!(run(&mut cpu, &[0xEC]), Err(Stop::Exit(exit)));
    cpu.replay.answer(0x60);
    run(&mut cpu, &[0xEC]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0x60);
    let exit = Exit::PortOut { port: 0x80, size: 1, data: 0x60 };
    assert_eq!(run(&mut cpu, &[0xE6, 0x80]), Err(Stop::Exit(exit)));
    // Inside the engine: the mask of the PIC.
    cpu.st.gpr[reg::RAX] = 0x5A;
    run(&mut cpu, &[0xE6, 0x21]).unwrap();
    cpu.st.gpr[reg::RAX] = 0;
    run(&mut cpu, &[0xE4, 0x21]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], 0x5A);
}

#[test]
fn rep_insb_keeps_finished_items() {
    let mut cpu = protected_mode();
    cpu.st.gpr[reg::RDX] = 0x3F8;
    cpu.st.gpr[reg::RDI] = 0x5000;
    cpu.st.gpr[reg::RCX] = 2;
    let rep_insb = [0xF3, 0x6C];
    for (left, value) in [(2, 0x41), (1, 0x42)] {
        let exit = Exit::PortIn { port: 0x3F8, size: 1 };
        assert_eq!(run(&mut cpu, &rep_insb), Err(Stop::Exit(exit)));
        assert_eq!((cpu.st.gpr[reg::RCX], cpu.st.rip), (left, CODE));
        cpu.replay.answer(value);
        // One answered item a step, so that a kick can come between two.
        run(&mut cpu, &rep_insb).unwrap();
    }
    assert_eq!((cpu.st.gpr[reg::RCX], cpu.st.gpr[reg::RDI]), (0, 0x5002));
    assert_eq!((peek(&cpu, 0x5000, 2), cpu.st.rip), (0x4241, CODE + 2));
}

#[test]
fn the_bit_map_of_the_tss_grants_ports() {
    let mut cpu = protected_mode();
    cpu.st.seg[seg::TR].limit = 0x1068;
    poke(&cpu, TSS + 0x64, 0x68 << 16);
    let map = TSS + 0x68 + 0x3F8 / 8;
    to_user(&mut cpu);
    cpu.st.gpr[reg::RDX] = 0x3F8;
    poke(&cpu, map, 0x01);
    assert_eq!(run(&mut cpu, &[0xEC]), gp(0));
    poke(&cpu, map, 0);
    assert!(matches!(run(&mut cpu, &[0xEC]), Err(Stop::Exit(_))));
    // A word at the last port that the map allows.
    poke(&cpu, map, 1 << 8);
    cpu.st.gpr[reg::RDX] = 0x3FF;
    assert_eq!(run(&mut cpu, &[0x66, 0xED]), gp(0));
}

#[test]
fn xsetbv_takes_only_what_cpuid_offers() {
    let mut cpu = long_mode();
    assert_eq!(run(&mut cpu, &[0x0F, 0x01, 0xD0]), ud());
    if !cpu.vm.cpuid.xsave() {
        return;
    }
    cpu.st.cr4 |= cr::CR4_OSXSAVE;
    let xsetbv = [0x0F, 0x01, 0xD1];
    cpu.st.gpr[reg::RDX] = 0;
    for value in [0, 5, 8 | 3] {
        cpu.st.gpr[reg::RAX] = value;
        assert_eq!(run(&mut cpu, &xsetbv), gp(0), "{value}");
    }
    cpu.st.gpr[reg::RAX] = cpu.vm.cpuid.xcr0_mask();
    run(&mut cpu, &xsetbv).unwrap();
    cpu.st.gpr[reg::RAX] = 0;
    run(&mut cpu, &[0x0F, 0x01, 0xD0]).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX], cpu.vm.cpuid.xcr0_mask());
    let size = cpu.cpuid(0xD, 0)[1];
    assert_eq!(size, CpuidTable::xsave_size(cpu.st.xcr0));
}

#[test]
fn swapgs_and_bases() {
    let mut cpu = long_mode();
    cpu.st.seg[seg::GS].base = 1;
    cpu.st.kernel_gs_base = 2;
    run(&mut cpu, &[0x0F, 0x01, 0xF8]).unwrap();
    assert_eq!((cpu.st.seg[seg::GS].base, cpu.st.kernel_gs_base), (2, 1));
    cpu.st.cr4 |= cr::CR4_FSGSBASE;
    cpu.st.gpr[reg::RAX] = 1 << 47;
    assert_eq!(run(&mut cpu, &[0xF3, 0x48, 0x0F, 0xAE, 0xD0]), gp(0));
    cpu.st.gpr[reg::RAX] = 0x7777_0000_0000;
    run(&mut cpu, &[0xF3, 0x48, 0x0F, 0xAE, 0xD0]).unwrap();
    assert_eq!(cpu.st.seg[seg::FS].base, 0x7777_0000_0000);
}

#[test]
fn model_specific_registers() {
    let mut cpu = long_mode();
    let set = |cpu: &mut Cpu, number, value| msr::write(cpu, number, value);
    assert_eq!(set(&mut cpu, msr::index::LSTAR, 1 << 47), gp(0));
    assert_eq!(set(&mut cpu, msr::index::EFER, cr::EFER_SCE), gp(0), "LME under paging");
    let efer = cpu.st.efer;
    set(&mut cpu, msr::index::EFER, efer & !cr::EFER_LMA).unwrap();
    assert_eq!(cpu.st.efer, efer, "LMA is read-only");
    assert_eq!(set(&mut cpu, msr::index::EFER, efer | 1 << 12), gp(0));
    if cpu.vm.cpuid.vendor() == Vendor::Amd {
        set(&mut cpu, msr::index::EFER, efer | msr::EFER_AUTO_IBRS).unwrap();
        assert_ne!(msr::read(&mut cpu, msr::index::HWCR).unwrap() & 1 << 24, 0);
    }
    set(&mut cpu, msr::index::TSC, 0).unwrap();
    assert!(msr::read(&mut cpu, msr::index::TSC).unwrap() < 1 << 40);
    assert_eq!(set(&mut cpu, msr::index::PAT, 2), gp(0));
    assert_eq!(set(&mut cpu, msr::index::MTRR_VARIABLE, 1 << 60), gp(0));
    set(&mut cpu, msr::index::MTRR_VARIABLE + 1, 0xFF_C000_0800).unwrap();
    assert_eq!(msr::read(&mut cpu, 0x201), Ok(0xFF_C000_0800));
    assert_eq!(msr::read(&mut cpu, 0x1234_5678), gp(0));
    assert!(msr::read(&mut cpu, msr::index::APIC_BASE).unwrap() & 1 << 11 != 0);
}
