//! Ends guests that run for ever, and finds an engine that does.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tetrarch_engine::Kick;

/// A kicked vCPU that has not come back after this long hangs.
const HANG: Duration = Duration::from_secs(20);

struct Armed {
    kick_at: Instant,
    kicked: Option<Instant>,
    kicker: Arc<dyn Kick>,
}

static ARMED: Mutex<Option<Armed>> = Mutex::new(None);

fn armed() -> MutexGuard<'static, Option<Armed>> {
    ARMED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(1));
        let Some(armed) = &mut *armed() else { continue };
        let now = Instant::now();
        match armed.kicked {
            None if now >= armed.kick_at => {
                armed.kicked = Some(now);
                armed.kicker.kick();
            }
            Some(since) if now - since > HANG => {
                eprintln!("the vCPU does not answer a kick: it hangs");
                std::process::abort();
            }
            _ => {}
        }
    }
}

/// Kicks a vCPU when its time is over, unless dropped before.
pub struct Watchdog(MutexGuard<'static, ()>);

impl Watchdog {
    /// One at a time: tests of one process take turns.
    pub fn new(kicker: Arc<dyn Kick>, limit: Duration) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static THREAD: OnceLock<()> = OnceLock::new();
        THREAD.get_or_init(|| drop(std::thread::spawn(watch)));
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        *armed() = Some(Armed { kick_at: Instant::now() + limit, kicked: None, kicker });
        Self(turn)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *armed() = None;
    }
}
