//! The port and memory space of a machine as its vCPUs see it.

use std::sync::Arc;

use crate::ranges::{AttachError, Hit, Lookup, RangeMap};
use crate::{Device, DeviceError, Handler};

/// The result of a read: the value, cut to the size of the access, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub value: u64,
    pub by: Handler,
}

/// Port and memory ranges with their devices.
///
/// An access that no device claims reads as all ones, and writes are lost. An
/// access of which a device claims only a part becomes one access per byte,
/// lowest address first, each answered by whoever owns that byte: so does an
/// ISA bridge break up a cycle that is wider than its target. The same is done
/// for a size that is not 1, 2, 4 or 8. Nothing lies past port 0xFFFF: what a
/// wide access at the end does there is left to the implementation (Intel SDM
/// 1, "I/O Address Space").
pub struct Bus {
    ports: RangeMap,
    mmio: RangeMap,
}

impl Bus {
    pub fn new() -> Self {
        Self { ports: RangeMap::new("port", 0xFFFF), mmio: RangeMap::new("address", u64::MAX) }
    }

    /// `owner` names the device in the errors of others.
    pub fn attach_ports(
        &self,
        base: u64,
        length: u64,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<(), AttachError> {
        self.ports.attach(base, length, owner, Some(device))
    }

    pub fn attach_mmio(
        &self,
        base: u64,
        length: u64,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<(), AttachError> {
        self.mmio.attach(base, length, owner, Some(device))
    }

    /// Keeps devices away from ports that the engine answers itself.
    pub fn reserve_ports(&self, base: u64, length: u64, owner: &str) -> Result<(), AttachError> {
        self.ports.attach(base, length, owner, None)
    }

    /// Keeps devices away from memory that never reaches the bus.
    pub fn reserve_mmio(&self, base: u64, length: u64, owner: &str) -> Result<(), AttachError> {
        self.mmio.attach(base, length, owner, None)
    }

    /// Detaches all devices. The caller drops them when it holds no lock.
    #[must_use]
    pub fn take_devices(&self) -> Vec<Arc<dyn Device>> {
        let mut devices = self.ports.take_devices();
        devices.append(&mut self.mmio.take_devices());
        devices
    }

    pub fn port_in(&self, port: u16, size: u8) -> Result<Answer, DeviceError> {
        read(&self.ports, u64::from(port), size)
    }

    pub fn port_out(&self, port: u16, size: u8, data: u32) -> Result<Handler, DeviceError> {
        write(&self.ports, u64::from(port), size, u64::from(data))
    }

    pub fn mmio_read(&self, address: u64, size: u8) -> Result<Answer, DeviceError> {
        read(&self.mmio, address, size)
    }

    pub fn mmio_write(&self, address: u64, size: u8, data: u64) -> Result<Handler, DeviceError> {
        write(&self.mmio, address, size, data)
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

/// All ones in `size` bytes.
fn mask(size: u8) -> u64 {
    match size {
        0 => 0,
        1..8 => (1 << (u32::from(size) * 8)) - 1,
        8.. => u64::MAX,
    }
}

/// What [`RangeMap::find`] says, with sizes that no device expects broken up.
fn find(map: &RangeMap, address: u64, size: u8) -> Lookup {
    match map.find(address, size) {
        Lookup::One(_) if !matches!(size, 1 | 2 | 4 | 8) => Lookup::Mixed,
        found => found,
    }
}

/// The bytes of a broken-up access that exist, with their addresses.
fn bytes(address: u64, size: u8) -> impl Iterator<Item = (u64, u32)> {
    (0..u32::from(size.min(8)))
        .map_while(move |index| Some((address.checked_add(u64::from(index))?, index * 8)))
}

fn read(map: &RangeMap, address: u64, size: u8) -> Result<Answer, DeviceError> {
    match find(map, address, size) {
        Lookup::One(Hit { device, offset }) => {
            let value = device.read(offset, size)? & mask(size);
            Ok(Answer { value, by: device.kind().into() })
        }
        Lookup::Nobody => Ok(Answer { value: mask(size), by: Handler::Nobody }),
        Lookup::Mixed => {
            let mut answer = Answer { value: mask(size), by: Handler::Nobody };
            for (address, shift) in bytes(address, size) {
                if let Lookup::One(Hit { device, offset }) = map.find(address, 1) {
                    let byte = device.read(offset, 1)? & 0xFF;
                    answer.value = answer.value & !(0xFF << shift) | byte << shift;
                    answer.by = answer.by.max(device.kind().into());
                }
            }
            Ok(answer)
        }
    }
}

fn write(map: &RangeMap, address: u64, size: u8, data: u64) -> Result<Handler, DeviceError> {
    match find(map, address, size) {
        Lookup::One(Hit { device, offset }) => {
            device.write(offset, size, data & mask(size))?;
            Ok(device.kind().into())
        }
        Lookup::Nobody => Ok(Handler::Nobody),
        Lookup::Mixed => {
            let mut by = Handler::Nobody;
            for (address, shift) in bytes(address, size) {
                if let Lookup::One(Hit { device, offset }) = map.find(address, 1) {
                    device.write(offset, 1, data >> shift & 0xFF)?;
                    by = by.max(device.kind().into());
                }
            }
            Ok(by)
        }
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
