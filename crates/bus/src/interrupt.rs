//! What a data path raises towards the guest.

/// An interrupt that is an event: a message, or a line with a status that the driver reads.
///
/// From any thread; waits for nobody, and takes no lock of a device's.
pub trait Interrupt: Send + Sync {
    fn raise(&self);
}
