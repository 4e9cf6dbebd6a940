//! What a device is to the bus.

use std::error::Error;
use std::fmt;

use crate::DeviceDoorbell;

/// What can be attached to a port or memory range.
///
/// `offset` counts from the start of the range; `size` is 1, 2, 4 or 8 bytes
/// and the access lies wholly in the range. vCPUs call concurrently.
pub trait Device: Send + Sync {
    /// Bits of the result over `size` are ignored.
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError>;
    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError>;

    /// Registers where a write only signals an event. The engine does that for as long as
    /// the region is mapped there, without an exit; what comes to `write` nevertheless
    /// must do the same. Asked once, when the device is attached.
    fn doorbells(&self) -> Vec<DeviceDoorbell> {
        Vec::new()
    }

    /// In what the device is written, for the statistics.
    fn kind(&self) -> DeviceKind {
        DeviceKind::Native
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Native,
    Python,
}

/// Who answered an access. Ordered by cost: an access split between several
/// counts for the dearest of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Handler {
    /// No device: reads give all ones, writes are lost.
    Nobody,
    Native,
    Python,
}

impl From<DeviceKind> for Handler {
    fn from(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Native => Self::Native,
            DeviceKind::Python => Self::Python,
        }
    }
}

/// A device gave up. The cause is opaque here: whoever runs the vCPU gets it
/// back from the run loop as the device made it.
pub struct DeviceError {
    cause: Box<dyn Error + Send + Sync>,
}

impl DeviceError {
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { cause: cause.into() }
    }

    pub fn into_cause(self) -> Box<dyn Error + Send + Sync> {
        self.cause
    }
}

impl fmt::Debug for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceError").field(&self.cause).finish()
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a device failed: {}", self.cause)
    }
}

impl Error for DeviceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.cause)
    }
}
