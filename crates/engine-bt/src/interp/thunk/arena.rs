//! Executable memory for thunks, and the way into them and out.
//!
//! A thunk is one guest instruction and a jump to the exit below. All thunks of
//! the process lie in one range, so that the signal handler knows them by their
//! address; inside it each thread has a slab of its own and needs no lock.

use std::arch::global_asm;
use std::cell::Cell;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::cpu::fpu;
use crate::host::code_memory::CodeMemory;
use crate::host::signals;
use crate::state::{CpuState, flag};

const SLAB_BYTES: usize = 64 * 1024;
const SLABS: usize = 1024;
const ARENA_BYTES: usize = SLAB_BYTES * SLABS;
/// An instruction (15 bytes), JMP [RIP+0] (6) and the address of the exit (8).
const THUNK_BYTES: usize = 32;

struct Arena {
    memory: CodeMemory,
    /// Slabs that nobody has.
    free: Mutex<Vec<usize>>,
}

fn arena() -> Option<&'static Arena> {
    static ARENA: OnceLock<Option<Arena>> = OnceLock::new();
    ARENA
        .get_or_init(|| {
            let memory = CodeMemory::new("tetrarch-thunks", ARENA_BYTES).ok()?;
            let start = memory.run_address(0);
            signals::add_code(start, start + ARENA_BYTES as u64, fault_exit() as u64)?;
            Some(Arena { memory, free: Mutex::new((0..SLABS).rev().collect()) })
        })
        .as_ref()
}

/// Makes the memory and tells the signal handler of it, once a process. Called before
/// VMs take the places that the handler has for their code.
pub fn prepare() {
    arena();
}

/// The thunk memory of one thread.
pub struct Slab {
    index: usize,
    used: usize,
    /// Memory is being used again: stale bytes may have been fetched from it.
    reused: bool,
}

impl Slab {
    pub fn new() -> Option<Self> {
        let index = arena()?.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Self { index, used: 0, reused: true })
    }

    /// The address of a new thunk for `instruction`; `None` when the slab is full.
    pub fn add(&mut self, instruction: &[u8]) -> Option<usize> {
        let arena = arena()?;
        if self.used + THUNK_BYTES > SLAB_BYTES || instruction.len() > 15 {
            return None;
        }
        let offset = self.index * SLAB_BYTES + self.used;
        self.used += THUNK_BYTES;
        let mut bytes = [0; THUNK_BYTES];
        let end = instruction.len();
        bytes[..end].copy_from_slice(instruction);
        bytes[end..end + 6].copy_from_slice(&[0xFF, 0x25, 0, 0, 0, 0]);
        bytes[end + 6..end + 14].copy_from_slice(&exit().to_le_bytes());
        // SAFETY: these bytes lie in the slab that is this one's.
        unsafe { arena.memory.write_own(offset, &bytes) };
        if self.reused {
            // Code changed under another linear address needs a serializing
            // instruction (Intel SDM 3A, 8.1.3).
            tetrarch_engine::cpuid::host(0, 0);
        }
        Some(arena.memory.run_address(offset) as usize)
    }

    /// Forgets all thunks.
    pub fn clear(&mut self) {
        self.used = 0;
        self.reused = true;
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Some(arena) = arena() {
            arena.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        }
    }
}

unsafe extern "C" {
    fn tetrarch_native_enter_avx(thunk: usize, state: *mut u8) -> u64;
    fn tetrarch_native_exit_avx();
    fn tetrarch_native_fault_avx();
    fn tetrarch_native_enter_sse(thunk: usize, state: *mut u8) -> u64;
    fn tetrarch_native_exit_sse();
    fn tetrarch_native_fault_sse();
}

fn exit() -> usize {
    let avx = tetrarch_native_exit_avx as *const () as usize;
    let sse = tetrarch_native_exit_sse as *const () as usize;
    if fpu::host_avx() { avx } else { sse }
}

/// Where a thread goes on after a fault in a thunk.
fn fault_exit() -> usize {
    let avx = tetrarch_native_fault_avx as *const () as usize;
    let sse = tetrarch_native_fault_sse as *const () as usize;
    if fpu::host_avx() { avx } else { sse }
}

