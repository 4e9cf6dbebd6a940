//! Small programs through [`step`], in every kind of code segment.
//!
//! Paging is off: 64-bit code then runs at physical addresses, which no real CPU
//! does, but nothing here looks at page tables.

use iced_x86::code_asm::*;
use tetrarch_engine::Exit;
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::step;
use crate::cpu::{Cpu, VmShared};
use crate::state::fault::{Fault, Stop, vector};
use crate::state::{attr, cr, flag, reg, seg, shadow};

const CODE: u64 = 0x1000;
const STACK: u64 = 0x8000;
const DATA: u64 = 0x20_000;
/// Beyond the RAM of these machines.
const DEVICE: u64 = 0xD000_0000;

/// A CPU with flat segments for code of 16 (real mode), 32 or 64 bits.
fn cpu(bits: u32) -> Cpu {
    let mut cpu = Cpu::new(0, VmShared::alone(GuestMemory::new(1 << 20).unwrap())).unwrap();
    let st = &mut *cpu.st;
    st.seg[seg::CS].base = 0;
    st.seg[seg::CS].selector = 0;
    if bits > 16 {
        st.cr0 |= cr::CR0_PE;
        for s in &mut st.seg[..6] {
            s.limit = 0xFFFF_FFFF;
            s.attributes |= attr::DB | attr::G;
        }
    }
    if bits == 64 {
        st.efer = cr::EFER_LMA | cr::EFER_LME;
        st.seg[seg::CS].attributes ^= attr::DB | attr::L;
    }
    st.rip = CODE;
    st.gpr[reg::RSP] = STACK;
    cpu.update_mode();
    cpu
}

fn load(cpu: &mut Cpu, mut program: CodeAssembler) -> usize {
    let bytes = program.assemble(CODE).unwrap();
    cpu.vm.memory.write(GuestPhys(CODE), &bytes).unwrap();
    bytes.len()
}

/// Runs to the end of the program; a step that stops early fails the test.
fn run(cpu: &mut Cpu, program: CodeAssembler) {
    let end = CODE + load(cpu, program) as u64;
    for _ in 0..10_000 {
        if cpu.st.rip == end {
            return;
        }
        step(cpu).unwrap();
    }
    panic!("the program does not end");
}

fn asm(bits: u32) -> CodeAssembler {
    CodeAssembler::new(bits).unwrap()
}

fn poke(cpu: &Cpu, address: u64, bytes: &[u8]) {
    cpu.vm.memory.write(GuestPhys(address), bytes).unwrap();
}

fn peek<const N: usize>(cpu: &Cpu, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    cpu.vm.memory.read(GuestPhys(address), &mut bytes).unwrap();
    bytes
}

fn faults(cpu: &mut Cpu, program: CodeAssembler, fault: Fault) {
    load(cpu, program);
    let (gpr, flags) = (cpu.st.gpr, cpu.st.rflags());
    assert_eq!(step(cpu), Err(Stop::Fault(fault)));
    assert_eq!((cpu.st.rip, cpu.st.gpr, cpu.st.rflags()), (CODE, gpr, flags));
}

const GP: Fault = Fault::with_error(vector::GP, 0);
const SS: Fault = Fault::with_error(vector::SS, 0);

#[test]
fn cmov_with_a_false_condition_clears_the_upper_half() {
    let mut c = cpu(64);
    c.st.gpr[reg::RAX] = u64::MAX;
    let mut a = asm(64);
    a.test(ebx, ebx).unwrap();
    a.cmovne(eax, ecx).unwrap();
    run(&mut c, a);
    assert_eq!(c.st.gpr[reg::RAX], 0xFFFF_FFFF);
}

