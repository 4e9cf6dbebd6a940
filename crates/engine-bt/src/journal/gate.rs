//! A vCPU that stands while devices work on memory and lines.

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct State {
    runs: bool,
    /// Who waits for it to stand, and who works meanwhile.
    waiting: u32,
    working: u32,
}

/// Between one vCPU, which runs, and others, of whom any number work while it stands.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// The vCPU runs from now on, once nobody works.
    pub fn enter(&self) {
        let mut state = self.state.lock();
        while state.waiting + state.working > 0 {
            self.changed.wait(&mut state);
        }
        state.runs = true;
    }

    pub fn leave(&self) {
        let mut state = self.state.lock();
        state.runs = false;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until the vCPU stands; `ring` has it come to its run loop.
    pub fn stop(&self, ring: impl FnOnce()) {
        let mut state = self.state.lock();
        state.waiting += 1;
        if state.runs {
            ring();
        }
        while state.runs {
            self.changed.wait(&mut state);
        }
        state.waiting -= 1;
        state.working += 1;
    }

    pub fn go_on(&self) {
        let mut state = self.state.lock();
        state.working -= 1;
        if state.working + state.waiting == 0 {
            self.changed.notify_all();
        }
    }

    /// Whether somebody wants the vCPU to stand.
    pub fn is_wanted(&self) -> bool {
        self.state.lock().waiting > 0
    }

    pub fn runs(&self) -> bool {
        self.state.lock().runs
    }
}
