//! Two vCPUs on two threads, in one memory with one code cache.

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tetrarch_engine::{Counters, Exit, Registers, Segment, SegmentTable};
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use super::*;
use crate::translate::cache::MAX_BLOCK_BYTES;

#[path = "smp_tests/ordering.rs"]
mod ordering;

/// Page tables that map the low 2 MiB as they are, by 4 KiB pages.
const TABLES: u64 = 0x1000;
const STACKS: u64 = 0x1_0000;
/// A counter that one vCPU writes and the other reads.
const SHARED: u64 = 0x2_0000;
/// Code of vCPU 0 and vCPU 1.
const CODE: [u64; 2] = [0x3_0000, 0x4_0000];
/// Functions, a page each.
const FUNCTIONS: u64 = 0x8_0000;
const MEMORY: u64 = 2 << 20;

const OK: u32 = 0x80;
const WRONG: u32 = 0x81;

fn vm() -> BtVm {
    vm_with_cache(Room::USUAL)
}

fn vm_with_cache(room: Room) -> BtVm {
    with_identity_map(|memory| {
        build(memory, Config { topology: Topology::flat(2), ..Config::default() }, room, None)
            .unwrap()
    })
}

fn with_identity_map(build: impl FnOnce(Arc<GuestMemory>) -> BtVm) -> BtVm {
    let memory = Arc::new(GuestMemory::new(MEMORY).unwrap());
    let mut tables = vec![0u64; 4 * 512];
    for level in 0..3 {
        tables[level * 512] = (TABLES + (level as u64 + 1) * PAGE_SIZE) | 3;
    }
    for page in 0..512 {
        tables[3 * 512 + page] = (page as u64) << 12 | 3;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write(GuestPhys(TABLES), &bytes).unwrap();
    build(memory)
}

fn load(vm: &BtVm, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    vm.shared.memory.write(GuestPhys(at), &a.assemble(at).unwrap()).unwrap();
}

/// A vCPU in 64-bit mode, at its code.
fn vcpu(vm: &BtVm, id: u32) -> Box<dyn Vcpu> {
    let mut vcpu = vm.create_vcpu(id).unwrap();
    if id != 0 {
        // INIT has it wait for a SIPI; the state set below replaces the one of that.
        vm.shared.irqchip.set_waiting(id as usize, (false, false, None, false));
    }
    let mut system = vcpu.system_registers().unwrap();
    let data = Segment { base: 0, limit: u32::MAX, attributes: 0xC093, selector: 16 };
    (system.ss, system.ds, system.es) = (data, data, data);
    system.cs = Segment { attributes: 0xA09B, selector: 8, ..data };
    system.cr0 = 0x8001_0033;
    system.cr3 = TABLES;
    system.cr4 = 0x620;
    system.efer = 0x500;
    vcpu.set_system_registers(&system).unwrap();
    let mut registers = Registers { rip: CODE[id as usize], rflags: 2, ..Registers::default() };
    registers.gpr[4] = STACKS + (u64::from(id) + 1) * PAGE_SIZE;
    vcpu.set_registers(&registers).unwrap();
    vcpu
}

/// Runs both until each has written to a port. Returns the counters.
fn run_both(vm: &BtVm) -> [Counters; 2] {
    run_both_beside(vm, || ())
}

/// The same, and `beside` meanwhile.
fn run_both_beside(vm: &BtVm, beside: impl FnOnce()) -> [Counters; 2] {
    let start = std::sync::Barrier::new(3);
    std::thread::scope(|scope| {
        let vcpus = [0, 1].map(|id| {
            let start = &start;
            scope.spawn(move || {
                let mut vcpu = vcpu(vm, id);
                start.wait();
                let exit = vcpu.run().unwrap();
                let Exit::PortOut { port, data, .. } = exit else { panic!("vCPU {id}: {exit:?}") };
                assert_eq!(u32::from(port), OK, "vCPU {id} found {data:#x}");
                vcpu.counters()
            })
        });
        start.wait();
        beside();
        vcpus.map(|vcpu| vcpu.join().unwrap())
    })
}

fn count(counters: &Counters, name: &str) -> u64 {
    counters.iter().find(|(_, other, _)| *other == name).unwrap().2
}

/// At 3, so that the immediate of its first instruction lies in one quadword.
const FUNCTION: u64 = FUNCTIONS + 3;

/// `mov eax, 0; ret`
fn load_function(vm: &BtVm) {
    load(vm, FUNCTION, |a| {
        a.mov(eax, 0)?;
        a.ret()
    });
}

/// Cross-modifying code (Intel SDM 3A, 8.1.3): one vCPU writes an instruction and
/// then a flag; the other sees the flag, serialises, and runs the instruction. The
/// writer has the page in its TLB when it is first translated.
#[test]
fn code_that_another_vcpu_has_written_is_what_runs() {
    const ROUNDS: i32 = 100;
    const SEEN: u64 = SHARED + 64;
    let vm = vm();
    load_function(&vm);
    load(&vm, CODE[0], |a| {
        let [mut again, mut wait, mut right, mut wrong] = [(); 4].map(|()| a.create_label());
        a.set_label(&mut again)?;
        a.mov(esi, dword_ptr(SEEN))?;
        a.inc(esi)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(SHARED), esi)?;
        a.jne(wait)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.call(FUNCTION)?;
        a.cmp(eax, esi)?;
        a.je(right)?;
        a.inc(edi)?;
        a.set_label(&mut right)?;
        a.mov(dword_ptr(SEEN), esi)?;
        a.cmp(esi, ROUNDS)?;
        a.jne(again)?;
        a.mov(eax, edi)?;
        a.test(eax, eax)?;
        a.jnz(wrong)?;
        a.out(OK, al)?;
        a.set_label(&mut wrong)?;
        a.out(WRONG, eax)
    });
    load(&vm, CODE[1], |a| {
        let [mut again, mut wait] = [(); 2].map(|()| a.create_label());
        a.set_label(&mut again)?;
        a.inc(ecx)?;
        a.mov(dword_ptr(FUNCTION + 1), ecx)?;
        a.mov(dword_ptr(SHARED), ecx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(SEEN), ecx)?;
        a.jne(wait)?;
        a.cmp(ecx, ROUNDS)?;
        a.jne(again)?;
        a.out(OK, al)
    });
    let [runner, _] = run_both(&vm);
    assert!(count(&runner, "invalidated_pages") >= ROUNDS as u64 - 1);
}

