//! A machine without devices: memory, engine, vCPUs, bus, interrupt lines.
//!
//! What a program in any language needs to run a guest, and knows none. It is
//! the only crate that knows which engines there are.

mod dump;
mod error;
mod hold;
mod limits;
mod machine;
mod memory;
mod registers;
mod reset;
mod slot;
mod stats;
mod stolen;
mod written;

pub use dump::dump;
pub use error::MachineError;
pub use hold::NotHeld;
pub use machine::{Machine, Processors, engine_available};
pub use registers::{BadRegisters, State};
pub use reset::ResetState;
pub use slot::VcpuSlot;
pub use stats::{Stats, collect};
pub use stolen::StolenTime;
pub use tetrarch_engine_bt::MAX_VCPUS as BT_MAX_VCPUS;
pub use tetrarch_engine_bt::Recording;
