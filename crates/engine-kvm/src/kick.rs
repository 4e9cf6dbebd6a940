//! Making KVM_RUN return, from any thread, so that no kick is lost.
//!
//! A signal alone loses the race against a thread that is just about to enter
//! KVM_RUN; `kvm_run.immediate_exit` alone is only looked at on the way in. So
//! a kick does both, in this order: note the kick, set `immediate_exit`, send
//! the signal (api.rst, 4.10, and "immediate_exit" in 5). The vCPU clears
//! `immediate_exit` before it looks at the note: whatever comes in between is
//! seen by one of the two.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

use parking_lot::Mutex;
use tetrarch_engine::Kick;

/// Late in the range of real-time signals, next to that of engine `bt`.
fn signal_number() -> i32 {
    libc::SIGRTMAX() - 4
}

extern "C" fn handler(_signal: i32) {}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SA_RESTART spares the devices' system calls; KVM_RUN does not restart.
        // SAFETY: zero is a valid sigaction, and the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal_number(), &action, null_mut());
        }
    });
}

/// The calling thread's id, as the kernel counts.
pub fn thread_id() -> i32 {
    thread_local! {
        // SAFETY: gettid has no effects.
        static ID: i32 = unsafe { libc::gettid() };
    }
    ID.with(|id| *id)
}

/// The byte `immediate_exit` of a vCPU's mapped `kvm_run`.
struct Target(*const AtomicU8);

// SAFETY: the pointer is to memory shared with the kernel, used atomically, and
// only under the lock that also guards its end.
unsafe impl Send for Target {}

pub struct Kicker {
    kicked: AtomicBool,
    /// Somebody inside the engine wants the vCPU to look at itself.
    check: AtomicBool,
    /// The thread that last ran the vCPU; 0: none yet.
    thread: AtomicI32,
    target: Mutex<Option<Target>>,
}

impl Kicker {
    /// # Safety
    /// `immediate_exit` must be valid until [`Kicker::detach`].
    pub unsafe fn new(immediate_exit: *const AtomicU8) -> Self {
        install();
        Self {
            kicked: AtomicBool::new(false),
            check: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            target: Mutex::new(Some(Target(immediate_exit))),
        }
    }

    /// The vCPU goes away; later kicks have no effect.
    pub fn detach(&self) {
        *self.target.lock() = None;
    }

    /// The calling thread is the one to signal from now on.
    #[inline]
    pub fn here(&self) {
        let thread = thread_id();
        if self.thread.load(Ordering::Relaxed) != thread {
            self.thread.store(thread, Ordering::SeqCst);
        }
    }

    pub fn thread(&self) -> i32 {
        self.thread.load(Ordering::Relaxed)
    }

    #[inline]
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    #[inline]
    pub fn take(&self) -> bool {
        self.kicked.load(Ordering::SeqCst) && self.kicked.swap(false, Ordering::SeqCst)
    }

    pub fn take_check(&self) -> bool {
        self.check.load(Ordering::SeqCst) && self.check.swap(false, Ordering::SeqCst)
    }

    pub fn request_check(&self) {
        self.check.store(true, Ordering::SeqCst);
        self.interrupt();
    }

    fn interrupt(&self) {
        let target = self.target.lock();
        let Some(Target(immediate_exit)) = &*target else { return };
        // SAFETY: valid until `detach`, which takes the same lock.
        unsafe { (**immediate_exit).store(1, Ordering::SeqCst) };
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // A thread that is gone, or another of this process under the same
            // number, at most runs a handler that does nothing.
            // SAFETY: sending a signal whose handler is installed.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal_number()) };
        }
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.interrupt();
    }
}
