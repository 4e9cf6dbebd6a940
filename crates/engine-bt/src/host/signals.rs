//! Host exceptions raised by guest instructions.
//!
//! Guest instructions that run natively can fault on the host: an unmasked SIMD
//! or x87 exception and a division error arrive as SIGFPE, an instruction that
//! this CPU lacks as SIGILL, a stray access as SIGSEGV or SIGBUS. The handler
//! does nothing but send the thread to the landing place that belongs to the
//! faulting code, which ends that code as if it had returned.
//!
//! Everything else does what it would have done without us: a fault of any other
//! code, and a signal that a process has sent, which can come at any instruction.
//! The disposition is the process's, and whoever changes it later (Python's
//! faulthandler, a sanitizer) does not know of us. So each vCPU looks at it now
//! and then, puts its own handler back and chains to what it found.

use std::cell::OnceCell;
use std::mem::{MaybeUninit, offset_of};
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use crate::state::CpuState;

const SIGNALS: [i32; 4] = [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS];

/// A range of code that guests' instructions run in, and where a fault in it goes on. The landing finds
/// the address of the faulting instruction in `scratch[2]` and what [`cause`]
/// reads in `scratch[3]`.
struct CodeRange {
    /// 0: the slot is free. 1: it is being filled.
    start: AtomicUsize,
    end: AtomicUsize,
    landing: AtomicUsize,
}

/// One for each VM of the process, and one for thunks.
static CODE_RANGES: [CodeRange; 256] = [const {
    CodeRange { start: AtomicUsize::new(0), end: AtomicUsize::new(0), landing: AtomicUsize::new(0) }
}; 256];

/// Registers such code. Returns the slot to give back, or `None` when the
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

/// What each signal did before us. Never freed: a handler may be reading it.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 4] = [const { AtomicPtr::new(null_mut()) }; 4];

/// The thread that is inside the previous handler of each signal.
static CHAINING: [AtomicI32; 4] = [const { AtomicI32::new(0) }; 4];

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

/// Installs the handlers, or puts them back where another has taken their place.
pub fn install() {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
        // SAFETY: zero is a valid sigaction, and the call gets valid pointers. What
        // was there before is stored before the new handler can need it.
        unsafe {
            let mut old: libc::sigaction = MaybeUninit::zeroed().assume_init();
            let known = libc::sigaction(signal, std::ptr::null(), &mut old) == 0;
            if !known || old.sa_sigaction == handler as *const () as usize {
                continue;
            }
            previous.store(Box::into_raw(Box::new(old)), Ordering::Release);
        }
        take(signal);
    }
}

/// Makes [`handler`] the disposition of a signal.
fn take(signal: i32) {
    // SAFETY: zero is a valid sigaction, and the handler is safe to run at any
    // instruction.
    unsafe {
        let mut new: libc::sigaction = MaybeUninit::zeroed().assume_init();
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        libc::sigemptyset(&mut new.sa_mask);
        libc::sigaction(signal, &new, null_mut());
    }
}