/// The same with a writer that waits for nobody, at a pace that changes: it meets
/// each step of a translation.
#[test]
fn page_is_translated_while_another_vcpu_writes_it() {
    const WRITES: i32 = 3000;
    let vm = vm();
    load_function(&vm);
    load(&vm, CODE[0], |a| {
        let [mut again, mut right, mut wrong] = [(); 3].map(|()| a.create_label());
        a.set_label(&mut again)?;
        a.mov(esi, dword_ptr(SHARED))?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.call(FUNCTION)?;
        a.cmp(eax, esi)?;
        a.jae(right)?;
        a.inc(edi)?;
        a.set_label(&mut right)?;
        a.cmp(esi, WRITES)?;
        a.jb(again)?;
        a.mov(eax, edi)?;
        a.test(eax, eax)?;
        a.jnz(wrong)?;
        a.out(OK, al)?;
        a.set_label(&mut wrong)?;
        a.out(WRONG, eax)
    });
    load(&vm, CODE[1], |a| {
        let [mut again, mut pause] = [(); 2].map(|()| a.create_label());
        a.set_label(&mut again)?;
        a.inc(ecx)?;
        a.mov(edx, ecx)?;
        a.and(edx, 15)?;
        a.shl(edx, 12)?;
        a.set_label(&mut pause)?;
        a.dec(edx)?;
        a.jns(pause)?;
        a.mov(dword_ptr(FUNCTION + 1), ecx)?;
        a.mov(dword_ptr(SHARED), ecx)?;
        a.cmp(ecx, WRITES)?;
        a.jb(again)?;
        a.out(OK, al)
    });
    run_both(&vm);
}

