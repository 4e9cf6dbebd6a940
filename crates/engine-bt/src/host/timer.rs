//! The host timer that interrupts translated code when a guest timer is due.
//!
//! A POSIX timer sends a signal to the vCPU's own thread; its handler raises
//! the request flag, which translated code polls. That costs no thread and no
//! wake-up of another CPU. The handler finds the flag through a table of slots,
//! so that a signal that arrives late cannot touch memory that is gone.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::state::Shared;
use crate::state::block::SharedFlags;

const SLOTS: usize = 4096;
static FLAGS: [AtomicPtr<Shared>; SLOTS] = [const { AtomicPtr::new(null_mut()) }; SLOTS];

/// Late in the range of real-time signals, where libraries rarely look.
fn signal_number() -> i32 {
    libc::SIGRTMAX() - 3
}

extern "C" fn handler(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; timers set its value.
    let slot = unsafe { (*info).si_value().sival_ptr } as usize;
    if let Some(cell) = FLAGS.get(slot) {
        let flags = cell.load(Ordering::Acquire);
        // SAFETY: a slot is emptied before its block goes, by the thread that
        // this signal is directed to or after that thread has left `run`.
        if let Some(flags) = unsafe { flags.as_ref() } {
            flags.raise();
        }
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: zero is a valid sigaction, and the handler only stores to atomics.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal_number(), &action, null_mut());
        }
    });
}

/// A number that no other thread of the process has had: asked at every exit of the
/// guest, where a system call would be felt.
fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

/// One vCPU's timer; bound to the thread that made it.
pub struct HostTimer {
    timer: libc::timer_t,
    slot: usize,
    thread: u64,
    armed: Option<u64>,
    /// The slot points into it.
    _flags: SharedFlags,
}

// SAFETY: a timer id is a plain number of this process.
unsafe impl Send for HostTimer {}

impl HostTimer {
    pub fn new(flags: &SharedFlags) -> std::io::Result<Self> {
        install();
        let shared = (&raw const **flags).cast_mut();
        let free = |cell: &AtomicPtr<Shared>| {
            cell.compare_exchange(null_mut(), shared, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = FLAGS
            .iter()
            .position(free)
            .ok_or_else(|| std::io::Error::other("too many vCPUs in one process"))?;
        // SAFETY: gettid has no effects.
        let thread = unsafe { libc::gettid() };
        let mut timer = null_mut();
        // SAFETY: zero is a valid sigevent; both pointers are to locals.
        let result = unsafe {
            let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal_number();
            event.sigev_value.sival_ptr = slot as *mut libc::c_void;
            event.sigev_notify_thread_id = thread;
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer)
        };
        if result != 0 {
            FLAGS[slot].store(null_mut(), Ordering::Release);
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { timer, slot, thread: this_thread(), armed: None, _flags: flags.clone() })
    }

    /// Whether the timer signals the calling thread.
    pub fn is_here(&self) -> bool {
        self.thread == this_thread()
    }

    /// Arms the timer for machine time `deadline`, or disarms it.
    pub fn arm(&mut self, deadline: Option<u64>, now: impl FnOnce() -> u64) {
        if deadline == self.armed {
            return;
        }
        self.armed = deadline;
        let ns = deadline.map_or(0, |deadline| deadline.saturating_sub(now()).max(1));
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: (ns / 1_000_000_000).min(1 << 30) as libc::time_t,
                tv_nsec: (ns % 1_000_000_000) as libc::c_long,
            },
        };
        // SAFETY: the timer is ours, the pointer is to a local.
        unsafe { libc::timer_settime(self.timer, 0, &spec, null_mut()) };
    }

    /// The deadline has passed: the next one must be armed anew.
    pub fn expired(&mut self) {
        self.armed = None;
    }
}

impl Drop for HostTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and not used again.
        unsafe { libc::timer_delete(self.timer) };
        FLAGS[self.slot].store(null_mut(), Ordering::Release);
    }
}