#[test]
fn high_byte_registers_are_bits_8_to_15() {
    let mut c = cpu(64);
    c.st.gpr[reg::RBX] = 0x1122_3344_5566_7788;
    let mut a = asm(64);
    a.mov(ah, bh).unwrap();
    a.add(bl, bh).unwrap();
    a.movzx(ecx, bh).unwrap();
    run(&mut c, a);
    assert_eq!(c.st.gpr[reg::RAX], 0x7700);
    assert_eq!(c.st.gpr[reg::RBX], 0x1122_3344_5566_77FF);
    assert_eq!(c.st.gpr[reg::RCX], 0x77);
}

#[test]
fn calls_loops_and_frames_compute_a_sum() {
    for bits in [16, 32, 64] {
        let mut c = cpu(bits);
        c.st.gpr[reg::RBP] = STACK; // ENTER at level 2 copies from there
        let mut a = asm(bits);
        let mut function = a.create_label();
        let mut again = a.create_label();
        let mut end = a.create_label();
        a.mov(cx, 10u32).unwrap();
        a.call(function).unwrap();
        a.jmp(end).unwrap();
        a.set_label(&mut function).unwrap();
        a.enter(16u32, 2u32).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(ax, cx).unwrap();
        a.loop_(again).unwrap();
        a.leave().unwrap();
        a.ret().unwrap();
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
        run(&mut c, a);
        assert_eq!(c.st.gpr[reg::RAX], 55, "{bits}");
        assert_eq!(c.st.gpr[reg::RSP], STACK, "{bits}");
    }
}

#[test]
fn locked_instructions_change_memory_and_flags() {
    let mut c = cpu(64);
    poke(&c, DATA, &5u64.to_le_bytes());
    c.st.gpr[reg::RBX] = DATA;
    c.st.gpr[reg::RAX] = 5;
    c.st.gpr[reg::RCX] = 9;
    let mut a = asm(64);
    a.lock().cmpxchg(qword_ptr(rbx), rcx).unwrap();
    a.lock().xadd(dword_ptr(rbx), ecx).unwrap();
    a.lock().neg(word_ptr(rbx + 8)).unwrap();
    run(&mut c, a);
    assert_eq!(peek(&c, DATA), 18u64.to_le_bytes());
    assert_eq!(c.st.gpr[reg::RCX], 9);
    assert_eq!(c.st.flags & (flag::ZF | flag::CF), flag::ZF);
}

#[test]
fn cmpxchg16b_exchanges_aligned_memory_only() {
    let mut c = cpu(64);
    poke(&c, DATA, &[1; 16]);
    c.st.gpr[reg::RSI] = DATA;
    c.st.gpr[reg::RBX] = 7;
    c.st.gpr[reg::RCX] = 8;
    let mut a = asm(64);
    a.lock().cmpxchg16b(xmmword_ptr(rsi)).unwrap(); // differs: loads
    a.lock().cmpxchg16b(xmmword_ptr(rsi)).unwrap(); // is equal: stores
    run(&mut c, a);
    assert_eq!(peek::<8>(&c, DATA), 7u64.to_le_bytes());
    assert_eq!(peek::<8>(&c, DATA + 8), 8u64.to_le_bytes());
    assert_ne!(c.st.flags & flag::ZF, 0);
    let mut c = cpu(64);
    c.st.gpr[reg::RSI] = DATA + 8;
    let mut a = asm(64);
    a.cmpxchg16b(xmmword_ptr(rsi)).unwrap();
    faults(&mut c, a, GP);
}

#[test]
fn bit_strings_reach_before_and_behind_their_operand() {
    let mut c = cpu(64);
    c.st.gpr[reg::RBX] = DATA;
    c.st.gpr[reg::RCX] = (-33i64) as u64;
    c.st.gpr[reg::RDX] = 100;
    let mut a = asm(64);
    a.bts(dword_ptr(rbx), ecx).unwrap();
    a.bts(qword_ptr(rbx), rdx).unwrap();
    a.bt(dword_ptr(rbx), edx).unwrap();
    run(&mut c, a);
    assert_eq!(peek(&c, DATA - 8), [0, 0, 0, 0x80, 0, 0, 0, 0]);
    assert_eq!(peek(&c, DATA + 12), [0x10]);
    assert_eq!(c.st.flags & flag::CF, flag::CF);
}

