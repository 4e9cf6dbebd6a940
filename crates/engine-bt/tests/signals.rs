//! Host signals that guest instructions raise, in a process that handles them
//! too. A file of its own: dispositions are the process's.

mod support;

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::case::Fault;
use support::guest::{BASE, End, Guest, KERNEL_CODE, on_both};

static CALLS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn counts(_: i32) {
    CALLS.fetch_add(1, Ordering::Relaxed);
}

fn handle(signal: i32) {
    // SAFETY: zero is a valid sigaction, and the handler takes the number.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = counts as *const () as usize;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// Divides by zero: the host CPU raises #DE on behalf of the guest.
fn divide(guest: &mut Guest) -> End {
    guest.write(KERNEL_CODE, &[0x31, 0xC9, 0xF7, 0xF1]); // xor ecx, ecx ; div ecx
    guest.start(true, BASE + KERNEL_CODE, [0; 16], 2);
    guest.run()
}

const DE: End = End::Fault(Fault { vector: 0, error: 0, cr2: 0 });

/// One test: a guest of another thread would fault between a new handler and the
/// next look.
#[test]
fn guests_fault_whatever_the_process_does_with_the_signals() {
    blocked_signals_do_not_end_the_process();
    handlers_of_others_are_kept_and_not_called();
}

fn handlers_of_others_are_kept_and_not_called() {
    on_both(|guest, engine| {
        assert_eq!(divide(guest), DE, "{engine}");
        // Handlers that come later, as of a library that is loaded now.
        for signal in [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS] {
            handle(signal);
        }
        // A look is taken every millisecond or so; wait until one is due.
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        assert_eq!(divide(guest), DE, "{engine}");
        assert_eq!(CALLS.load(Ordering::Relaxed), 0, "{engine}");
        // Signals of others still reach it, also in a thread that runs guests.
        // SAFETY: signals this thread.
        unsafe { libc::raise(libc::SIGFPE) };
        assert_eq!(CALLS.swap(0, Ordering::Relaxed), 1, "{engine}");
        assert_eq!(divide(guest), DE, "{engine}");
    });
}

fn blocked_signals_do_not_end_the_process() {
    let thread = std::thread::spawn(|| {
        // SAFETY: plain calls with valid pointers.
        unsafe {
            let mut mask: libc::sigset_t = MaybeUninit::zeroed().assume_init();
            libc::sigfillset(&mut mask);
            libc::pthread_sigmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut());
        }
        on_both(|guest, engine| assert_eq!(divide(guest), DE, "{engine}"));
    });
    thread.join().unwrap();
}
