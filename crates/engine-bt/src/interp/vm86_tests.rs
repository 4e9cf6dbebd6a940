//! Virtual-8086 mode (Intel SDM 3B, chapter 20) without CR4.VME: what its code may
//! do, and what goes to the monitor.

use super::step;
use crate::cpu::Cpu;
use crate::interp::exception::fixture::*;
use crate::interp::segment::real_segment;
use crate::state::fault::{Fault, Stop, vector};
use crate::state::{cr, flag, reg, seg};

const SEGMENT: u16 = 0x3000;
const SP: u64 = 0x800;

/// At 3000:0000 with a stack in the same segment.
fn vm86(code: &[u8], iopl: u64) -> Cpu {
    let mut cpu = protected_mode();
    cpu.st.set_rflags(flag::FIXED | flag::VM | flag::IF | iopl << 12);
    cpu.st.cpl = 3;
    for index in [seg::CS, seg::SS, seg::DS, seg::ES, seg::FS, seg::GS] {
        cpu.st.seg[index] = real_segment(&cpu, index, SEGMENT);
    }
    cpu.st.rip = 0;
    cpu.st.gpr[reg::RSP] = SP;
    cpu.update_mode();
    cpu.vm.memory.write(tetrarch_memory::GuestPhys(u64::from(SEGMENT) << 4), code).unwrap();
    cpu
}

const GP0: Stop = Stop::Fault(Fault::with_error(vector::GP, 0));
const UD: Stop = Stop::Fault(Fault::new(vector::UD));

#[test]
fn flags_and_interrupts_go_to_the_monitor_below_iopl_3() {
    let sensitive: [&[u8]; 8] = [
        &[0xFA],       // cli
        &[0xFB],       // sti
        &[0x9C],       // pushf
        &[0x9D],       // popf
        &[0x66, 0x9C], // pushfd
        &[0x66, 0x9D], // popfd
        &[0xCD, 0x20], // int 0x20
        &[0xCF],       // iret
    ];
    for code in sensitive {
        for iopl in 0..3 {
            let mut cpu = vm86(code, iopl);
            let before = (cpu.st.rip, cpu.st.gpr, cpu.st.rflags());
            assert_eq!(step(&mut cpu), Err(GP0), "{code:x?} {iopl}");
            assert_eq!(before, (cpu.st.rip, cpu.st.gpr, cpu.st.rflags()), "{code:x?} {iopl}");
        }
    }
}

#[test]
fn at_iopl_3_the_code_has_its_flags() {
    let mut cpu = vm86(&[0xFA, 0x9C, 0xFB], 3); // cli ; pushf ; sti
    step(&mut cpu).unwrap();
    assert_eq!(cpu.st.iflag, 0);
    step(&mut cpu).unwrap();
    let pushed = peek(&cpu, (u64::from(SEGMENT) << 4) + SP - 2, 2);
    assert_eq!(pushed, flag::FIXED | flag::IOPL);
    step(&mut cpu).unwrap();
    assert_eq!(cpu.st.iflag, 1);

    // popfd: IOPL, VM and the virtual interrupt flags are not its to change.
    let mut cpu = vm86(&[0x66, 0x9D], 3);
    poke(&cpu, (u64::from(SEGMENT) << 4) + SP, flag::CF | flag::VIF | flag::VIP);
    step(&mut cpu).unwrap();
    let flags = flag::FIXED | flag::CF | flag::VM | flag::IOPL;
    assert_eq!(cpu.st.rflags(), flags);

    // iret, of 16 bits: to another place of the same mode.
    let mut cpu = vm86(&[0xCF], 3);
    poke(&cpu, (u64::from(SEGMENT) << 4) + SP, 0x1234 | 0x2000 << 16 | 0x0202 << 32);
    step(&mut cpu).unwrap();
    assert_eq!((cpu.st.rip, cpu.st.seg[seg::CS].base), (0x1234, 0x2_0000));
    assert_eq!(cpu.st.rflags(), flag::FIXED | flag::VM | flag::IOPL | flag::IF);
    assert_eq!(cpu.st.cpl, 3);
}

