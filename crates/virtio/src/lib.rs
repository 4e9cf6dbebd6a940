//! Virtio devices (OASIS virtio 1.2): their queues and data paths. What a driver negotiates
//! and configures is above, in Python; back ends are below.

pub mod balloon;
pub mod blk;
pub mod console;
mod device;
mod doorbells;
mod isr;
mod lent;
mod net;
pub mod queue;
mod queues;
mod rng;
pub mod vhost_user;
mod vsock;

pub use balloon::Balloon;
pub use blk::Blk;
pub use console::Console;
pub use device::{Control, DataPath, Device, OWN_SOURCES, QueueSetup, StartError};
pub use doorbells::Doorbells;
pub use isr::IsrStatus;
pub use lent::{Lender, Lent, LentChain};
pub use net::{MAX_PAIRS, MacAddress, Net, NetConfig, NetState};
pub use queues::Queues;
pub use rng::Rng;
pub use vsock::Vsock;
