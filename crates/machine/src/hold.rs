//! Holding a machine: its vCPUs between two instructions, its clock standing, nothing
//! in flight in its I/O thread. In this order, and let go in the other.

use std::time::Duration;

use tetrarch_bus::{Access, HoldError};
use tetrarch_engine::Vcpu;
use tetrarch_io::PauseError;

use crate::{Machine, VcpuSlot};

/// How long the use of a vCPU waits for the machine to come to rest.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a machine could not be held, with the device named that is in the way.
#[derive(Debug)]
pub struct NotHeld {
    pub error: HoldError,
    pub device: Option<String>,
}

impl NotHeld {
    pub fn mend(&self) -> String {
        match (&self.error, &self.device) {
            (HoldError::OwnThread { .. } | HoldError::OwnIoThread, _) => {
                "a device is called in the middle of an instruction: use another thread".into()
            }
            (HoldError::Device { .. }, Some(device)) => {
                format!("let {device} return from its access")
            }
            (HoldError::Device { .. } | HoldError::Late { .. } | HoldError::BackEnd { .. }, _) => {
                "wait longer".into()
            }
            (HoldError::NotHeld, _) => "call hold() first, once for each resume()".into(),
            (HoldError::Clock(_), _) => "the machine runs on".into(),
        }
    }
}

impl From<HoldError> for NotHeld {
    fn from(error: HoldError) -> Self {
        Self { error, device: None }
    }
}

/// A hold of a machine, for as long as it lives.
struct Held<'a>(&'a Machine);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Fails only where the host does not take back a clock of its own, which
        // no caller could mend.
        let _ = self.0.resume();
    }
}

impl Machine {
    /// As [`tetrarch_bus::RunControl::hold`]; to be called by who holds no lock
    /// that a device may want.
    pub fn hold(&self, timeout: Duration) -> Result<(), NotHeld> {
        self.control.hold(timeout).map_err(|error| {
            let device = match &error {
                HoldError::Device { access: Access::Platform, .. } => None,
                HoldError::Device { access, .. } => self.bus.owner(*access),
                _ => None,
            };
            NotHeld { error, device }
        })?;
        self.io.pause(timeout).map_err(|error| {
            // Why it is not held is told already.
            let _ = self.control.resume();
            NotHeld::from(match error {
                PauseError::Late { handler: device, waited } => {
                    HoldError::BackEnd { device, waited }
                }
                PauseError::OwnThread => HoldError::OwnIoThread,
            })
        })
    }

    pub fn resume(&self) -> Result<(), NotHeld> {
        if !self.control.is_held() {
            return Err(HoldError::NotHeld.into());
        }
        self.io.resume();
        Ok(self.control.resume()?)
    }

    /// Calls `body` while the machine is held.
    pub fn held<T>(&self, body: impl FnOnce() -> T) -> Result<T, NotHeld> {
        self.hold(PATIENCE)?;
        let _held = Held(self);
        Ok(body())
    }

    /// Uses a vCPU between two of its instructions, wherever it is.
    pub fn with_vcpu<T>(
        &self,
        slot: &VcpuSlot,
        body: impl FnOnce(&mut dyn Vcpu) -> T,
    ) -> Result<T, NotHeld> {
        self.held(|| slot.with(body))
    }
}
