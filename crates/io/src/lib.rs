//! I/O threads: where the data paths of devices run, beside the vCPUs.
//!
//! A thread waits for descriptors (doorbells, completions, sockets) and calls who has
//! asked for them. This crate knows no device, no guest memory and no Python.

mod event;
mod output;
mod thread;

pub use event::Event;
pub use output::Output;
pub use thread::{Around, Attachment, Handler, IoThread, PauseError, Trigger};
