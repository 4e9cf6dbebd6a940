//! Where a driver notifies: registers that signal the events of queues.

use std::sync::Arc;

use tetrarch_bus::{Device, DeviceError};
use tetrarch_io::Event;

/// The notification registers of a device. A vCPU that writes one goes on at once; reads
/// give 0.
pub struct Doorbells {
    events: Vec<Arc<Event>>,
    /// Bytes between the registers of two queues (4.1.4.4); 0: one register for all, which
    /// takes the number of the queue (4.2.2, QueueNotify).
    stride: u64,
}

impl Doorbells {
    pub fn new(events: &[Arc<Event>], stride: u64) -> Self {
        Self { events: events.to_vec(), stride }
    }
}

impl Device for Doorbells {
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, offset: u64, _size: u8, value: u64) -> Result<(), DeviceError> {
        // The low half is the queue; the rest is for drivers that say where they are.
        let index = offset.checked_div(self.stride).unwrap_or(value & 0xFFFF);
        if let Some(event) = usize::try_from(index).ok().and_then(|index| self.events.get(index)) {
            event.signal();
        }
        Ok(())
    }
}
