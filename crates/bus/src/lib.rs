//! From an exit to the device that answers it: regions, dispatch, the run loop.
//!
//! This crate knows the engine contract and the trait [`Device`]; it knows no
//! particular engine, no particular device and no Python.

mod access;
mod bus;
mod control;
mod counters;
mod debugger;
mod device;
mod dispatch;
mod doorbell;
mod engine_counters;
mod interrupt;
mod irq;
mod platform;
mod run;
mod space;
mod table;
mod tsc;

pub use access::Access;
pub use bus::{Answer, Bus};
pub use control::{HoldError, RunControl, VcpuControl};
pub use counters::{LoopCounters, LoopStats};
pub use debugger::Debugger;
pub use device::{Device, DeviceError, DeviceKind, Handler};
pub use dispatch::{RunEnd, Step, dispatch};
pub use doorbell::DeviceDoorbell;
pub use engine_counters::EngineCounters;
pub use interrupt::Interrupt;
pub use irq::{IrqLines, IrqSource};
pub use platform::{Answered, NoHandlers, PlatformHandlers, PortAccess};
pub use run::{RunError, run_vcpu};
pub use space::{AttachError, Region, Sizes, Span};
pub use tsc::TscScale;
