//! Networks: what a network card asks of one, and the host's sockets and taps behind it.
//!
//! A front end (virtio-net, e1000) knows frames and what was left to do of them; it sends
//! and receives by a [`NetBackend`], on one I/O thread, without a lock. Sockets and taps
//! are behind the trait, and so are capture, shaping and filters, each a back end around
//! another.

mod backend;
mod capture;
mod filter;
mod flow;
mod shaper;
mod stream;
mod tap;
#[cfg(test)]
mod testing;

pub use backend::{Counts, Frame, MAX_FRAME, NetBackend, Offload, Offloads, SendError};
pub use capture::Capture;
pub use filter::{Filter, Verdict};
pub use flow::Flow;
pub use shaper::{Shaper, Shaping};
pub use stream::Stream;
pub use tap::Tap;
