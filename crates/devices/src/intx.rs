//! INTx#: a PCI function's interrupt line (PCI Local Bus 3.0, 6.2.2 to 6.2.4).

use parking_lot::Mutex;

use crate::Drive;

#[derive(Default)]
struct State {
    /// What the device wants.
    level: bool,
    /// Interrupt Disable of the command register.
    disabled: bool,
    /// The wire of the slot; none while the function is in none.
    wire: Option<Drive>,
    driven: bool,
}

/// The line from a device to its slot's wire, and the switch between them.
///
/// Lock: `state`, under which the wire is driven, so that levels come in their order.
#[derive(Default)]
pub struct Intx {
    state: Mutex<State>,
}

impl Intx {
    /// From any thread.
    pub fn set(&self, level: bool) {
        self.change(|state| state.level = level);
    }

    pub fn set_disabled(&self, disabled: bool) {
        self.change(|state| state.disabled = disabled);
    }

    /// Puts the function into a slot, or takes it out of one.
    pub fn connect(&self, wire: Option<Drive>) {
        self.change(|state| {
            if let (Some(old), true) = (&state.wire, state.driven) {
                old(false);
            }
            state.driven = false;
            state.wire = wire;
        });
    }

    /// Interrupt Status of the status register: also while the line is disabled.
    pub fn level(&self) -> bool {
        self.state.lock().level
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        let wanted = state.level && !state.disabled;
        if let Some(wire) = state.wire.as_ref().filter(|_| state.driven != wanted) {
            wire(wanted);
            state.driven = wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn wire_is_high_while_the_device_wants_it_and_nobody_forbids() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let line = Intx::default();
        line.set(true);
        line.connect(Some(Box::new(move |level| log.lock().push(level))));
        assert_eq!(*seen.lock(), [true], "as it was before it was plugged");
        line.set_disabled(true);
        assert!(line.level());
        line.set(false);
        line.set_disabled(false);
        line.set(true);
        line.connect(None);
        line.set(false);
        assert_eq!(*seen.lock(), [true, false, true, false]);
    }
}