/// A copy that is kept up by the log alone, as a migration's is, while two vCPUs
/// write to the same pages, is the memory once they stand.
#[test]
fn dirty_log_misses_no_write_of_two() {
    const PAGES: u64 = 64;
    const DATA: u64 = 0x10_0000;
    const TAKES: u64 = 300;
    let vm = vm();
    for id in 0..2 {
        load(&vm, CODE[id as usize], |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rcx)?;
            a.mov(rdx, rcx)?;
            a.and(edx, PAGES as i32 - 1)?;
            a.shl(edx, 12)?;
            a.mov(qword_ptr(rdx + (DATA + 8 * id)), rcx)?;
            a.cmp(dword_ptr(SHARED), 0)?;
            a.je(again)?;
            a.out(OK, al)
        });
    }
    let memory = &vm.shared.memory;
    let mut copy = vec![0; MEMORY as usize];
    let follow = |copy: &mut [u8]| {
        let log = vm.take_dirty_log().unwrap();
        let mut pages = 0;
        for address in log.iter().flat_map(|pages| pages.addresses()) {
            let start = address.0 as usize;
            memory.read(address, &mut copy[start..start + PAGE_SIZE as usize]).unwrap();
            pages += 1;
        }
        pages
    };
    vm.set_dirty_log(true).unwrap();
    memory.read(GuestPhys(0), &mut copy).unwrap();
    let mut copied = 0;
    run_both_beside(&vm, || {
        let hopeless = Instant::now() + Duration::from_secs(60);
        while copied < TAKES * PAGES && Instant::now() < hopeless {
            copied += follow(&mut copy);
        }
        memory.write(GuestPhys(SHARED), &[1]).unwrap();
    });
    assert!(copied >= TAKES * PAGES, "{copied} pages seen to be written");
    follow(&mut copy);
    let mut now = vec![0; MEMORY as usize];
    memory.read(GuestPhys(0), &mut now).unwrap();
    let differs = copy.iter().zip(&now).position(|(copy, now)| copy != now);
    assert_eq!(differs, None, "a byte at this address");
}

/// The cache is emptied again and again under the feet of whoever did not fill it.
#[test]
fn cache_is_full_while_both_run() {
    const COUNT: u64 = 600;
    const ROUNDS: i32 = 50;
    const APART: u64 = 256;
    let vm = vm_with_cache(Room { bytes: MAX_BLOCK_BYTES + (32 << 10), ..Room::USUAL });
    for number in 0..COUNT {
        load(&vm, FUNCTIONS + number * APART, |a| {
            a.add(eax, number as i32 + 1)?;
            a.ret()
        });
    }
    for code in CODE {
        load(&vm, code, |a| {
            let [mut round, mut call, mut wrong] = [(); 3].map(|()| a.create_label());
            a.mov(ebx, ROUNDS)?;
            a.set_label(&mut round)?;
            a.mov(ecx, FUNCTIONS as u32)?;
            a.set_label(&mut call)?;
            a.call(rcx)?;
            a.add(ecx, APART as i32)?;
            a.cmp(ecx, (FUNCTIONS + COUNT * APART) as i32)?;
            a.jne(call)?;
            a.dec(ebx)?;
            a.jnz(round)?;
            a.cmp(eax, ROUNDS * (COUNT * (COUNT + 1) / 2) as i32)?;
            a.jne(wrong)?;
            a.out(OK, al)?;
            a.set_label(&mut wrong)?;
            a.out(WRONG, eax)
        });
    }
    let counters = run_both(&vm);
    let flushes: u64 = counters.iter().map(|counters| count(counters, "cache_flushes")).sum();
    // How often depends on how the host lets the two run: who waits to be obeyed fills
    // nothing, and the other interprets.
    assert!(flushes > 0);
}

