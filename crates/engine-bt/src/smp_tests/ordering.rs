//! What two vCPUs see of each other's writes (Intel SDM 3A, 9.2): litmus tests of x86-TSO,
//! which lets a load pass an older store to another place and nothing else; and LOCK,
//! wherever its operand lies.
//!
//! A thread of a litmus test leaves what it has loaded in EAX, 0 or 1. Both meet before
//! each round and after it; then vCPU 0 counts what the round has given.

use super::*;

const VARIABLES: [u64; 2] = [SHARED + 0x100, SHARED + 0x180];
const LOADED: [u64; 2] = [SHARED + 0x200, SHARED + 0x280];
/// How often a vCPU has come to the meeting point.
const MEETING: u64 = SHARED + 0x300;
/// Four counters: how often the first has loaded 1 is bit 0 of the index, the second bit 1.
const SEEN: u64 = SHARED + 0x400;

type Thread = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn interpreting() -> BtVm {
    with_identity_map(|memory| {
        let config = Config { topology: Topology::flat(2), translate: false, ..Config::default() };
        build(memory, config, Room::USUAL, None).unwrap()
    })
}

fn meet(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.add(ebp, 2)?;
    a.lock().inc(dword_ptr(MEETING))?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(MEETING), ebp)?;
    a.jl(wait)
}

/// How often the rounds of two threads have given each pair of what they loaded.
fn outcomes(vm: &BtVm, threads: [Thread; 2], rounds: i32) -> [u64; 4] {
    for id in 0..2 {
        load(vm, CODE[id], |a| {
            let [mut again, mut delay] = [(); 2].map(|()| a.create_label());
            a.mov(r12d, rounds)?;
            a.set_label(&mut again)?;
            a.mov(dword_ptr(VARIABLES[id]), 0)?;
            meet(a)?;
            // Each round meets another distance between the two.
            a.mov(ecx, r12d)?;
            a.and(ecx, if id == 0 { 7 } else { 31 })?;
            a.inc(ecx)?;
            a.set_label(&mut delay)?;
            a.dec(ecx)?;
            a.jnz(delay)?;
            threads[id](a)?;
            a.mov(dword_ptr(LOADED[id]), eax)?;
            meet(a)?;
            if id == 0 {
                a.mov(eax, dword_ptr(LOADED[1]))?;
                a.mov(ecx, dword_ptr(LOADED[0]))?;
                a.lea(eax, dword_ptr(rcx + rax * 2))?;
                a.inc(qword_ptr(SEEN + rax * 8))?;
            }
            a.dec(r12d)?;
            a.jnz(again)?;
            a.out(OK, al)
        });
    }
    run_both(vm);
    let mut seen = [0; 32];
    vm.shared.memory.read(GuestPhys(SEEN), &mut seen).unwrap();
    let seen: [u64; 4] =
        std::array::from_fn(|n| u64::from_le_bytes(seen[n * 8..][..8].try_into().unwrap()));
    assert_eq!(seen.iter().sum::<u64>(), rounds as u64);
    seen
}

/// Threads, and the pair that may not be.
const LITMUS: [(&str, [Thread; 2], usize); 5] = [
    // A load does not pass an older load, nor a store an older store.
    ("message passing", [store_both, load_both], 0b10),
    // A store does not pass an older load.
    ("load buffering", [|a| load_then_store(a, 0), |a| load_then_store(a, 1)], 0b11),
    // Nothing passes MFENCE.
    (
        "store buffering with MFENCE",
        [
            |a| store_then_load(a, 0, CodeAssembler::mfence),
            |a| store_then_load(a, 1, CodeAssembler::mfence),
        ],
        0b00,
    ),
    // Nothing passes a locked instruction.
    (
        "store buffering with LOCK",
        [|a| store_then_load(a, 0, locked), |a| store_then_load(a, 1, locked)],
        0b00,
    ),
    (
        "store buffering with XCHG",
        [|a| exchange_then_load(a, 0), |a| exchange_then_load(a, 1)],
        0b00,
    ),
];

/// 1 into both variables; loads nothing.
fn store_both(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(VARIABLES[0]), 1)?;
    a.mov(dword_ptr(VARIABLES[1]), 1)?;
    a.xor(eax, eax)
}

/// 1 if the second variable had its 1 while the first, looked at later, had not.
fn load_both(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, dword_ptr(VARIABLES[1]))?;
    a.mov(edx, dword_ptr(VARIABLES[0]))?;
    a.xor(edx, 1)?;
    a.and(eax, edx)
}

