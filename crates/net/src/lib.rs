//! Networks: what a network card's front end needs of whatever is behind it.
//!
//! A front end takes frames out of a guest and sends them through a [`NetBackend`], and
//! the other way. Back ends are a tap device of the host ([`Tap`]), passt or another
//! program at a stream socket ([`StreamPeer`]), and other machines ([`Joined`]). A wrapper
//! is a back end around another: a [`Capture`] for Wireshark, a [`Shaper`], a [`Filter`].
//! This crate knows no network card and no Python.

mod backend;
mod capture;
mod checksum;
mod counters;
mod filter;
mod frame;
mod headers;
mod joined;
mod layers;
mod offload;
mod plain;
mod segment;
mod shaper;
mod stream;
mod stream_peer;
mod switch;
mod tap;
#[cfg(test)]
mod testing;
mod watch;

pub use backend::{Interest, NetBackend, Sent};
pub use capture::{Capture, CaptureFile};
pub use checksum::{complete, of as internet_checksum, verify};
pub use counters::{Counters, Direction, DropReason};
pub use filter::{Filter, Judge};
pub use frame::{Frame, MAX_FRAME, MIN_FRAME, Packet, Payload};
pub use headers::{Contents, prepare_tcp};
pub use joined::Joined;
pub use layers::{Flow, Layers};
pub use offload::{Checksum, Family, HEADER, MalformedHeader, Offload, Offloads, Segments};
pub use shaper::{Shape, Shaper};
pub use stream_peer::StreamPeer;
pub use tap::Tap;
