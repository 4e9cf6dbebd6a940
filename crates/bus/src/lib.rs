//! From an exit to the device that answers it: ranges, dispatch, the run loop.
//!
//! This crate knows the engine contract and the trait [`Device`]; it knows no
//! particular engine, no particular device and no Python.

mod bus;
mod control;
mod counters;
mod device;
mod dispatch;
mod platform;
mod ranges;
mod run;
mod tsc;

pub use bus::{Answer, Bus};
pub use control::{RunControl, Seat};
pub use counters::{LoopCounters, LoopStats};
pub use device::{Device, DeviceError, DeviceKind, Handler};
pub use dispatch::{Step, StopReason, dispatch};
pub use platform::{Answered, NoHandlers, PlatformHandlers, PortAccess};
pub use ranges::AttachError;
pub use run::{RunError, run_vcpu};
pub use tsc::TscScale;
