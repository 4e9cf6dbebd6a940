//! The contract between a network card's front end and its back end.

use std::os::fd::BorrowedFd;

use crate::{Frame, Offloads, Packet};

/// What a front end waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// There is room for a frame in the guest.
    pub receive: bool,
    /// A packet was refused as [`Sent::Busy`].
    pub send: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or was dropped and counted.
    Taken,
    /// There is no room now: to be sent again when [`NetBackend::event`] is ready.
    Busy,
}

/// The way to a network, in the hands of one thread; no call waits.
pub trait NetBackend: Send {
    /// Ready to be read when [`NetBackend::work`] is due, and after it
    /// [`NetBackend::receive`], or [`NetBackend::send`] where it was refused.
    fn event(&self) -> BorrowedFd<'_>;

    /// What the event is to be ready for; at first for frames to receive.
    fn watch(&mut self, interest: Interest);

    /// Does what is due by itself: timers, connections.
    fn work(&mut self) {}

    /// What `send` may be given beside plain frames.
    ///
    /// A front end can let its guest leave all of [`Offloads`] to the device even so: what a
    /// back end does not take is completed by itself.
    fn offloads(&self) -> Offloads;

    /// What `receive` may give from now on beside plain frames.
    fn accept(&mut self, offloads: Offloads);

    fn send(&mut self, packet: &Packet<'_>) -> Sent;

    /// Ends a batch: what was sent goes out now.
    fn flush(&mut self) {}

    /// Puts the next frame for the guest into `frame`; false: there is none.
    fn receive(&mut self, frame: &mut Frame) -> bool;

    /// Whether this queue of several is in use: the network sends nothing to others.
    fn enable(&mut self, _on: bool) {}

    /// Whether there is a network at the other end.
    fn link(&self) -> bool {
        true
    }
}
