//! Where vCPUs tell a debugger why they stopped.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tetrarch_engine::{DebugStop, GuestFault, Reply, Vcpu};
use tetrarch_memory::GuestPhys;

/// #BP.
const BREAKPOINT: GuestFault = GuestFault { vector: 3, error: None, address: 0 };

/// One machine's debugger as its vCPUs see it.
#[derive(Default)]
pub struct Debugger {
    /// Where it has planted an INT3. All others are the guest's own.
    planted: RwLock<HashSet<GuestPhys>>,
    /// By vCPU, in their order of time.
    stops: Mutex<Vec<(usize, DebugStop)>>,
    alert: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
}

impl Debugger {
    /// `alert` is called on a vCPU's thread when it has stopped, and is not to wait.
    pub fn set_alert(&self, alert: Option<Arc<dyn Fn() + Send + Sync>>) {
        *self.alert.lock() = alert;
    }

    pub fn set_planted(&self, planted: HashSet<GuestPhys>) {
        *self.planted.write() = planted;
    }

    /// What was told since it was asked last, to be asked while the machine is held: those
    /// vCPUs stay where they are until they are thawed.
    pub fn take_stops(&self) -> Vec<(usize, DebugStop)> {
        std::mem::take(&mut self.stops.lock())
    }

    /// Whether the stop is the guest's own matter.
    pub(crate) fn is_foreign(&self, stop: DebugStop, vcpu: &mut dyn Vcpu) -> bool {
        let DebugStop::Software { linear } = stop else { return false };
        let place = vcpu.translate(linear);
        !place.is_some_and(|place| self.planted.read().contains(&place))
    }

    pub(crate) fn tell(&self, vcpu: usize, stop: DebugStop) {
        self.stops.lock().push((vcpu, stop));
        let alert = self.alert.lock().clone();
        if let Some(alert) = alert {
            alert();
        }
    }

    pub(crate) fn answer(foreign: bool) -> Reply {
        if foreign { Reply::Fault(BREAKPOINT) } else { Reply::Done }
    }
}
