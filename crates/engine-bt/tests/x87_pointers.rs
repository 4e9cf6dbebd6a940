//! FOP, FIP and FDP as the host CPU stores them: code and data lie at the same
//! addresses natively and in the guest, so what is stored is the same to the byte.

mod support;

use std::time::Duration;

use iced_x86::code_asm::*;
use support::case::{CODE, Case, DATA, DATA_BYTES, Fpu, State};
use support::guest::Guest;
use support::host_cpu::HostCpu;
use support::model::PF;

const TRIES: usize = 100;

/// Where programs store: an environment of 28 bytes, images of FXSAVE64 and FXSAVE,
/// an environment of 14 bytes.
const LONG: u64 = 0x100;
const IMAGE: u64 = 0x200;
const NARROW: u64 = 0x600;
const SHORT: u64 = 0x500;
/// Where they find a double, zero, a control word with division by zero unmasked,
/// an environment and an image.
const NUMBER: u64 = 0x08;
const ZERO: u64 = 0x10;
const CONTROL: u64 = 0x18;
const SAVED: u64 = 0x40;
const SAVED_IMAGE: u64 = 0x800;

fn start() -> State {
    let mut state = State {
        rip: CODE + 0x40,
        rflags: 0x202,
        fpu: Fpu::default(),
        data: vec![0; DATA_BYTES],
        ..State::default()
    };
    state.gpr[4] = DATA + 0x1800;
    state.gpr[7] = DATA;
    let mut put = |at: u64, bytes: &[u8]| {
        state.data[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    put(NUMBER, &1.5f64.to_le_bytes());
    put(CONTROL, &0x37Bu16.to_le_bytes());
    for (word, value) in
        [0x37F, 0, 0xFFFF, 0x1234_5678, 0x0123_0000, 0x8765_4321, 0].iter().enumerate()
    {
        put(SAVED + word as u64 * 4, &u32::to_le_bytes(*value));
    }
    // Division by zero, unmasked and pending: such pointers every CPU restores.
    put(SAVED_IMAGE, &[0x7B, 3, 0x84, 0x80, 0, 0, 0x34, 1]);
    put(SAVED_IMAGE + 8, &0x1234_5678_9ABCu64.to_le_bytes());
    put(SAVED_IMAGE + 16, &0x2345_6789_ABCDu64.to_le_bytes());
    put(SAVED_IMAGE + 24, &0x1F80u32.to_le_bytes());
    state
}

type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

#[rustfmt::skip]
const PROGRAMS: &[(&str, Program)] = &[
    ("an operand in memory", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("none after one", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fld1()?; a.fnstenv(ptr(rdi + LONG)) }),
    ("with a REX prefix", |a| { a.mov(r11, rdi)?; a.fadd(qword_ptr(r11 + NUMBER))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("by RIP", |a| { a.fild(dword_ptr(DATA + NUMBER))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("a store", |a| { a.fld1()?; a.fstp(tword_ptr(rdi + ZERO))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("across pages", |a| { a.fld(tword_ptr(rdi + 0xFFC))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("control instructions do not count", |a| {
        a.fld(qword_ptr(rdi + NUMBER))?; a.fnstcw(word_ptr(rdi))?; a.fldcw(word_ptr(rdi))?; a.fnclex()?;
        a.fnstsw(ax)?; a.fnstenv(ptr(rdi + LONG))
    }),
    ("FNINIT clears them", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fninit()?; a.fnstenv(ptr(rdi + LONG)) }),
    ("FNSAVE", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fnsave(ptr(rdi + LONG))?; a.fnstenv(ptr(rdi + LONG + 0x70)) }),
    ("twice", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fnstenv(ptr(rdi + LONG + 0x70))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("a loop", |a| {
        a.mov(ecx, 20)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.fld(qword_ptr(rdi + NUMBER))?; a.fmul_2(st0, st0)?; a.fstp(st0)?; a.dec(ecx)?; a.jne(again)?;
        a.fnstenv(ptr(rdi + LONG))
    }),
    ("FNSTENV of 16 bits", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.db(&[0x66, 0xD9, 0xB7])?; a.dd(&[SHORT as u32]) }),
    ("MMX", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.paddb(mm1, qword_ptr(rdi + ZERO))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("FLDENV", |a| { a.fldenv(ptr(rdi + SAVED))?; a.fnstenv(ptr(rdi + LONG)) }),
    ("FXSAVE with an exception pending", |a| {
        a.fldcw(word_ptr(rdi + CONTROL))?; a.fld1()?; a.fdiv(qword_ptr(rdi + ZERO))?;
        a.fxsave64(ptr(rdi + IMAGE))?; a.fnstenv(ptr(rdi + LONG))
    }),
    ("FXSAVE of 32 bits", |a| {
        a.fldcw(word_ptr(rdi + CONTROL))?; a.fld1()?; a.fdiv(qword_ptr(rdi + ZERO))?; a.fxsave(ptr(rdi + NARROW))
    }),
    ("FXSAVE without one", |a| { a.fld(qword_ptr(rdi + NUMBER))?; a.fxsave64(ptr(rdi + IMAGE)) }),
    ("FXRSTOR", |a| {
        a.fxrstor64(ptr(rdi + SAVED_IMAGE))?; a.fxsave64(ptr(rdi + IMAGE))?; a.fnstenv(ptr(rdi + LONG))
    }),
    ("a waiting instruction meets the exception", |a| {
        a.fldcw(word_ptr(rdi + CONTROL))?; a.fld1()?; a.fdiv(qword_ptr(rdi + ZERO))?;
        a.fxsave64(ptr(rdi + IMAGE))?; a.fld1()
    }),
];

/// What CPUs may store in the selectors, and the mask of MXCSR.
fn without_selectors(mut data: Vec<u8>) -> Vec<u8> {
    let mut clear = |at: u64, len: usize| data[at as usize..at as usize + len].fill(0);
    for environment in [LONG, LONG + 0x70] {
        clear(environment + 16, 2);
        clear(environment + 24, 4);
    }
    clear(IMAGE + 28, 4);
    for field in [12, 20, 28] {
        clear(NARROW + field, 4);
    }
    clear(SHORT + 8, 2);
    clear(SHORT + 12, 2);
    data
}

/// What differs in memory, if anything does.
fn difference(native: &mut HostCpu, case: &Case, translate: bool) -> Option<String> {
    let host = native.run(case).expect("a result");
    assert_ne!(host.fault.vector, PF);
    let mut guest = Guest::for_cases(translate);
    guest.place(case);
    let found = guest.run_case(case).unwrap();
    assert_eq!(found.fault, host.fault, "translated: {translate}");
    let (a, b) = (without_selectors(host.state.data), without_selectors(found.state.data));
    let at = a.iter().zip(&b).position(|(a, b)| a != b)? & !15;
    let (a, b) = (&a[at..at + 32], &b[at..at + 32]);
    Some(format!("translated: {translate}, at {at:#x}:\n host  {a:02x?}\n guest {b:02x?}"))
}

#[test]
fn pointers_are_those_of_the_host() {
    let Some(mut native) = HostCpu::new() else { return };
    let mut wrong = Vec::new();
    for (name, program) in PROGRAMS {
        let mut a = CodeAssembler::new(64).unwrap();
        program(&mut a).unwrap();
        a.ud2().unwrap();
        let state = start();
        let case = Case::of_one(a.assemble(state.rip).unwrap(), state, false, 0);
        for translate in [false, true] {
            // On AMD a switch to another thread in the middle clears them, natively too; on a
            // busy host that comes often.
            let tries = (0..TRIES).map(|_| difference(&mut native, &case, translate));
            let differ: Vec<String> = tries
                .map_while(|found| found)
                .inspect(|_| std::thread::sleep(Duration::from_millis(1)))
                .collect();
            if differ.len() == TRIES {
                wrong.push(format!("{name}, {}", differ[0]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