/// [`install`], if the last look was some time before `tsc`. An exit is shorter
/// than the four system calls of a look.
pub fn look_again(tsc: u64) {
    /// About a millisecond of any CPU's TSC.
    const INTERVAL: u64 = 1 << 21;
    static LAST: AtomicU64 = AtomicU64::new(0);
    if tsc.wrapping_sub(LAST.load(Ordering::Acquire)) >= INTERVAL {
        install();
        // After it: who finds the look fresh relies on the handlers.
        LAST.store(tsc, Ordering::Release);
    }
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // What kill and its kin send has a code of 0 or below (sigaction(2)).
    // SAFETY: the kernel passes a siginfo that lives as long as the handler.
    let sent = unsafe { (*info).si_code } <= 0;
    // SAFETY: as above for the ucontext.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    let vector = registers[libc::REG_TRAPNO as usize] as u64;
    let landing = if sent { None } else { code_landing(rip) };
    let Some(landing) = landing else {
        chain(signal, sent, info, context);
        return;
    };
    let cause = vector << 32 | u64::from(signal as u32);
    // SAFETY: in these ranges GS is the base of a CpuState of this thread, and
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
fn chain(signal: i32, sent: bool, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(index) = SIGNALS.iter().position(|&ours| ours == signal) else { return };
    // SAFETY: the pointer is null or a sigaction that is never freed.
    let previous = unsafe { PREVIOUS[index].load(Ordering::Acquire).as_ref() };
    let target = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    // SAFETY: always succeeds.
    let me = unsafe { libc::gettid() };
    match previous {
        // A fault cannot be ignored; a signal can.
        _ if target == libc::SIG_IGN && sent => {}
        // A handler that raises its own signal wants the end: faulthandler, when
        // its report is written, puts back what it had found, which may be us.
        Some(previous)
            if target != libc::SIG_DFL
                && target != libc::SIG_IGN
                && CHAINING[index].load(Ordering::Relaxed) != me =>
        {
            CHAINING[index].store(me, Ordering::Relaxed);
            call(previous, signal, info, context);
            CHAINING[index].store(0, Ordering::Relaxed);
            if sent {
                take_back(index);
            }
        }
        _ => end_by(signal, sent),
    }
}

/// A handler that gives up by restoring the default counts on the fault coming
/// again. A signal that was sent does not, and the guest's next fault must not
/// find the default.
fn take_back(index: usize) {
    let signal = SIGNALS[index];
    // SAFETY: as in `end_by`.
    unsafe {
        let mut now: libc::sigaction = MaybeUninit::zeroed().assume_init();
        libc::sigaction(signal, std::ptr::null(), &mut now);
        if now.sa_sigaction == libc::SIG_DFL {
            PREVIOUS[index].store(null_mut(), Ordering::Release);
            take(signal);
        }
    }
}

/// The default action, which for these signals ends the process.
fn end_by(signal: i32, sent: bool) {
    // SAFETY: zero is a valid sigaction, and SIG_DFL a valid disposition. All
    // calls may be made in a signal handler (signal-safety(7)).
    unsafe {
        let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &default, null_mut());
        // A fault comes again by itself, where it was.
        if sent {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal);
        }
    }
}

