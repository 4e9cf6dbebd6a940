//! The threads that are there already: each takes upon itself what the main one does, in the
//! handler of a signal, as the C library has all threads change their user (nptl(7)).

use std::collections::HashSet;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A thread that blocks all signals for so long is none of ours.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the handler calls.
static TAKE: OnceLock<fn() -> bool> = OnceLock::new();
static DONE: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);
/// Threads that have lists of their own.
static ENTERED: Mutex<Option<HashSet<i32>>> = Mutex::new(None);

pub(crate) fn entered() {
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    ENTERED.lock().get_or_insert_default().insert(own);
}

/// Has each other thread that has not entered call `take`, which may allocate nothing and take no
/// lock: it runs in a signal's handler.
pub(crate) fn all(take: fn() -> bool) -> io::Result<()> {
    let _ = TAKE.set(take);
    // Above those of the C library, beside those of the engines.
    let signal = libc::SIGRTMAX() - 1;
    // SAFETY: an action of zeroes is a valid one; handler and flags are set.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: it is an action of ours, and what it names a handler.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    signal_each(signal)
}

fn signal_each(signal: libc::c_int) -> io::Result<()> {
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    let process = std::process::id() as libc::pid_t;
    let mut seen = HashSet::from([own]);
    loop {
        seen.extend(ENTERED.lock().iter().flatten());
        let mut asked = Vec::new();
        for entry in std::fs::read_dir("/proc/self/task")? {
            let name = entry?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            if seen.insert(thread) {
                asked.push(thread);
            }
        }
        if asked.is_empty() {
            return Ok(());
        }
        DONE.store(0, Ordering::Release);
        let mut sent = 0;
        for thread in &asked {
            // SAFETY: the call takes numbers alone.
            sent += u32::from(
                unsafe { libc::syscall(libc::SYS_tgkill, process, *thread, signal) } == 0,
            );
        }
        let end = Instant::now() + PATIENCE;
        while DONE.load(Ordering::Acquire) < sent {
            std::thread::sleep(Duration::from_micros(200));
            let gone =
                |thread: &i32| !std::path::Path::new(&format!("/proc/self/task/{thread}")).exists();
            let ended = asked.iter().filter(|thread| gone(thread)).count() as u32;
            if ended > 0 && DONE.load(Ordering::Acquire) + ended >= sent {
                break;
            }
            if Instant::now() > end {
                return Err(io::Error::other("a thread does not take signals"));
            }
        }
        if FAILED.load(Ordering::Acquire) > 0 {
            return Err(io::Error::other("a thread cannot be confined"));
        }
    }
}

extern "C" fn handler(_: libc::c_int) {
    // SAFETY: errno is this thread's; the code that was interrupted finds it as it was.
    let errno = unsafe { *libc::__errno_location() };
    if TAKE.get().is_some_and(|take| !take()) {
        FAILED.fetch_add(1, Ordering::AcqRel);
    }
    DONE.fetch_add(1, Ordering::AcqRel);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}
