//! Doorbells: asked before a write leaves for the machine.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tetrarch_engine::{Doorbell, Doorbells, EngineError, Exit, Platform};
use tetrarch_memory::GuestMemory;

/// The doorbells of one VM. A vCPU looks them up without a lock, in the list of the
/// moment, which a change replaces.
///
/// Lock: `changing`, then nothing.
#[derive(Default)]
pub struct DoorbellTable {
    /// Spares the exits of a machine without doorbells a look at the list.
    any: AtomicBool,
    list: ArcSwap<Doorbells>,
    changing: Mutex<()>,
}

impl DoorbellTable {
    pub fn add(
        &self,
        doorbell: Doorbell,
        event: BorrowedFd<'_>,
        memory: &GuestMemory,
        platform: &Platform,
    ) -> Result<(), EngineError> {
        self.change(|list| list.add(doorbell, event, memory, platform).map(drop))
    }

    pub fn remove(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        self.change(|list| list.remove(doorbell).map(drop))
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Doorbells) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let _guard = self.changing.lock();
        let mut list = Doorbells::clone(&self.list.load());
        change(&mut list)?;
        let any = !list.is_empty();
        self.list.store(Arc::new(list));
        self.any.store(any, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the exit is a write that rings a doorbell, which it has then done.
    #[inline]
    pub fn rang(&self, exit: &Exit) -> bool {
        self.any.load(Ordering::Relaxed) && self.ring(exit)
    }

    #[cold]
    fn ring(&self, exit: &Exit) -> bool {
        let list = self.list.load();
        let Some(event) = list.find(exit) else { return false };
        // Fails only where the count is at its highest, and then it is signalled.
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        true
    }
}