#[test]
fn pop_addresses_memory_with_the_new_stack_pointer() {
    let mut c = cpu(64);
    let mut a = asm(64);
    a.push(0x1234i32).unwrap();
    a.pop(qword_ptr(rsp + 8)).unwrap();
    run(&mut c, a);
    assert_eq!(peek(&c, STACK + 8), 0x1234u64.to_le_bytes());
    assert_eq!(c.st.gpr[reg::RSP], STACK);
}

#[test]
fn pusha_and_popa_keep_every_register_but_the_stack_pointer() {
    for bits in [16, 32] {
        let mut c = cpu(bits);
        for index in [0, 1, 2, 3, 5, 6, 7] {
            c.st.gpr[index] = 0x100 + index as u64;
        }
        let before = c.st.gpr;
        let mut a = asm(bits);
        if bits == 16 {
            a.pusha().unwrap();
            a.xor(ax, ax).unwrap();
            a.popa().unwrap();
        } else {
            a.pushad().unwrap();
            a.xor(eax, eax).unwrap();
            a.popad().unwrap();
        }
        run(&mut c, a);
        assert_eq!(c.st.gpr, before);
    }
}

#[test]
fn popf_at_cpl_3_keeps_if_and_iopl() {
    let mut c = cpu(64);
    c.st.cpl = 3;
    c.st.iflag = 1;
    c.st.gpr[reg::RAX] = flag::CF | flag::IOPL | flag::ID;
    let mut a = asm(64);
    a.push(rax).unwrap();
    a.popfq().unwrap();
    run(&mut c, a);
    assert_eq!(c.st.rflags(), flag::CF | flag::ID | flag::IF | flag::FIXED);
    let mut a = asm(64);
    a.cli().unwrap();
    c.st.rip = CODE;
    faults(&mut c, a, GP);
}

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    let mut c = cpu(64);
    let mut a = asm(64);
    a.sti().unwrap();
    a.nop().unwrap();
    load(&mut c, a);
    step(&mut c).unwrap();
    assert_eq!((c.st.iflag, c.st.shadow), (1, shadow::STI));
    step(&mut c).unwrap();
    assert_eq!(c.st.shadow, 0);
}

#[test]
fn faulting_instructions_change_nothing() {
    let mut c = cpu(64);
    c.st.gpr[reg::RAX] = 0x8000_0000_0000_0000;
    let mut a = asm(64);
    a.jmp(rax).unwrap();
    faults(&mut c, a, GP);
    let mut a = asm(64);
    a.call(rax).unwrap();
    faults(&mut c, a, GP);
    let mut a = asm(64);
    a.mov(rbx, qword_ptr(rax)).unwrap();
    faults(&mut c, a, GP);
    let mut a = asm(64);
    a.div(ecx).unwrap();
    faults(&mut c, a, Fault::new(vector::DE));
    c.st.gpr[reg::RSP] = 0x8000_0000_0000_0000;
    let mut a = asm(64);
    a.pop(rbx).unwrap();
    faults(&mut c, a, SS);
}

#[test]
fn segment_limits_and_rights_are_checked() {
    let mut c = cpu(16);
    let mut a = asm(16);
    a.mov(eax, dword_ptr(0xFFFDu32)).unwrap(); // one byte over 64 KiB
    faults(&mut c, a, GP);
    c.st.gpr[reg::RSP] = 1;
    let mut a = asm(16);
    a.push(ax).unwrap(); // wraps to FFFF, a word too long
    faults(&mut c, a, SS);

    let mut c = cpu(32);
    c.st.seg[seg::DS].attributes &= !attr::RW;
    let mut a = asm(32);
    a.mov(dword_ptr(DATA), eax).unwrap();
    faults(&mut c, a, GP);
    c.st.seg[seg::ES].attributes |= attr::UNUSABLE;
    let mut a = asm(32);
    a.mov(eax, dword_ptr(DATA).es()).unwrap();
    faults(&mut c, a, GP);
    // Expand-down: legal offsets lie over the limit.
    c.st.seg[seg::SS].attributes |= attr::DC;
    c.st.seg[seg::SS].limit = STACK as u32 - 1;
    let mut a = asm(32);
    a.push(eax).unwrap();
    faults(&mut c, a, SS);
    c.st.gpr[reg::RSP] = STACK + 4;
    let mut a = asm(32);
    a.push(eax).unwrap();
    run(&mut c, a);
}