#[test]
fn software_interrupts_at_iopl_3_and_int3_go_through_the_idt() {
    for (code, vector, iopl) in
        [(&[0xCD, 0x20][..], 0x20, 3), (&[0xCC], 3, 0), (&[0xCC], 3, 3), (&[0xF1], 1, 0)]
    {
        let mut cpu = vm86(code, iopl);
        set_gate(&cpu, 0x20, KERNEL_CS, 0xEE, 0, false);
        step(&mut cpu).unwrap();
        assert_eq!(cpu.st.rip, HANDLERS + vector * 16, "{code:x?}");
        assert!(!cpu.st.vm86());
        let esp = cpu.st.gpr[reg::RSP];
        let frame: Vec<u64> = (0..5).map(|n| peek(&cpu, esp + n * 4, 4)).collect();
        let flags = flag::FIXED | flag::VM | flag::IF | iopl << 12;
        let segment = u64::from(SEGMENT);
        assert_eq!(frame, [code.len() as u64, segment, flags, SP, segment], "{code:x?}");
    }
    // The gate's DPL counts as at any CPL 3.
    let mut cpu = vm86(&[0xCD, 0x20], 3);
    let refused = Fault::with_error(vector::GP, 0x20 << 3 | 2);
    assert_eq!(step(&mut cpu), Err(refused.into()));
}

#[test]
fn a_handler_must_be_at_level_0() {
    let mut cpu = vm86(&[0xCC], 3);
    set_gate(&cpu, 3, CONFORMING, 0xEE, 0, false);
    let refused = Fault::with_error(vector::GP, u32::from(CONFORMING));
    assert_eq!(step(&mut cpu), Err(refused.into()));
}

#[test]
fn privileged_and_protected_mode_instructions() {
    for code in [
        &[0xF4][..],               // hlt
        &[0x0F, 0x20, 0xC0],       // mov eax, cr0
        &[0x0F, 0x21, 0xC0],       // mov eax, dr0
        &[0x0F, 0x01, 0x16, 0, 0], // lgdt [0]
        &[0x0F, 0x06],             // clts
        &[0x0F, 0x30],             // wrmsr
        &[0x0F, 0x01, 0xF0],       // lmsw ax
    ] {
        assert_eq!(step(&mut vm86(code, 3)), Err(GP0), "{code:x?}");
    }
    for code in [
        &[0x0F, 0x02, 0xC0][..], // lar ax, ax
        &[0x0F, 0x03, 0xC0],     // lsl ax, ax
        &[0x0F, 0x00, 0xC0],     // sldt ax
        &[0x0F, 0x00, 0xC8],     // str ax
        &[0x0F, 0x00, 0xD0],     // lldt ax
        &[0x0F, 0x00, 0xD8],     // ltr ax
        &[0x0F, 0x00, 0xE0],     // verr ax
        &[0x63, 0xC0],           // arpl ax, ax
    ] {
        assert_eq!(step(&mut vm86(code, 3)), Err(UD), "{code:x?}");
    }
    // SMSW is anyone's.
    let mut cpu = vm86(&[0x0F, 0x01, 0xE0], 0);
    step(&mut cpu).unwrap();
    assert_eq!(cpu.st.gpr[reg::RAX] & 1, cr::CR0_PE);
}

#[test]
fn ports_depend_on_the_bit_map_whatever_the_iopl() {
    for iopl in [0, 3] {
        let mut cpu = vm86(&[0xE6, 0x80], iopl); // out 0x80, al
        assert_eq!(step(&mut cpu), Err(GP0));
        // A map that starts behind the TSS and allows port 0x80.
        cpu.st.seg[seg::TR].limit = 0x67 + 0x12;
        poke(&cpu, TSS + 0x60, 0x68 << 48);
        assert!(matches!(step(&mut cpu), Err(Stop::Exit(_))));
    }
}

#[test]
fn segments_are_loaded_as_in_real_mode_and_end_at_64_kib() {
    // mov ds, ax ; mov al, [0xffff] ; mov ax, [0xffff]
    let code = [0x8E, 0xD8, 0xA0, 0xFF, 0xFF, 0xA1, 0xFF, 0xFF];
    let mut cpu = vm86(&code, 0);
    cpu.st.gpr[reg::RAX] = 0x1234;
    step(&mut cpu).unwrap();
    assert_eq!((cpu.st.seg[seg::DS].base, cpu.st.seg[seg::DS].selector), (0x1_2340, 0x1234));
    step(&mut cpu).unwrap();
    assert_eq!(step(&mut cpu), Err(GP0));
}