/// Calls the previous handler as the kernel would: with its mask, once if it says
/// so.
fn call(
    previous: &libc::sigaction,
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let target = previous.sa_sigaction;
    // SAFETY: a disposition that is neither SIG_DFL nor SIG_IGN is a function
    // with the signature that its flags name. The rest is as in `end_by`.
    unsafe {
        if previous.sa_flags & libc::SA_RESETHAND != 0
            && let Some(index) = SIGNALS.iter().position(|&ours| ours == signal)
        {
            PREVIOUS[index].store(null_mut(), Ordering::Release);
        }
        let mut mask = previous.sa_mask;
        if previous.sa_flags & libc::SA_NODEFER == 0 {
            libc::sigaddset(&mut mask, signal);
        }
        let mut before: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::pthread_sigmask(libc::SIG_BLOCK, &mask, &mut before);
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            type Action = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            std::mem::transmute::<usize, Action>(target)(signal, info, context);
        } else {
            std::mem::transmute::<usize, extern "C" fn(i32)>(target)(signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, null_mut());
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

/// Makes the calling thread fit for guest instructions, when it first runs them:
/// the handlers are in place, none of the signals is blocked, and it has a signal
/// stack, since translated code runs on one too small for a signal frame.
pub fn thread_init() {
    const LEN: usize = 128 * 1024;
    thread_local! {
        static STACK: OnceCell<Option<AltStack>> = const { OnceCell::new() };
    }
    STACK.with(|cell| {
        cell.get_or_init(|| {
            install();
            unblock();
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

/// A fault whose signal is blocked ends the process.
fn unblock() {
    // SAFETY: plain calls with valid pointers.
    unsafe {
        let mut mask: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&mut mask);
        for signal in SIGNALS {
            libc::sigaddset(&mut mask, signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &mask, null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// How a child ends that does `body` and then exits with 0.
    fn child(body: impl FnOnce()) -> (bool, i32) {
        install();
        // SAFETY: the child does nothing but signals; it has a copy of this thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            body();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(child, &mut status, 0) };
        (
            libc::WIFSIGNALED(status),
            if libc::WIFSIGNALED(status) {
                libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            },
        )
    }

    fn dispose(signal: i32, target: usize, flags: i32) {
        // SAFETY: zero is a valid sigaction; the handlers below take one number.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = target;
            action.sa_flags = flags;
            libc::sigaction(signal, &action, null_mut());
        }
    }

    fn kill(signal: i32) {
        // SAFETY: sends a signal to this very process, and no other.
        unsafe { libc::kill(libc::getpid(), signal) };
    }

    fn undefined_instruction() {
        // SAFETY: raises #UD and nothing else.
        unsafe { std::arch::asm!("ud2") };
    }

    fn is_ours(signal: i32) -> bool {
        // SAFETY: reads the disposition.
        unsafe {
            let mut now: libc::sigaction = MaybeUninit::zeroed().assume_init();
            libc::sigaction(signal, std::ptr::null(), &mut now);
            now.sa_sigaction == handler as *const () as usize
        }
    }

    static CALLS: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn counts(_: i32) {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }

    /// As faulthandler: restores what it had found, which is us, and raises.
    extern "C" fn reports_and_raises(signal: i32) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: signals this thread.
        unsafe { libc::raise(signal) };
    }

    extern "C" fn exits_with_3_on_its_second_call(_: i32) {
        if CALLS.fetch_add(1, Ordering::Relaxed) > 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(3) };
        }
    }

    fn end_unless(holds: bool, code: i32) {
        if !holds {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
    }

    #[test]
    fn other_faults_keep_their_meaning() {
        assert_eq!(child(undefined_instruction), (true, libc::SIGILL));
    }

    #[test]
    fn a_signal_sent_to_a_process_that_does_not_handle_it_ends_it() {
        for signal in SIGNALS {
            let end = child(|| {
                dispose(signal, libc::SIG_DFL, 0);
                install();
                kill(signal);
            });
            assert_eq!(end, (true, signal));
        }
    }

    #[test]
    fn a_signal_that_the_process_ignored_is_ignored_and_ours_stays() {
        for signal in SIGNALS {
            let end = child(|| {
                dispose(signal, libc::SIG_IGN, 0);
                install();
                kill(signal);
                kill(signal);
                end_unless(is_ours(signal), 9);
            });
            assert_eq!(end, (false, 0), "{signal}");
        }
        // An ignored fault ends the process all the same, as the kernel has it.
        let end = child(|| {
            dispose(libc::SIGILL, libc::SIG_IGN, 0);
            install();
            undefined_instruction();
        });
        assert_eq!(end, (true, libc::SIGILL));
    }

    #[test]
    fn a_later_handler_is_found_replaced_and_called() {
        let end = child(|| {
            dispose(libc::SIGFPE, counts as *const () as usize, 0);
            end_unless(!is_ours(libc::SIGFPE), 8);
            install();
            end_unless(is_ours(libc::SIGFPE), 9);
            kill(libc::SIGFPE);
            kill(libc::SIGFPE);
            end_unless(CALLS.load(Ordering::Relaxed) == 2, 10);
        });
        assert_eq!(end, (false, 0));
    }

    #[test]
    fn a_handler_that_raises_its_signal_again_ends_the_process() {
        let raises = reports_and_raises as *const () as usize;
        let end = child(|| {
            dispose(libc::SIGILL, raises, libc::SA_NODEFER);
            install();
            undefined_instruction();
        });
        assert_eq!(end, (true, libc::SIGILL));
    }

    extern "C" fn gives_up(signal: i32) {
        dispose(signal, libc::SIG_DFL, 0);
    }

    #[test]
    fn a_handler_that_gives_up_on_a_sent_signal_does_not_take_ours_away() {
        let end = child(|| {
            dispose(libc::SIGSEGV, gives_up as *const () as usize, 0);
            install();
            kill(libc::SIGSEGV);
            end_unless(is_ours(libc::SIGSEGV), 9);
            kill(libc::SIGSEGV);
        });
        assert_eq!(end, (true, libc::SIGSEGV), "the second meets the default");
        let end = child(|| {
            dispose(libc::SIGILL, gives_up as *const () as usize, 0);
            install();
            undefined_instruction();
        });
        assert_eq!(end, (true, libc::SIGILL));
    }

    #[test]
    fn a_handler_for_one_time_is_called_once() {
        let once = exits_with_3_on_its_second_call as *const () as usize;
        let end = child(|| {
            dispose(libc::SIGBUS, once, libc::SA_RESETHAND);
            install();
            kill(libc::SIGBUS);
            kill(libc::SIGBUS);
        });
        assert_eq!(end, (true, libc::SIGBUS));
    }
}
