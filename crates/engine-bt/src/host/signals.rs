//! Host exceptions raised by guest instructions.
//!
//! Guest instructions that run natively can fault on the host: an unmasked SIMD
//! or x87 exception and a division error arrive as SIGFPE, an instruction that
//! this CPU lacks as SIGILL, a stray access as SIGSEGV or SIGBUS. The handler
//! does nothing but send the thread to the landing place that belongs to the
//! faulting code, which ends that code as if it had returned. Everything else
//! goes to whoever handled the signal before.

use std::cell::OnceCell;
use std::mem::{MaybeUninit, offset_of};
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::cpu::state::CpuState;
use crate::interp::thunk;

const SIGNALS: [i32; 4] = [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS];

/// A range of translated code and where a fault in it goes on. The landing finds
/// the address of the faulting instruction in `scratch[2]` and what [`cause`]
/// reads in `scratch[3]`.
struct CodeRange {
    /// 0: the slot is free. 1: it is being filled.
    start: AtomicUsize,
    end: AtomicUsize,
    landing: AtomicUsize,
}

/// One for each VM of the process.
static CODE_RANGES: [CodeRange; 256] = [const {
    CodeRange { start: AtomicUsize::new(0), end: AtomicUsize::new(0), landing: AtomicUsize::new(0) }
}; 256];

/// Registers translated code. Returns the slot to give back, or `None` when the
/// process has too many.
pub fn add_code(start: u64, end: u64, landing: u64) -> Option<usize> {
    let free = |range: &CodeRange| {
        range.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    let slot = CODE_RANGES.iter().position(free)?;
    CODE_RANGES[slot].end.store(end as usize, Ordering::Relaxed);
    CODE_RANGES[slot].landing.store(landing as usize, Ordering::Relaxed);
    CODE_RANGES[slot].start.store(start as usize, Ordering::Release);
    Some(slot)
}

pub fn remove_code(slot: usize) {
    CODE_RANGES[slot].end.store(0, Ordering::Relaxed);
    CODE_RANGES[slot].start.store(0, Ordering::Release);
}

fn code_landing(rip: usize) -> Option<usize> {
    CODE_RANGES.iter().find_map(|range| {
        let start = range.start.load(Ordering::Acquire);
        (start > 1 && rip >= start && rip < range.end.load(Ordering::Relaxed))
            .then(|| range.landing.load(Ordering::Relaxed))
    })
}

static PREVIOUS: [AtomicPtr<libc::sigaction>; 4] = [const { AtomicPtr::new(null_mut()) }; 4];

/// What the handler knew of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    pub signal: i32,
    /// The exception vector that the host CPU raised.
    pub vector: u8,
}

/// Reads what the handler left in `scratch[3]`.
pub fn cause(st: &CpuState) -> Cause {
    Cause { signal: st.scratch[3] as i32, vector: (st.scratch[3] >> 32) as u8 }
}

/// Installs the handlers of this process, once.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
            // SAFETY: zero is a valid sigaction; the calls get valid pointers,
            // and the handler below is safe to run at any instruction. What was
            // there before is stored before the new handler can need it.
            unsafe {
                let mut old: libc::sigaction = MaybeUninit::zeroed().assume_init();
                if libc::sigaction(signal, std::ptr::null(), &mut old) != 0 {
                    continue;
                }
                previous.store(Box::into_raw(Box::new(old)), Ordering::Release);
                let mut new: libc::sigaction = MaybeUninit::zeroed().assume_init();
                new.sa_sigaction = handler as *const () as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigemptyset(&mut new.sa_mask);
                libc::sigaction(signal, &new, null_mut());
            }
        }
    });
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext that lives as long as the handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    let vector = registers[libc::REG_TRAPNO as usize] as u64;
    let landing = if thunk::thunk_range_contains(rip) {
        thunk::fault_exit()
    } else if let Some(landing) = code_landing(rip) {
        landing
    } else {
        chain(signal, info, context);
        return;
    };
    let cause = vector << 32 | u64::from(signal as u32);
    // SAFETY: in both ranges GS is the base of a CpuState of this thread, and
    // the kernel does not change it for a handler.
    unsafe {
        std::arch::asm!(
            "mov gs:[{rip_at}], {rip}",
            "mov gs:[{cause_at}], {cause}",
            rip_at = const offset_of!(CpuState, scratch) + 16,
            cause_at = const offset_of!(CpuState, scratch) + 24,
            rip = in(reg) rip,
            cause = in(reg) cause,
            options(nostack, preserves_flags),
        );
    }
    registers[libc::REG_RIP as usize] = landing as i64;
}

/// Does what would have happened without us.
fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS
        .iter()
        .position(|&ours| ours == signal)
        .map_or(null_mut(), |index| PREVIOUS[index].load(Ordering::Acquire));
    // SAFETY: the pointer is null or a sigaction that is never freed; its handler
    // has the signature that its flags name.
    unsafe {
        let target = previous.as_ref().map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
        if target == libc::SIG_DFL || target == libc::SIG_IGN {
            // The instruction faults again and the default action ends the process.
            let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &default, null_mut());
        } else if (*previous).sa_flags & libc::SA_SIGINFO != 0 {
            type Action = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            std::mem::transmute::<usize, Action>(target)(signal, info, context);
        } else {
            std::mem::transmute::<usize, extern "C" fn(i32)>(target)(signal);
        }
    }
}

/// The signal stack of a thread.
struct AltStack {
    base: *mut libc::c_void,
    len: usize,
}

impl Drop for AltStack {
    fn drop(&mut self) {
        // SAFETY: zero is a valid stack_t. The stack is switched off, if it is
        // still the thread's, before its memory goes.
        unsafe {
            let mut now: libc::stack_t = MaybeUninit::zeroed().assume_init();
            libc::sigaltstack(std::ptr::null(), &mut now);
            if now.ss_sp == self.base {
                now.ss_flags = libc::SS_DISABLE;
                libc::sigaltstack(&now, null_mut());
            }
            libc::munmap(self.base, self.len);
        }
    }
}

/// Gives the calling thread a signal stack, unless it has one: translated code
/// runs on a small stack that cannot hold a signal frame.
pub fn thread_init() {
    const LEN: usize = 128 * 1024;
    thread_local! {
        static STACK: OnceCell<Option<AltStack>> = const { OnceCell::new() };
    }
    STACK.with(|cell| {
        cell.get_or_init(|| {
            // SAFETY: plain system calls with valid pointers; the new stack lives
            // until the thread ends.
            unsafe {
                let mut now: libc::stack_t = MaybeUninit::zeroed().assume_init();
                libc::sigaltstack(std::ptr::null(), &mut now);
                if now.ss_flags & libc::SS_DISABLE == 0 {
                    return None;
                }
                let base = libc::mmap(
                    null_mut(),
                    LEN,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
                    -1,
                    0,
                );
                if base == libc::MAP_FAILED {
                    return None;
                }
                let stack = AltStack { base, len: LEN };
                let new = libc::stack_t { ss_sp: base, ss_flags: 0, ss_size: LEN };
                libc::sigaltstack(&new, null_mut());
                Some(stack)
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_faults_keep_their_meaning() {
        install();
        // SAFETY: the child does nothing but fault; it has a copy of this thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: raises #UD and nothing else.
            unsafe { std::arch::asm!("ud2", options(noreturn)) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert!(libc::WIFSIGNALED(status));
        assert_eq!(libc::WTERMSIG(status), libc::SIGILL);
    }
}