#[test]
fn code_ends_at_the_limit_and_at_fifteen_bytes() {
    let mut c = cpu(32);
    c.st.seg[seg::CS].limit = CODE as u32 + 3;
    let mut a = asm(32);
    a.mov(eax, 5i32).unwrap(); // five bytes
    faults(&mut c, a, GP);
    let mut c = cpu(64);
    poke(&c, CODE, &[0x66; 15]);
    assert_eq!(step(&mut c), Err(Stop::Fault(GP)));
    poke(&c, CODE, &[0xF0, 0x01, 0xC0]); // lock add eax, eax
    assert_eq!(step(&mut c), Err(Stop::Fault(Fault::new(vector::UD))));
}

#[test]
fn single_step_traps_behind_the_instruction() {
    let mut c = cpu(64);
    c.st.flags |= flag::TF;
    let mut a = asm(64);
    a.inc(eax).unwrap();
    load(&mut c, a);
    assert_eq!(step(&mut c), Err(Stop::Fault(Fault::debug(1 << 14))));
    assert_eq!((c.st.rip, c.st.gpr[reg::RAX]), (CODE + 2, 1));
}

/// What going element by element makes of the bytes.
fn copy_elements(memory: &mut [u8], from: usize, to: usize, count: usize, element: usize) {
    for n in 0..count {
        let bytes = memory[from + n * element..][..element].to_vec();
        memory[to + n * element..][..element].copy_from_slice(&bytes);
    }
}

#[test]
fn rep_movs_copies_as_if_by_element() {
    let pattern: Vec<u8> = (0..0x6000u32).map(|n| (n * 7 + n / 256) as u8).collect();
    for element in [1usize, 2, 4, 8] {
        for (from, to) in
            [(0x10, 0x2900), (0x100, 0x101), (0x100, 0x103), (0x100, 0x108), (0x108, 0x100), (3, 7)]
        {
            let mut c = cpu(64);
            poke(&c, DATA, &pattern);
            let count = 0x2000 / element;
            c.st.gpr[reg::RSI] = DATA + from as u64;
            c.st.gpr[reg::RDI] = DATA + to as u64;
            c.st.gpr[reg::RCX] = count as u64;
            let mut a = asm(64);
            match element {
                1 => a.rep().movsb(),
                2 => a.rep().movsw(),
                4 => a.rep().movsd(),
                _ => a.rep().movsq(),
            }
            .unwrap();
            run(&mut c, a);
            let mut expected = pattern.clone();
            copy_elements(&mut expected, from, to, count, element);
            assert!(peek::<0x6000>(&c, DATA)[..] == expected, "{element} {from:#x} {to:#x}");
            assert_eq!(c.st.gpr[reg::RCX], 0);
            assert_eq!(c.st.gpr[reg::RSI], DATA + from as u64 + 0x2000);
            assert_eq!(c.st.gpr[reg::RDI], DATA + to as u64 + 0x2000);
        }
    }
}

#[test]
fn string_instructions_follow_the_direction_flag() {
    let mut c = cpu(32);
    poke(&c, DATA, &[1, 2, 3, 4]);
    c.st.gpr[reg::RSI] = DATA + 3;
    c.st.gpr[reg::RDI] = DATA + 4;
    c.st.gpr[reg::RCX] = 4;
    let mut a = asm(32);
    a.std().unwrap();
    a.rep().movsb().unwrap();
    run(&mut c, a);
    assert_eq!(peek(&c, DATA), [1, 1, 2, 3, 4]);
    assert_eq!(c.st.gpr[reg::RSI], DATA - 1);
}

