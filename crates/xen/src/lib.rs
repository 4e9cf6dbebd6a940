//! Xen's interface as far as a guest calls it per event, per tick or per I/O request: event
//! channels, their upcalls, the clock in memory and one-shot timers (Xen, xen/include/public).
//!
//! What a guest calls once comes from above, through [`Domain`]; the rest is in
//! [`Domain::hypercall`].

mod channels;
mod domain;
pub mod errno;
mod hypercall;
mod layout;
mod timers;

pub use channels::{Channel, Channels, PORTS, Port, VIRQS, virq};
pub use domain::{Domain, Saved, SavedVcpu};
pub use hypercall::number;
