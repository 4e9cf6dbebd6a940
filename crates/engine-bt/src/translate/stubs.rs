//! The fixed pieces of code through which Rust enters and leaves translations.
//!
//! Register use in translated code: rax-rdi and r8-r12 are the guest's own;
//! r15 is the guest's rsp; r13 and r14 are scratch; the guest's r13-r15 live in
//! the state block. GS and rsp are the state block; the stubs, which are called, go by
//! GS. Below it is a stack for them.

use std::mem::offset_of;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::state::block::{TLB_ENTRIES, TlbEntry, stack_offset, tlb_offset};
use crate::state::{CpuState, StackPage};

/// Why translated code was left; in [`CpuState::exit_kind`].
pub mod exit_kind {
    /// A direct branch that is not linked yet: `site` is the link.
    pub const LINK: u32 = 1;
    /// An indirect branch that missed: `address` is the guest target.
    pub const BRANCH: u32 = 2;
    /// The instruction at `site` is for the interpreter.
    pub const INTERPRET: u32 = 3;
    /// A memory access missed and cannot hit: `address` is a host address in
    /// the block, which tells the instruction. It is for the interpreter.
    pub const SLOW: u32 = 4;
    /// A signal at host address `scratch[2]`: likewise.
    pub const SIGNAL: u32 = 5;
    /// The request flag was seen; `site` tells the instruction to go on at.
    pub const REQUEST: u32 = 6;
    /// The request flag was seen at an indirect branch to `address`.
    pub const REQUEST_BRANCH: u32 = 7;
    /// `site` is an access to a port.
    pub const PORT: u32 = 8;
    /// The block at `site` was not begun: it would count beyond the limit.
    pub const LIMIT: u32 = 9;
}

/// Addresses of the stubs.
#[derive(Clone, Copy, Default)]
pub struct Stubs {
    /// `extern "sysv64" fn(code)`: runs translated code for the guest's RIP, from an
    /// entry for indirect branches, until it leaves.
    pub enter: u64,
    pub leave_link: u64,
    pub leave_branch: u64,
    pub leave_interpret: u64,
    pub leave_request: u64,
    pub leave_request_branch: u64,
    pub leave_port: u64,
    pub leave_limit: u64,
    /// Leaves as an access does that cannot hit: called, for its address.
    pub leave_slow: u64,
    /// Where the signal handler continues.
    pub leave_signal: u64,
    /// Fill the TLB for the access whose index is in r13 and whose offset from
    /// the tag is in r14. Indexed by user * 2 + write.
    pub fill: [u64; 4],
    /// The same with the linear address in r14.
    pub fill_address: [u64; 4],
    /// An access through rsp that is not in the stack page, with its offset from
    /// that page in r14 and 4096 less its size in r13. Returns with the host
    /// address in r14.
    pub stack: [u64; 4],
    /// Called for the guest's TSC, where it goes by the machine's journal. Returns with it in r14.
    pub tsc: u64,
}

const fn gpr(index: usize) -> usize {
    offset_of!(CpuState, gpr) + index * 8
}

fn at(offset: usize) -> AsmMemoryOperand {
    qword_ptr(offset as i32 as i64 as u64).gs()
}

fn at32(offset: usize) -> AsmMemoryOperand {
    dword_ptr(offset as u64).gs()
}

/// Host registers that hold guest registers, with the guest's number.
const LIVE: [(AsmRegister64, usize); 13] = [
    (rax, 0),
    (rcx, 1),
    (rdx, 2),
    (rbx, 3),
    (r15, 4),
    (rbp, 5),
    (rsi, 6),
    (rdi, 7),
    (r8, 8),
    (r9, 9),
    (r10, 10),
    (r11, 11),
    (r12, 12),
];

const XMM: [AsmRegisterXmm; 16] = [
    xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14,
    xmm15,
];
const YMM: [AsmRegisterYmm; 16] = [
    ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14,
    ymm15,
];

fn store_vectors(a: &mut CodeAssembler, avx: bool) -> Result<(), IcedError> {
    for index in 0..16 {
        let offset = (offset_of!(CpuState, vec) + index * 32) as u64;
        if avx {
            a.vmovdqu(ymmword_ptr(offset).gs(), YMM[index])?;
        } else {
            a.movups(xmmword_ptr(offset).gs(), XMM[index])?;
        }
    }
    if avx {
        // Rust code is compiled for SSE: dirty upper halves would slow it down.
        a.vzeroupper()?;
    }
    Ok(())
}