#[test]
fn rep_stos_is_bounded_by_step_and_reports_code() {
    let mut c = cpu(64);
    let listener = c.vm.code.add_listener(Box::new(|| ()));
    c.vm.code.mark(DATA >> 12, 1);
    c.st.gpr[reg::RAX] = 0x0102_0304_0506_0708;
    c.st.gpr[reg::RDI] = DATA;
    c.st.gpr[reg::RCX] = 0x2_0000 / 8;
    let mut a = asm(64);
    a.rep().stosq().unwrap();
    load(&mut c, a);
    step(&mut c).unwrap();
    assert_eq!(c.st.rip, CODE, "128 KiB take more than one step");
    assert!(c.st.gpr[reg::RCX] > 0);
    while c.st.rip == CODE {
        step(&mut c).unwrap();
    }
    assert_eq!(c.vm.code.take_written(listener)[0].page, DATA >> 12);
    assert_eq!(peek(&c, DATA + 0x1_FFF8), 0x0102_0304_0506_0708u64.to_le_bytes());
    assert_eq!(peek(&c, DATA + 0x2_0000), [0; 8]);
}

#[test]
fn scas_and_cmps_stop_at_the_element_that_decides() {
    let mut c = cpu(64);
    poke(&c, DATA, b"hello\0hellO\0");
    c.st.gpr[reg::RDI] = DATA;
    c.st.gpr[reg::RCX] = u64::MAX;
    let mut a = asm(64);
    a.repne().scasb().unwrap();
    run(&mut c, a);
    assert_eq!(c.st.gpr[reg::RDI], DATA + 6);
    assert_eq!(!c.st.gpr[reg::RCX], 6);
    c.st.rip = CODE;
    c.st.gpr[reg::RSI] = DATA;
    c.st.gpr[reg::RCX] = 6;
    let mut a = asm(64);
    a.repe().cmpsb().unwrap();
    run(&mut c, a);
    assert_eq!(c.st.gpr[reg::RCX], 1);
    assert_eq!(c.st.flags & (flag::ZF | flag::CF), 0);
}

#[test]
fn string_addresses_wrap_at_their_size() {
    let mut c = cpu(16);
    c.st.gpr[reg::RDI] = 0xABCD_FFFE;
    c.st.gpr[reg::RCX] = 4;
    c.st.gpr[reg::RAX] = 0x55;
    let mut a = asm(16);
    a.rep().stosb().unwrap();
    run(&mut c, a);
    assert_eq!(peek(&c, 0xFFFE), [0x55, 0x55, 0]);
    assert_eq!(peek(&c, 0), [0x55, 0x55, 0]);
    assert_eq!(c.st.gpr[reg::RDI], 0xABCD_0002);
}

#[test]
fn rep_movs_from_a_device_asks_once_an_element() {
    let mut c = cpu(64);
    c.st.gpr[reg::RSI] = DEVICE;
    c.st.gpr[reg::RDI] = DATA;
    c.st.gpr[reg::RCX] = 2;
    let mut a = asm(64);
    a.rep().movsd().unwrap();
    load(&mut c, a);
    for n in 0..2u64 {
        let address = DEVICE + n * 4;
        assert_eq!(step(&mut c), Err(Stop::Exit(Exit::MmioRead { address, size: 4 })));
        assert_eq!(c.st.gpr[reg::RCX], 2 - n);
        c.replay.answer(0x1111 * (n + 1));
        // One answered iteration a step, so that a kick can come between two.
        step(&mut c).unwrap();
    }
    assert_eq!(peek(&c, DATA), [0x11, 0x11, 0, 0, 0x22, 0x22, 0, 0]);
    assert_ne!(c.st.rip, CODE);
}