const HANDLER: u64 = 0x5_0000;
const IDT: u64 = 0x6_0000;
const GDT: u64 = 0x6_1000;

/// A vCPU whose NMIs lead to the handler.
fn vcpu_with_handler(vm: &BtVm, id: u32) -> Box<dyn Vcpu> {
    // Vector 2: a 64-bit interrupt gate; selector 8 names the code segment.
    let gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (HANDLER >> 16 & 0xFFFF) << 48;
    vm.shared.memory.write(GuestPhys(IDT + 2 * 16), &gate.to_le_bytes()).unwrap();
    let segments: [u64; 3] = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
    for (selector, segment) in (0..).step_by(8).zip(segments) {
        vm.shared.memory.write(GuestPhys(GDT + selector), &segment.to_le_bytes()).unwrap();
    }
    let mut vcpu = vcpu(vm, id);
    let mut system = vcpu.system_registers().unwrap();
    system.idt = SegmentTable { base: IDT, limit: 0xFFF };
    system.gdt = SegmentTable { base: GDT, limit: 0xFF };
    system.apic_base |= 0xC00; // x2APIC
    vcpu.set_system_registers(&system).unwrap();
    let mut registers = vcpu.registers().unwrap();
    registers.gpr[12] = u64::from(1 - id);
    vcpu.set_registers(&registers).unwrap();
    vcpu
}

/// Runs both until one leaves by other than a kick, and then ends the other.
fn run_until_one_leaves(vm: &BtVm) -> Vec<Exit> {
    let [first, second] = [0, 1].map(|id| vcpu_with_handler(vm, id));
    let kickers = [first.kicker(), second.kicker()];
    let exits = std::thread::scope(|scope| {
        [first, second]
            .map(|mut vcpu| {
                let kickers = &kickers;
                scope.spawn(move || {
                    let exit = vcpu.run().unwrap();
                    kickers.iter().for_each(|kicker| kicker.kick());
                    exit
                })
            })
            .map(|thread| thread.join().unwrap())
    });
    exits.into_iter().filter(|exit| *exit != Exit::Kicked).collect()
}

/// Both are in HLT with interrupts off while an NMI is on its way from one to the
/// other, again and again.
#[test]
fn machine_is_not_halted_for_good_while_an_nmi_is_on_its_way() {
    const ROUNDS: i32 = 3000;
    let vm = vm();
    for code in CODE {
        load(&vm, code, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.hlt()?;
            a.jmp(again)
        });
    }
    load(&vm, HANDLER, |a| {
        let mut done = a.create_label();
        a.inc(r13d)?;
        a.cmp(r13d, ROUNDS)?;
        a.je(done)?;
        a.mov(ecx, 0x830)?; // the x2APIC's interrupt command register
        a.mov(edx, r12d)?;
        a.mov(eax, 0x400)?;
        a.wrmsr()?;
        a.iretq()?;
        a.set_label(&mut done)?;
        a.out(OK, al)
    });
    vm.msi(0xFEE0_0000, 0x400);
    let exits = run_until_one_leaves(&vm);
    assert!(matches!(exits[..], [Exit::PortOut { port: 0x80, .. }]), "{exits:?}");
}

#[test]
fn machine_is_halted_for_good_when_both_are() {
    let vm = vm();
    load(&vm, CODE[0], |a| a.hlt());
    load(&vm, CODE[1], |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1_000_000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(dword_ptr(SHARED), 1)?;
        a.hlt()
    });
    let exits = run_until_one_leaves(&vm);
    assert!(!exits.is_empty() && exits.iter().all(|exit| *exit == Exit::Halt), "{exits:?}");
    let mut ran = [0];
    vm.shared.memory.read(GuestPhys(SHARED), &mut ran).unwrap();
    assert_eq!(ran, [1], "the second had halted");
}