/// Loads the vector registers; their upper halves only where they are in use.
/// Clobbers the flags. They are clean on entry ([`store_vectors`]).
fn load_vectors(a: &mut CodeAssembler, avx: bool) -> Result<(), IcedError> {
    let mut done = a.create_label();
    let mut upper = a.create_label();
    if avx {
        a.cmp(at32(offset_of!(CpuState, upper_halves)), 0)?;
        a.jne(upper)?;
    }
    for (index, register) in XMM.iter().enumerate() {
        let offset = (offset_of!(CpuState, vec) + index * 32) as u64;
        a.movups(*register, xmmword_ptr(offset).gs())?;
    }
    if avx {
        a.jmp(done)?;
        a.set_label(&mut upper)?;
        for (index, register) in YMM.iter().enumerate() {
            let offset = (offset_of!(CpuState, vec) + index * 32) as u64;
            a.vmovdqu(*register, ymmword_ptr(offset).gs())?;
        }
        a.set_label(&mut done)?;
    }
    a.zero_bytes()
}

/// What translated code calls in Rust.
#[derive(Clone, Copy)]
pub struct Calls {
    /// At a TLB miss. Returns whether the access can be tried again.
    pub fill: Fill,
    /// For the guest's TSC.
    pub tsc: extern "sysv64" fn(cpu: u64) -> u64,
}

pub type Fill = extern "sysv64" fn(cpu: u64, linear: u64, write: u64) -> u64;

/// The tag and the host page of the TLB entry whose offset is in r13.
fn tag(user: bool, write: bool) -> AsmMemoryOperand {
    qword_ptr(r13 + tlb_offset(user, write) as i32).gs()
}

fn host_page(user: bool, write: bool) -> AsmMemoryOperand {
    qword_ptr(r13 + (tlb_offset(user, write) + offset_of!(TlbEntry, host)) as i32).gs()
}

/// A TLB miss for the linear address in r14. Leaves ZF set if the access cannot hit.
/// Clobbers r13 and r14.
fn call_fill(a: &mut CodeAssembler, avx: bool, fill: Fill, write: bool) -> Result<(), IcedError> {
    call_rust(a, avx, fill as usize as u64, write)?;
    a.test(r14, r14)
}

/// Calls a function of [`Calls`] with r14 as its second argument: the caller-saved guest
/// registers and the vectors are put aside. Its result comes in r14. Clobbers r13 and the flags.
fn call_rust(
    a: &mut CodeAssembler,
    avx: bool,
    function: u64,
    write: bool,
) -> Result<(), IcedError> {
    let caller_saved = [0, 1, 2, 6, 7, 8, 9, 10, 11];
    for (host, guest) in LIVE {
        if caller_saved.contains(&guest) {
            a.mov(at(gpr(guest)), host)?;
        }
    }
    store_vectors(a, avx)?;
    a.stmxcsr(at32(offset_of!(CpuState, mxcsr)))?;
    a.ldmxcsr(at32(offset_of!(CpuState, host_mxcsr)))?;
    a.mov(at(offset_of!(CpuState, scratch) + 8), rsp)?;
    a.mov(rsp, at(offset_of!(CpuState, host_rsp)))?;
    a.mov(rdi, at(offset_of!(CpuState, cpu)))?;
    a.mov(rsi, r14)?;
    a.mov(edx, write as u32)?;
    a.mov(rax, function)?;
    a.call(rax)?;
    a.mov(r14, rax)?;
    a.mov(rsp, at(offset_of!(CpuState, scratch) + 8))?;
    a.ldmxcsr(at32(offset_of!(CpuState, mxcsr)))?;
    load_vectors(a, avx)?;
    for (host, guest) in LIVE {
        if caller_saved.contains(&guest) {
            a.mov(host, at(gpr(guest)))?;
        }
    }
    Ok(())
}

/// See [`Stubs::tsc`].
fn tsc(a: &mut CodeAssembler, avx: bool, calls: &Calls) -> Result<CodeLabel, IcedError> {
    let label = here(a)?;
    a.pop(r13)?;
    a.mov(at(offset_of!(CpuState, address)), r13)?;
    call_rust(a, avx, calls.tsc as usize as u64, false)?;
    a.jmp(at(offset_of!(CpuState, address)))?;
    Ok(label)
}

