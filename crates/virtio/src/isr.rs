//! The interrupt status of a transport without messages (4.1.4.5, 4.2.2).

use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::Interrupt;

/// A status bit for each reason, and a line that is high while one is set.
///
/// Lock: the status, under which the line is driven, so that levels come in their order.
pub struct IsrStatus {
    status: Mutex<u32>,
    drive: Drive,
}

/// Takes the level of the interrupt line to the machine; must not call into devices.
pub type Drive = Box<dyn Fn(bool) + Send + Sync>;

impl IsrStatus {
    pub const QUEUE: u32 = 1 << 0;
    pub const CONFIG: u32 = 1 << 1;

    pub fn new(drive: Drive) -> Self {
        Self { status: Mutex::new(0), drive }
    }

    pub fn get(&self) -> u32 {
        *self.status.lock()
    }

    /// Sets the bits of all reasons, as from a saved state.
    pub fn set(&self, bits: u32) {
        self.change(|_| bits & (Self::QUEUE | Self::CONFIG));
    }

    pub fn raise(&self, bits: u32) {
        self.change(|status| status | bits);
    }

    /// Clears bits; gives what was set before.
    pub fn acknowledge(&self, bits: u32) -> u32 {
        self.change(|status| status & !bits)
    }

    fn change(&self, change: impl FnOnce(u32) -> u32) -> u32 {
        let mut status = self.status.lock();
        let before = *status;
        *status = change(before);
        if (before != 0) != (*status != 0) {
            (self.drive)(*status != 0);
        }
        before
    }

    /// An interrupt that sets a bit.
    pub fn interrupt(self: &Arc<Self>, bit: u32) -> Arc<dyn Interrupt> {
        Arc::new(Reason(Arc::clone(self), bit))
    }
}

struct Reason(Arc<IsrStatus>, u32);

impl Interrupt for Reason {
    fn raise(&self) {
        self.0.raise(self.1);
    }
}