#[test]
fn reading_and_writing_a_device_asks_twice_and_updates_once() {
    let mut c = cpu(64);
    c.st.gpr[reg::RBX] = DEVICE;
    let mut a = asm(64);
    a.add(dword_ptr(rbx), 5i32).unwrap();
    load(&mut c, a);
    assert_eq!(step(&mut c), Err(Stop::Exit(Exit::MmioRead { address: DEVICE, size: 4 })));
    c.replay.answer(u64::from(u32::MAX));
    let write = Exit::MmioWrite { address: DEVICE, size: 4, data: 4 };
    assert_eq!(step(&mut c), Err(Stop::Exit(write)));
    assert_eq!(c.st.flags & flag::CF, 0);
    c.replay.answer(0);
    step(&mut c).unwrap();
    assert_eq!(c.st.flags & flag::CF, flag::CF);
}

#[test]
fn breakpoints_fault_before_code_and_trap_behind_data() {
    let mut c = cpu(64);
    c.st.dr[0] = CODE;
    c.st.dr[1] = DATA + 4;
    // L0: execution; L1: writes of four bytes.
    c.st.dr[7] = 1 | 1 << 2 | 0b1101 << 20;
    c.st.gpr[reg::RDI] = DATA;
    c.st.gpr[reg::RCX] = 8;
    let mut a = asm(64);
    a.rep().stosb().unwrap();
    load(&mut c, a);
    assert_eq!(step(&mut c), Err(Stop::Fault(Fault::debug(1))));
    assert_eq!(c.st.gpr[reg::RCX], 8);
    for left in [7, 6, 5, 4] {
        step(&mut c).unwrap();
        assert_eq!(c.st.gpr[reg::RCX], left);
    }
    assert_eq!(step(&mut c), Err(Stop::Fault(Fault::debug(2))));
    assert_eq!(c.st.gpr[reg::RCX], 3);
}

/// Address, length field and R/W field of DR0, then what the instruction hits.
#[test]
fn data_breakpoints_see_every_byte_of_an_access() {
    let stosq: &[u8] = &[0xF3, 0x48, 0xAB];
    let lodsd: &[u8] = &[0xAD];
    let push: &[u8] = &[0x50];
    let out: &[u8] = &[0xE7, 0x80]; // out 0x80, eax
    let (write, port, both) = (1, 2, 3);
    for (code, at, len, kind, hit) in [
        (stosq, DATA, 0, write, true),
        (stosq, DATA + 7, 0, write, true),
        (stosq, DATA + 4, 3, both, true),
        (stosq, DATA + 8, 0, write, false),
        (lodsd, DATA + 3, 0, both, true),
        (lodsd, DATA + 3, 0, write, false),
        (lodsd, DATA + 4, 0, both, false),
        (push, STACK - 1, 0, write, true),
        (push, STACK, 0, write, false),
        (out, 0x83, 0, port, true),
        (out, 0x84, 0, port, false),
        (out, 0x80, 0, both, false),
    ] {
        let mut c = cpu(64);
        c.st.cr4 |= cr::CR4_DE;
        c.st.dr[0] = at;
        c.st.dr[7] = 1 | kind << 16 | len << 18;
        (c.st.gpr[reg::RDI], c.st.gpr[reg::RSI], c.st.gpr[reg::RCX]) = (DATA, DATA, 1);
        c.st.gpr[reg::RSP] = STACK;
        poke(&c, CODE, code);
        let mut result = step(&mut c);
        if let Err(Stop::Exit(_)) = result {
            c.replay.answer(0);
            result = step(&mut c);
        }
        let expected = if hit { Err(Stop::Fault(Fault::debug(1))) } else { Ok(()) };
        assert_eq!(result, expected, "{code:x?} {at:#x} {len} {kind}");
    }
    // No iteration, no access.
    let mut c = cpu(64);
    c.st.dr[0] = DATA;
    c.st.dr[7] = 1 | write << 16;
    c.st.gpr[reg::RDI] = DATA;
    poke(&c, CODE, stosq);
    assert_eq!(step(&mut c), Ok(()));
}
