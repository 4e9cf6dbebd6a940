//! The dirty log: which pages vCPUs and devices wrote.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tetrarch_engine::{Exit, Kick, Vm};
use tetrarch_memory::GuestPhys;

use super::Body;
use super::guest::{CODE, Engine, FRESH, Guest, LONGEST, PAGE_TABLES};

pub const BODIES: &[(&str, Body)] = &[
    ("dirty_log_names_each_page_written_and_no_other", each_page_written),
    ("dirty_log_has_a_page_that_is_read_before_it_is_written", read_before_written),
    ("dirty_log_has_the_pages_of_16_bit_code", pages_of_16_bit_code),
    ("dirty_log_has_the_accessed_and_dirty_bits_of_page_walks", page_walks),
    ("dirty_log_loses_no_write_of_a_vcpu_that_runs", no_write_is_lost),
    ("dirty_log_off_names_nothing_and_begins_empty", off_and_on),
];

fn take(vm: &dyn Vm) -> BTreeSet<u64> {
    let log = vm.take_dirty_log().unwrap_or_else(|error| panic!("{error}"));
    log.iter().flat_map(|pages| pages.addresses()).map(|page| page.0).collect()
}

/// The same without page tables where the host's CPU walks them: it may count a
/// walk that writes nothing as a write (AMD APM 2, 15.25.6; SDM 3C, 29.3.3.2).
fn take_data(engine: Engine, vm: &dyn Vm) -> BTreeSet<u64> {
    let mut pages = take(vm);
    if engine == Engine::Kvm {
        pages.retain(|page| !PAGE_TABLES.contains(page));
    }
    pages
}

fn logged(guest: &Guest) {
    guest.vm.set_dirty_log(true).unwrap_or_else(|error| panic!("{error}"));
}

fn each_page_written(engine: Engine) {
    let mut code = Vec::new();
    let absolute = |code: &mut Vec<u8>, opcode: &[u8], address: u32| {
        code.extend(opcode);
        code.extend(address.to_le_bytes());
    };
    absolute(&mut code, &[0x8A, 0x1C, 0x25], 0x5_0000); // mov bl, [0x50000]: no write
    absolute(&mut code, &[0x88, 0x04, 0x25], 0x4_0000); // mov [0x40000], al
    absolute(&mut code, &[0x88, 0x04, 0x25], CODE as u32 + 0x800); // into a page of code
    absolute(&mut code, &[0xF0, 0xFF, 0x04, 0x25], 0x4_2000); // lock inc dword [0x42000]
    absolute(&mut code, &[0xBF], 0x4_4FF0); // mov edi, 0x44ff0
    absolute(&mut code, &[0xB9], 0x20); // mov ecx, 0x20
    code.extend([0xF3, 0xAA]); // rep stosb: into the next page
    absolute(&mut code, &[0x89, 0x04, 0x25], 0x4_7FFE); // mov [0x47ffe], eax: so too
    absolute(&mut code, &[0xBC], 0x4_A800); // mov esp, 0x4a800
    code.push(0x50); // push rax
    absolute(&mut code, &[0x0F, 0x01, 0x0C, 0x25], 0x4_C000); // sidt [0x4c000]
    code.extend([0xE6, 0x80]); // out 0x80, al
    let back = -(code.len() as i32 + 5);
    code.push(0xE9); // jmp to the start
    code.extend(back.to_le_bytes());
    let mut guest = Guest::new_64_bit(engine, &code);
    // Everything is known before the log begins: translations, entries of a TLB.
    guest.out();
    guest.out();
    logged(&guest);
    let by_guest = BTreeSet::from([
        CODE, 0x4_0000, 0x4_2000, 0x4_4000, 0x4_5000, 0x4_7000, 0x4_8000, 0x4_A000, 0x4_C000,
    ]);
    for round in 0..3 {
        guest.out();
        guest.memory.write(GuestPhys(0x6_0FFF), &[1, 2]).expect("RAM");
        let mut expected = by_guest.clone();
        expected.extend([0x6_0000, 0x6_1000]);
        assert_eq!(take_data(engine, &*guest.vm), expected, "round {round}");
        assert_eq!(take(&*guest.vm), BTreeSet::new(), "round {round}: nothing was written since");
    }
}

fn read_before_written(engine: Engine) {
    // mov rax, cr3 ; mov cr3, rax ; mov bl, [0x40000] ; mov [0x40000], bl ;
    // out 0x80, al ; jmp to the start
    let code = [
        0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8, 0x8A, 0x1C, 0x25, 0, 0, 4, 0, 0x88, 0x1C, 0x25, 0, 0,
        4, 0, 0xE6, 0x80, 0xEB, 0xE8,
    ];
    let mut guest = Guest::new_64_bit(engine, &code);
    // KVM maps a page for writing where it is first read, and counts it as written then: the
    // code's page is not to be met for the first time.
    guest.out();
    logged(&guest);
    for _ in 0..3 {
        guest.out();
        assert_eq!(take_data(engine, &*guest.vm), BTreeSet::from([0x4_0000]));
    }
}

fn pages_of_16_bit_code(engine: Engine) {
    // mov [0x5000], al ; mov [0x1800], al ; out 0x80, al ; jmp to the start
    let code = [0xA2, 0, 0x50, 0xA2, 0, 0x18, 0xE6, 0x80, 0xEB, 0xF6];
    let mut guest = Guest::new(engine, &code);
    guest.out();
    logged(&guest);
    for _ in 0..2 {
        guest.out();
        assert_eq!(take(&*guest.vm), BTreeSet::from([0x5000, CODE]));
    }
}