// Guest instructions in thunks never touch RSP, so the host's stays in place,
// also after a fault. On a fault the arithmetic flags are left as they were.
macro_rules! trampoline {
    ($suffix:literal, $load:literal, $store:literal, $clean:literal) => {
        global_asm!(
            ".pushsection .text.tetrarch_native, \"ax\", @progbits",
            ".p2align 4",
            concat!(".globl tetrarch_native_enter_", $suffix),
            concat!(".hidden tetrarch_native_enter_", $suffix),
            concat!("tetrarch_native_enter_", $suffix, ":"),
            "push rbx",
            "push rbp",
            "push r12",
            "push r13",
            "push r14",
            "push r15",
            "mov qword ptr gs:[{scratch}], rdi",
            "stmxcsr dword ptr gs:[{host_mxcsr}]",
            "ldmxcsr dword ptr gs:[{mxcsr}]",
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            $load,
            ".endr",
            "mov rax, qword ptr gs:[{flags}]",
            "and eax, {arith}",
            "push rax",
            "popfq",
            "mov rax, qword ptr gs:[{gpr} + 0]",
            "mov rcx, qword ptr gs:[{gpr} + 8]",
            "mov rdx, qword ptr gs:[{gpr} + 16]",
            "mov rbx, qword ptr gs:[{gpr} + 24]",
            "mov rbp, qword ptr gs:[{gpr} + 40]",
            "mov rsi, qword ptr gs:[{gpr} + 48]",
            "mov rdi, qword ptr gs:[{gpr} + 56]",
            ".irp n,8,9,10,11,12,13,14,15",
            "mov r\\n, qword ptr gs:[{gpr} + 8 * \\n]",
            ".endr",
            "jmp qword ptr gs:[{scratch}]",
            concat!(".globl tetrarch_native_exit_", $suffix),
            concat!(".hidden tetrarch_native_exit_", $suffix),
            concat!("tetrarch_native_exit_", $suffix, ":"),
            "mov qword ptr gs:[{gpr} + 0], rax",
            "pushfq",
            "pop rax",
            "mov qword ptr gs:[{scratch} + 8], rax",
            "mov eax, 0",
            "jmp 2f",
            concat!(".globl tetrarch_native_fault_", $suffix),
            concat!(".hidden tetrarch_native_fault_", $suffix),
            concat!("tetrarch_native_fault_", $suffix, ":"),
            "mov qword ptr gs:[{gpr} + 0], rax",
            "mov eax, 1",
            "2:",
            "mov qword ptr gs:[{gpr} + 8], rcx",
            "mov qword ptr gs:[{gpr} + 16], rdx",
            "mov qword ptr gs:[{gpr} + 24], rbx",
            "mov qword ptr gs:[{gpr} + 40], rbp",
            "mov qword ptr gs:[{gpr} + 48], rsi",
            "mov qword ptr gs:[{gpr} + 56], rdi",
            ".irp n,8,9,10,11,12,13,14,15",
            "mov qword ptr gs:[{gpr} + 8 * \\n], r\\n",
            ".endr",
            ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            $store,
            ".endr",
            "stmxcsr dword ptr gs:[{mxcsr}]",
            "ldmxcsr dword ptr gs:[{host_mxcsr}]",
            $clean,
            "pop r15",
            "pop r14",
            "pop r13",
            "pop r12",
            "pop rbp",
            "pop rbx",
            "ret",
            ".popsection",
            scratch = const offset_of!(CpuState, scratch),
            host_mxcsr = const offset_of!(CpuState, host_mxcsr),
            mxcsr = const offset_of!(CpuState, mxcsr),
            vec = const offset_of!(CpuState, vec),
            flags = const offset_of!(CpuState, flags),
            gpr = const offset_of!(CpuState, gpr),
            arith = const flag::ARITH as i32,
        );
    };
}

trampoline!(
    "avx",
    "vmovups ymm\\n, ymmword ptr gs:[{vec} + 32 * \\n]",
    "vmovups ymmword ptr gs:[{vec} + 32 * \\n], ymm\\n",
    // Rust code is compiled for SSE: dirty upper halves would slow it down.
    "vzeroupper"
);
trampoline!(
    "sse",
    "movups xmm\\n, xmmword ptr gs:[{vec} + 32 * \\n]",
    "movups xmmword ptr gs:[{vec} + 32 * \\n], xmm\\n",
    ""
);

thread_local! {
    /// What GS holds in this thread, if we have set it.
    static GS_BASE: Cell<usize> = const { Cell::new(0) };
}

/// Sets the host's GS base of this thread.
///
/// # Safety
/// Nothing else in the thread may rely on GS (on x86-64 Linux, nothing does).
pub unsafe fn set_gs_base(base: *mut u8) {
    /// The kernel lets user code write segment bases (Linux 5.9).
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    const ARCH_SET_GS: i32 = 0x1001;
    // SAFETY: reads the auxiliary vector; the base is what the caller wants.
    unsafe {
        if libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 {
            std::arch::asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags));
        } else {
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base);
        }
    }
    GS_BASE.set(base as usize);
}

/// Runs a thunk on the state. False: it ended in a host exception, which
/// [`crate::host::signals::cause`] names.
///
/// # Safety
/// `thunk` must come from [`Slab::add`] of this thread since its last
/// [`Slab::clear`], for an instruction that only touches general registers but
/// RSP, vector and x87 registers, flags, and [`CpuState::bounce`] through GS.
pub unsafe fn run(st: &mut CpuState, thunk: usize) -> bool {
    let base = (&raw mut *st).cast::<u8>();
    if GS_BASE.get() != base as usize {
        // SAFETY: GS belongs to the engine.
        unsafe { set_gs_base(base) };
    }
    // SAFETY: the trampolines keep the host's callee-saved registers and MXCSR;
    // vector registers are caller-saved in the C ABI. They reach the state by GS;
    // the pointer is passed so that the compiler knows.
    let status = unsafe {
        if fpu::host_avx() {
            tetrarch_native_enter_avx(thunk, base)
        } else {
            tetrarch_native_enter_sse(thunk, base)
        }
    };
    if status == 0 {
        st.update_flags(flag::ARITH, st.scratch[1]);
    }
    status == 0
}
