//! The port and memory space of a machine as its vCPUs see it.

use std::sync::Arc;

use tetrarch_engine::{DoorbellAddress, Vm};

use crate::doorbell::Placement;
use crate::space::Space;
use crate::table::Hit;
use crate::{Access, AttachError, Device, DeviceError, Handler, Region, Sizes, Span};

/// The result of a read: the value, cut to the size of the access, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub value: u64,
    pub by: Handler,
}

/// The port and the memory space, each with regions that devices answer.
///
/// **Who gets an access.** One access has one owner, found by its first
/// address and its size; no neighbour sees a part of it.
///
/// 1. The region that decodes this size and holds all of the access. Chipsets
///    decode so: the configuration address register at 0xCF8 takes full dwords
///    alone, and any other access there is an ordinary one (PCI Local Bus 3.0,
///    3.2.2.3.2; Intel 82441FX data sheet, CONFADD), such as a byte to the reset
///    register at 0xCF9, which lies within that dword (Intel 82371SB data sheet,
///    RC). So regions may share addresses if no access is decoded by both.
/// 2. Else the region that decodes this size and single bytes and holds the
///    first address, for the bytes that it has; the others read as ones and are
///    lost. QEMU decides by the first address too, "without considering adjacent
///    registers" (system/physmem.c, address_space_translate_internal). The part
///    comes as one access where its size is one that the region decodes, else
///    byte by byte, lowest address first, as an ISA bridge breaks up a cycle
///    that is wider than its target. So does an access of 3, 5, 6 or 7 bytes.
/// 3. Else nobody: it reads as ones, and a write is lost.
///
/// Of two regions that a guest moved onto each other, the one placed earlier
/// answers. Nothing lies past port 0xFFFF: what a wide access at the end does
/// there is left to the implementation (Intel SDM 1, "I/O Address Space").
pub struct Bus {
    ports: Arc<Space>,
    mmio: Arc<Space>,
}

impl Bus {
    /// Without an engine, so that every write comes to its device.
    pub fn new() -> Self {
        Self::of(None)
    }

    /// Gives the doorbells of devices to the engine.
    pub fn with_doorbells(engine: Arc<dyn Vm>) -> Self {
        Self::of(Some(engine))
    }

    fn of(engine: Option<Arc<dyn Vm>>) -> Self {
        let port = |at| u16::try_from(at).ok().map(DoorbellAddress::Port);
        let memory = |at| Some(DoorbellAddress::Memory(at));
        let ports = engine.clone().map(|engine| Placement::new(engine, port));
        let mmio = engine.map(|engine| Placement::new(engine, memory));
        let ports = Space::new("port", 0xFFFF, ports);
        let mmio = Space::new("address", u64::MAX, mmio);
        Self { ports: Arc::new(ports), mmio: Arc::new(mmio) }
    }

    /// `owner` names the device in the errors of others.
    pub fn attach_ports(
        &self,
        base: u64,
        length: u64,
        sizes: Sizes,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<Region, AttachError> {
        self.ports.attach(base, length, sizes, owner, Some(device), true)
    }

    pub fn attach_mmio(
        &self,
        base: u64,
        length: u64,
        sizes: Sizes,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<Region, AttachError> {
        self.mmio.attach(base, length, sizes, owner, Some(device), true)
    }

    /// A region of ports that is not mapped yet: its driver says where it goes.
    pub fn attach_ports_unmapped(
        &self,
        base: u64,
        length: u64,
        sizes: Sizes,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<Region, AttachError> {
        self.ports.attach(base, length, sizes, owner, Some(device), false)
    }

    /// The same of memory.
    pub fn attach_mmio_unmapped(
        &self,
        base: u64,
        length: u64,
        sizes: Sizes,
        owner: &str,
        device: Arc<dyn Device>,
    ) -> Result<Region, AttachError> {
        self.mmio.attach(base, length, sizes, owner, Some(device), false)
    }

    /// Keeps devices away from ports that the engine answers itself.
    pub fn reserve_ports(
        &self,
        base: u64,
        length: u64,
        owner: &str,
    ) -> Result<Region, AttachError> {
        self.ports.attach(base, length, Sizes::ALL, owner, None, true)
    }

    /// Keeps devices away from memory that never reaches the bus.
    pub fn reserve_mmio(&self, base: u64, length: u64, owner: &str) -> Result<Region, AttachError> {
        self.mmio.attach(base, length, Sizes::ALL, owner, None, true)
    }

    /// Detaches all devices. The caller drops them when it holds no lock.
    #[must_use]
    pub fn take_devices(&self) -> Vec<Arc<dyn Device>> {
        let mut devices = self.ports.take_devices();
        devices.append(&mut self.mmio.take_devices());
        devices
    }

    /// Where devices and the engine answer now, each with its name, by address.
    pub fn port_regions(&self) -> Vec<(Span, String)> {
        self.ports.regions()
    }

    pub fn mmio_regions(&self) -> Vec<(Span, String)> {
        self.mmio.regions()
    }

    /// The name under which the owner of an address was attached.
    pub fn owner(&self, access: Access) -> Option<String> {
        match access {
            Access::Port(port) => self.ports.owner(port.into()),
            Access::Memory(address) => self.mmio.owner(address),
            Access::Platform => None,
        }
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

/// The accesses by which a device sees one: (offset, size, shift of its bits).
/// One as it was made, where it lies in the region and has a size that the
/// region decodes; else its part in the region.
#[inline]
fn pieces(hit: &Hit<'_>, size: u8) -> impl Iterator<Item = (u64, u8, u32)> {
    let decodes = |size: u8| size.is_power_of_two() && hit.sizes.has(size);
    let length = u64::from(size.min(8)).min(hit.room) as u8;
    let (count, each) = match length {
        whole if decodes(whole) => (1, whole),
        bytes if decodes(1) => (bytes, 1),
        _ => (0, 1),
    };
    let offset = hit.offset;
    (0..count).map(move |index| (offset + u64::from(index), each, u32::from(index) * 8))
}

fn read(space: &Space, address: u64, size: u8) -> Result<Answer, DeviceError> {
    let table = space.table();
    let mut answer = Answer { value: mask(size), by: Handler::Nobody };
    let Some(hit) = table.find(address, size) else { return Ok(answer) };
    for (offset, size, shift) in pieces(&hit, size) {
        let value = hit.device.read(offset, size)? & mask(size);
        answer.value = answer.value & !(mask(size) << shift) | value << shift;
        answer.by = hit.by;
    }
    Ok(answer)
}

fn write(space: &Space, address: u64, size: u8, data: u64) -> Result<Handler, DeviceError> {
    let table = space.table();
    let Some(hit) = table.find(address, size) else { return Ok(Handler::Nobody) };
    let mut by = Handler::Nobody;
    for (offset, size, shift) in pieces(&hit, size) {
        hit.device.write(offset, size, data >> shift & mask(size))?;
        by = hit.by;
    }
    Ok(by)
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