fn page_walks(engine: Engine) {
    let [.., fresh_table] = PAGE_TABLES;
    let address = |page: u64| ((FRESH + page) as u32).to_le_bytes();
    let mut code = vec![0x8A, 0x04, 0x25]; // mov al, [FRESH + 0x50000]
    code.extend(address(0x5_0000));
    code.extend([0xE6, 0x80, 0x88, 0x04, 0x25]); // out 0x80, al ; mov [...], al
    code.extend(address(0x5_0000));
    code.extend([0xE6, 0x80]);
    let mut guest = Guest::new_64_bit(engine, &code);
    logged(&guest);
    let entry = |guest: &Guest| u64::from_le_bytes(guest.read(fresh_table + 0x50 * 8)) & 0x60;
    guest.out();
    assert_eq!(entry(&guest), 0x20, "accessed");
    let log = take(&*guest.vm);
    assert!(log.contains(&fresh_table), "{log:x?}");
    // KVM may count it as written already: it maps what is read for writing.
    assert!(engine == Engine::Kvm || !log.contains(&0x5_0000), "{log:x?}");
    guest.out();
    assert_eq!(entry(&guest), 0x60, "accessed and dirty");
    let log = take(&*guest.vm);
    assert!(log.contains(&fresh_table) && log.contains(&0x5_0000), "{log:x?}");
}

/// A vCPU that runs on a thread of its own until this is dropped.
struct Running<'a> {
    ended: &'a AtomicBool,
    kicker: Arc<dyn Kick>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.kicker.kick();
    }
}

/// Copies what the log names while the vCPU writes, as whoever moves a guest does: once
/// it stands, the copy is what memory is. A write may be seen before its page is named,
/// as KVM does it for instructions that it emulates (Linux, arch/x86/kvm/x86.c,
/// emulator_cmpxchg_emulated).
fn no_write_is_lost(engine: Engine) {
    const FIRST: u64 = 0x4_0000;
    const END: u64 = 0x8_0000;
    let code = [
        0xBF, 0, 0, 4, 0, // mov edi, FIRST
        0xFF, 0xC0, // next: inc eax
        0x89, 0x07, // mov [rdi], eax
        0xF0, 0xFF, 0x47, 0x08, // lock inc dword [rdi + 8]
        0x81, 0xC7, 0, 0x10, 0, 0, // add edi, 0x1000
        0x81, 0xFF, 0, 0, 8, 0, // cmp edi, END
        0x72, 0xEA, // jb next
        0xEB, 0xE3, // jmp to the start
    ];
    let Guest { vm, mut vcpu, memory, .. } = Guest::new_64_bit(engine, &code);
    let read = |address: u64, data: &mut [u8]| {
        memory.read(GuestPhys(address), data).expect("RAM");
    };
    let moves = || {
        let first = || {
            let mut value = [0; 4];
            read(FIRST, &mut value);
            value
        };
        let (from, start) = (first(), Instant::now());
        while first() == from {
            assert!(start.elapsed() < LONGEST, "the guest hangs");
            std::thread::yield_now();
        }
    };
    let mut copy = vec![0; (END - FIRST) as usize];
    let follow = |copy: &mut [u8]| {
        for &page in take(&*vm).range(FIRST..END) {
            let at = (page - FIRST) as usize;
            read(page, &mut copy[at..at + 0x1000]);
        }
    };
    vm.set_dirty_log(true).unwrap_or_else(|error| panic!("{error}"));
    for round in 0..30 {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _running = Running { ended: &ended, kicker: vcpu.kicker() };
            scope.spawn(|| {
                while !ended.load(Ordering::SeqCst) {
                    assert_eq!(vcpu.run().unwrap_or_else(|error| panic!("{error}")), Exit::Kicked);
                }
            });
            for _ in 0..3 {
                moves();
                follow(&mut copy);
            }
        });
        follow(&mut copy);
        let mut now = vec![0; copy.len()];
        read(FIRST, &mut now);
        let lost = (0..copy.len()).find(|&at| copy[at] != now[at]);
        assert_eq!(lost, None, "round {round}: a write since the page was copied");
    }
}

fn off_and_on(engine: Engine) {
    // mov [0x5000], al ; out 0x80, al ; jmp to the start
    let mut guest = Guest::new(engine, &[0xA2, 0, 0x50, 0xE6, 0x80, 0xEB, 0xF9]);
    guest.out();
    assert_eq!(take(&*guest.vm), BTreeSet::new(), "never on");
    logged(&guest);
    guest.out();
    guest.vm.set_dirty_log(false).unwrap_or_else(|error| panic!("{error}"));
    guest.out();
    guest.write(0x6000, &[1]);
    assert_eq!(take(&*guest.vm), BTreeSet::new(), "off");
    logged(&guest);
    assert_eq!(take(&*guest.vm), BTreeSet::new(), "begins empty");
    let region = guest.memory.add_region(GuestPhys(0xE000_0000), 0x2000).expect("free");
    guest.write(0xE000_1000, &[1]);
    assert_eq!(take(&*guest.vm), BTreeSet::from([0xE000_1000]), "memory that came later");
    guest.write(0xE000_0000, &[1]);
    guest.memory.remove_region(region.start).expect("there");
    guest.memory.add_region(region.start, 0x2000).expect("free again");
    assert_eq!(take(&*guest.vm), BTreeSet::new(), "another region");
}
