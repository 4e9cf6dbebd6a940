//! How long a thread waited for a processor while it was ready to run, as the host's scheduler tells
//! in /proc (Linux, Documentation/scheduler/sched-stats.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// Of this thread: time on a CPU, time ready, slices; in ns.
const SCHEDSTAT: &str = "/proc/thread-self/schedstat";

/// The statistics of a thread, which any thread can read.
pub struct Waited(File);

impl Waited {
    /// Those of the caller, which may open no files later; None where the host tells nothing.
    pub fn of_this_thread() -> Option<Self> {
        File::open(SCHEDSTAT).ok().map(Self)
    }

    /// Whether the host tells at all: not without CONFIG_SCHED_INFO, and not in every sandbox.
    pub fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| Self::of_this_thread().is_some_and(|own| own.ns().is_some()))
    }

    /// Since the thread began.
    pub fn ns(&self) -> Option<u64> {
        let mut text = [0; 80];
        let len = self.0.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(&text[..len]).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
    }
}