fn load_then_store(a: &mut CodeAssembler, own: usize) -> Result<(), IcedError> {
    a.mov(eax, dword_ptr(VARIABLES[1 - own]))?;
    a.mov(dword_ptr(VARIABLES[own]), 1)
}

fn store_then_load(
    a: &mut CodeAssembler,
    own: usize,
    between: fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    a.mov(dword_ptr(VARIABLES[own]), 1)?;
    between(a)?;
    a.mov(eax, dword_ptr(VARIABLES[1 - own]))
}

fn locked(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lock().or(dword_ptr(rsp - 8), 0)
}

fn exchange_then_load(a: &mut CodeAssembler, own: usize) -> Result<(), IcedError> {
    a.mov(eax, 1)?;
    a.xchg(dword_ptr(VARIABLES[own]), eax)?;
    a.mov(eax, dword_ptr(VARIABLES[1 - own]))
}

fn no_forbidden_outcome(make: fn() -> BtVm, rounds: i32) {
    for (name, threads, forbidden) in LITMUS {
        let seen = outcomes(&make(), threads, rounds);
        assert_eq!(seen[forbidden], 0, "{name}: {seen:?}");
    }
}

#[test]
fn translated_code_keeps_the_order_of_memory() {
    no_forbidden_outcome(vm, 20_000);
}

#[test]
fn interpreted_code_keeps_the_order_of_memory() {
    no_forbidden_outcome(interpreting, 2_000);
}

#[test]
#[ignore = "a million rounds of each"]
fn order_of_memory_holds_for_a_million_rounds() {
    no_forbidden_outcome(vm, 1_000_000);
}

/// Both count in one place, which is as far into a cache line or a page as is asked.
fn count_together(vm: &BtVm, at: u64, rounds: i32) {
    let place = || qword_ptr(at);
    for code in CODE {
        load(vm, code, |a| {
            let [mut again, mut compare] = [(); 2].map(|()| a.create_label());
            a.mov(r12d, rounds)?;
            meet(a)?;
            a.set_label(&mut again)?;
            a.lock().inc(place())?;
            a.mov(ecx, 1)?;
            a.lock().xadd(place(), rcx)?;
            a.mov(rax, place())?;
            a.set_label(&mut compare)?;
            a.lea(rcx, qword_ptr(rax + 1))?;
            a.lock().cmpxchg(place(), rcx)?;
            a.jne(compare)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            a.out(OK, al)
        });
    }
    run_both(vm);
    let mut found = [0; 8];
    vm.shared.memory.read(GuestPhys(at), &mut found).unwrap();
    assert_eq!(u64::from_le_bytes(found), 6 * rounds as u64, "at {at:#x}");
}

/// In a line, not aligned there, across two lines, and across two pages.
const PLACES: [u64; 4] = [SHARED + 0x800, SHARED + 0x803, SHARED + 0x83C, SHARED + 0xFFC];

#[test]
fn locked_instructions_of_two_vcpus_are_one_after_the_other() {
    for at in PLACES {
        count_together(&vm(), at, 3_000);
        count_together(&interpreting(), at, 500);
    }
}

#[test]
fn locked_instruction_across_pages_is_alone_beside_plain_writes() {
    // One adds at once to the bytes of two pages, the other writes one of them: no write is lost.
    let at = SHARED + 0xFFC;
    let vm = vm();
    load(&vm, CODE[0], |a| {
        let mut again = a.create_label();
        a.mov(r12d, 3_000)?;
        meet(a)?;
        a.set_label(&mut again)?;
        a.lock().add(qword_ptr(at), 0)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.mov(dword_ptr(LOADED[0]), 1)?;
        a.out(OK, al)
    });
    load(&vm, CODE[1], |a| {
        let [mut again, mut lost] = [(); 2].map(|()| a.create_label());
        meet(a)?;
        a.set_label(&mut again)?;
        a.inc(ebx)?;
        a.mov(dword_ptr(at + 4), ebx)?;
        a.lfence()?;
        a.mov(eax, dword_ptr(at + 4))?;
        a.cmp(eax, ebx)?;
        a.jne(lost)?;
        a.cmp(dword_ptr(LOADED[0]), 0)?;
        a.je(again)?;
        a.out(OK, al)?;
        a.set_label(&mut lost)?;
        a.out(WRONG, eax)
    });
    run_both(&vm);
}