/// See [`Stubs::stack`]. The page becomes the stack page if it may be written.
fn stack_miss(
    a: &mut CodeAssembler,
    avx: bool,
    fill: Fill,
    (user, write): (bool, bool),
    failed: CodeLabel,
) -> Result<(), IcedError> {
    let entry = stack_offset(user);
    let page = at(entry + offset_of!(StackPage, page));
    let host = at(entry + offset_of!(StackPage, host));
    let limit = at(offset_of!(CpuState, stack_limit));
    let linear = at(offset_of!(CpuState, scratch) + 24);
    let offset = at(offset_of!(CpuState, scratch));
    let back = at(offset_of!(CpuState, address));

    a.mov(limit, r13)?;
    a.pop(r13)?;
    a.mov(back, r13)?;
    a.add(r14, page)?;
    a.mov(linear, r14)?;
    let mut retry = a.create_label();
    a.set_label(&mut retry)?;
    a.mov(r13, r14)?;
    a.shr(r13, 8)?;
    a.and(r13d, ((TLB_ENTRIES - 1) << 4) as i32)?;
    a.sub(r14, tag(user, true))?;
    a.cmp(r14, limit)?;
    let mut not_writable = a.create_label();
    a.ja(not_writable)?;
    a.mov(offset, r14)?;
    a.mov(r14, tag(user, true))?;
    a.mov(page, r14)?;
    a.mov(r14, host_page(user, true))?;
    a.mov(host, r14)?;
    a.add(r14, offset)?;
    a.jmp(back)?;
    a.set_label(&mut not_writable)?;
    a.mov(r14, linear)?;
    if !write {
        let mut miss = a.create_label();
        a.sub(r14, tag(user, false))?;
        a.cmp(r14, limit)?;
        a.ja(miss)?;
        a.add(r14, host_page(user, false))?;
        a.jmp(back)?;
        a.set_label(&mut miss)?;
        a.mov(r14, linear)?;
    }
    call_fill(a, avx, fill, write)?;
    a.jz(failed)?;
    a.mov(r14, linear)?;
    a.jmp(retry)
}

/// The host's registers that a call keeps, as [`Stubs::enter`] pushes them.
const CALLEE_SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

/// A label for what is assembled next.
fn here(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    Ok(label)
}

/// See [`Stubs::enter`].
fn enter(a: &mut CodeAssembler, avx: bool) -> Result<CodeLabel, IcedError> {
    let label = here(a)?;
    for register in CALLEE_SAVED {
        a.push(register)?;
    }
    a.sub(rsp, 8)?;
    a.mov(at(offset_of!(CpuState, host_rsp)), rsp)?;
    a.mov(at(offset_of!(CpuState, scratch)), rdi)?;
    a.ldmxcsr(at32(offset_of!(CpuState, mxcsr)))?;
    if avx {
        a.vzeroupper()?;
    }
    load_vectors(a, avx)?;
    for (host, guest) in LIVE {
        a.mov(host, at(gpr(guest)))?;
    }
    // As behind an indirect branch.
    a.mov(r13, at(offset_of!(CpuState, rip)))?;
    a.mov(rsp, at(offset_of!(CpuState, code_rsp)))?;
    a.jmp(at(offset_of!(CpuState, scratch)))?;
    Ok(label)
}

/// Every way out ends here, with the kind stored.
fn leave(a: &mut CodeAssembler, avx: bool) -> Result<CodeLabel, IcedError> {
    let label = here(a)?;
    for (host, guest) in LIVE {
        a.mov(at(gpr(guest)), host)?;
    }
    a.mov(rsp, at(offset_of!(CpuState, host_rsp)))?;
    a.pushfq()?;
    a.pop(rax)?;
    a.mov(at(offset_of!(CpuState, exit_flags)), rax)?;
    store_vectors(a, avx)?;
    a.stmxcsr(at32(offset_of!(CpuState, mxcsr)))?;
    a.ldmxcsr(at32(offset_of!(CpuState, host_mxcsr)))?;
    a.add(rsp, 8)?;
    for register in CALLEE_SAVED.iter().rev() {
        a.pop(*register)?;
    }
    a.ret()?;
    Ok(label)
}

