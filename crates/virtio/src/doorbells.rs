//! Where a driver notifies: registers that signal the events of queues.

use std::sync::Arc;

use tetrarch_bus::{Device, DeviceDoorbell, DeviceError};
use tetrarch_io::Event;

/// The notification registers of a device. A vCPU that writes one goes on at once, where
/// the engine has it without an exit; reads give 0.
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

    fn doorbells(&self) -> Vec<DeviceDoorbell> {
        let doorbell = |(index, event): (u64, &Arc<Event>)| {
            let event = Arc::clone(event) as _;
            match self.stride {
                0 => DeviceDoorbell { offset: 0, size: Some(4), value: Some(index), event },
                stride => DeviceDoorbell { offset: index * stride, size: None, value: None, event },
            }
        };
        (0..).zip(&self.events).map(doorbell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_doorbell_signals_what_its_write_does() {
        for stride in [0, 4] {
            let events: Vec<_> = (0..3).map(|_| Arc::new(Event::new().unwrap())).collect();
            let device = Doorbells::new(&events, stride);
            let doorbells = device.doorbells();
            assert_eq!(doorbells.len(), events.len());
            for (index, doorbell) in doorbells.iter().enumerate() {
                let DeviceDoorbell { offset, size, value, event } = doorbell;
                rustix::io::write(event.as_fd(), &1u64.to_ne_bytes()).unwrap();
                let signalled = |at| events.iter().position(|event| event.take()) == at;
                assert!(signalled(Some(index)) && signalled(None));
                device.write(*offset, size.unwrap_or(2), value.unwrap_or(0)).unwrap();
                assert!(signalled(Some(index)) && signalled(None));
            }
        }
    }
}
