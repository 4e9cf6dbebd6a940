//! VMCI, VMware's communication interface (Linux, include/linux/vmw_vmci_defs.h and
//! drivers/misc/vmw_vmci): datagrams between a guest and its hypervisor, doorbells, queue pairs in
//! the guest's memory, and the vSockets that go over them (net/vmw_vsock/vmci_transport.c).
//!
//! The guest asks the hypervisor by a datagram, whose answer is a number. What comes to the guest
//! is a datagram that waits until it is fetched, or a flag in a page of the guest's, which its
//! doorbell is linked to. A queue pair is two rings of bytes with a head and a tail each; that
//! something is in them is told by datagrams again. The other end of all is the host: guests do
//! not reach each other.

mod controller;
mod core;
mod hypervisor;
mod inbox;
mod interrupts;
mod layout;
mod pairs;
mod registers;
mod saved;
mod sockets;

pub use controller::Vmci;
pub use interrupts::Interrupts;
pub use registers::Registers;
pub use saved::{DamagedState, Saved};
pub use sockets::Sockets;

/// Interrupts of the function: datagrams, flags of doorbells, a transfer that has ended.
pub const VECTORS: usize = 3;