/// A way out of one kind, which goes on to `leave`. Those by a branch have its target
/// in r13.
fn leave_for(a: &mut CodeAssembler, kind: u32, leave: CodeLabel) -> Result<CodeLabel, IcedError> {
    let label = here(a)?;
    a.mov(at32(offset_of!(CpuState, exit_kind)), kind as i32)?;
    if kind == exit_kind::BRANCH || kind == exit_kind::REQUEST_BRANCH {
        a.mov(at(offset_of!(CpuState, address)), r13)?;
    }
    a.jmp(leave)?;
    Ok(label)
}

/// See [`Stubs::leave_slow`].
fn leave_slow(a: &mut CodeAssembler, leave: CodeLabel) -> Result<CodeLabel, IcedError> {
    let label = here(a)?;
    a.pop(r13)?;
    a.mov(at(offset_of!(CpuState, address)), r13)?;
    a.mov(at32(offset_of!(CpuState, exit_kind)), exit_kind::SLOW as i32)?;
    a.jmp(leave)?;
    Ok(label)
}

/// The stubs for accesses of one kind that miss.
struct Misses {
    /// See [`Stubs::fill`], [`Stubs::fill_address`] and [`Stubs::stack`].
    fill: CodeLabel,
    fill_address: CodeLabel,
    stack: CodeLabel,
}

fn misses(
    a: &mut CodeAssembler,
    avx: bool,
    to_rust: Fill,
    (user, write): (bool, bool),
    leave: CodeLabel,
) -> Result<Misses, IcedError> {
    let fill = here(a)?;
    a.add(r14, tag(user, write))?;
    let fill_address = here(a)?;
    // The return address goes where SLOW exits tell their place.
    a.pop(r13)?;
    a.mov(at(offset_of!(CpuState, address)), r13)?;
    call_fill(a, avx, to_rust, write)?;
    let mut failed = a.create_label();
    a.jz(failed)?;
    a.jmp(at(offset_of!(CpuState, address)))?;

    let stack = here(a)?;
    stack_miss(a, avx, to_rust, (user, write), failed)?;

    a.set_label(&mut failed)?;
    a.mov(at32(offset_of!(CpuState, exit_kind)), exit_kind::SLOW as i32)?;
    a.jmp(leave)?;
    Ok(Misses { fill, fill_address, stack })
}

/// Assembles the stubs for address `base`. Returns their bytes and addresses.
pub fn assemble(base: u64, avx: bool, calls: &Calls) -> Result<(Vec<u8>, Stubs), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let enter = enter(&mut a, avx)?;
    let leave = leave(&mut a, avx)?;
    let link = leave_for(&mut a, exit_kind::LINK, leave)?;
    let branch = leave_for(&mut a, exit_kind::BRANCH, leave)?;
    let interpret = leave_for(&mut a, exit_kind::INTERPRET, leave)?;
    let request = leave_for(&mut a, exit_kind::REQUEST, leave)?;
    let request_branch = leave_for(&mut a, exit_kind::REQUEST_BRANCH, leave)?;
    let signal = leave_for(&mut a, exit_kind::SIGNAL, leave)?;
    let port = leave_for(&mut a, exit_kind::PORT, leave)?;
    let limit = leave_for(&mut a, exit_kind::LIMIT, leave)?;
    let slow = leave_slow(&mut a, leave)?;
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    let mut missed = Vec::with_capacity(kinds.len());
    for kind in kinds {
        missed.push(misses(&mut a, avx, calls.fill, kind, leave)?);
    }
    let tsc = tsc(&mut a, avx, calls)?;

    let done =
        a.assemble_options(base, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let address = |label: CodeLabel| done.label_ip(&label);
    let mut stubs = Stubs {
        enter: address(enter)?,
        leave_link: address(link)?,
        leave_branch: address(branch)?,
        leave_interpret: address(interpret)?,
        leave_request: address(request)?,
        leave_request_branch: address(request_branch)?,
        leave_port: address(port)?,
        leave_limit: address(limit)?,
        leave_slow: address(slow)?,
        leave_signal: address(signal)?,
        tsc: address(tsc)?,
        ..Stubs::default()
    };
    for (index, missed) in missed.iter().enumerate() {
        stubs.fill[index] = address(missed.fill)?;
        stubs.fill_address[index] = address(missed.fill_address)?;
        stubs.stack[index] = address(missed.stack)?;
    }
    Ok((done.inner.code_buffer, stubs))
}
