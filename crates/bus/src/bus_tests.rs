use parking_lot::Mutex;

use super::*;
use crate::DeviceKind;

/// Answers with its tag in each byte's high half and the offset in the low.
struct Tagged {
    tag: u8,
    kind: DeviceKind,
    log: Mutex<Vec<(u64, u8, u64)>>,
}

impl Tagged {
    fn new(tag: u8) -> Arc<Self> {
        Arc::new(Self { tag, kind: DeviceKind::Native, log: Mutex::default() })
    }

    fn python(tag: u8) -> Arc<Self> {
        Arc::new(Self { tag, kind: DeviceKind::Python, log: Mutex::default() })
    }
}

impl Device for Tagged {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        // More bytes than asked for: the bus must cut them.
        let byte = u64::from(self.tag) << 4 | (offset & 0xF);
        Ok(byte | u64::from(size) << 56 | 0xAB << 32)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        self.log.lock().push((offset, size, value));
        Ok(())
    }

    fn kind(&self) -> DeviceKind {
        self.kind
    }
}

#[test]
fn unclaimed_reads_all_ones_of_its_size() {
    let bus = Bus::new();
    for (size, ones) in [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)] {
        let answer = bus.port_in(0x80, size).unwrap();
        assert_eq!(answer, Answer { value: ones, by: Handler::Nobody });
    }
    assert_eq!(bus.mmio_read(0xD000_0000, 8).unwrap().value, u64::MAX);
    assert_eq!(bus.mmio_write(0xD000_0000, 8, 5).unwrap(), Handler::Nobody);
}

#[test]
fn access_reaches_its_device_with_offset_and_cut_to_size() {
    let bus = Bus::new();
    let (low, high) = (Tagged::new(1), Tagged::new(2));
    bus.attach_ports(0x3F8, 8, "uart", low.clone()).unwrap();
    bus.attach_ports(0x400, 4, "other", high.clone()).unwrap();
    assert_eq!(bus.port_in(0x3FD, 1).unwrap(), Answer { value: 0x15, by: Handler::Native });
    assert_eq!(bus.port_in(0x400, 4).unwrap().value, 0x20);
    bus.port_out(0x403, 1, 0x1FF).unwrap();
    assert_eq!(*high.log.lock(), [(3, 1, 0xFF)]);
    assert!(low.log.lock().is_empty());
}

#[test]
fn access_over_the_end_of_a_range_is_split_into_bytes() {
    let bus = Bus::new();
    let (first, second) = (Tagged::new(1), Tagged::python(2));
    bus.attach_ports(0x10, 2, "first", first.clone()).unwrap();
    bus.attach_ports(0x13, 1, "second", second.clone()).unwrap();
    // 0x11 is the first's last byte, 0x12 nobody's, 0x13 the second's.
    let answer = bus.port_in(0x11, 4).unwrap();
    assert_eq!(answer, Answer { value: 0xFF20_FF11, by: Handler::Python });
    assert_eq!(bus.port_out(0x11, 4, 0x4433_2211).unwrap(), Handler::Python);
    assert_eq!(*first.log.lock(), [(1, 1, 0x11)]);
    assert_eq!(*second.log.lock(), [(0, 1, 0x33)]);
}

#[test]
fn access_that_starts_below_a_range_is_split_into_bytes() {
    let bus = Bus::new();
    bus.attach_mmio(0xD000_0002, 0x10, "device", Tagged::new(3)).unwrap();
    assert_eq!(bus.mmio_read(0xD000_0000, 4).unwrap().value, 0x3130_FFFF);
}

#[test]
fn access_at_the_last_port_does_not_wrap() {
    let bus = Bus::new();
    let zero = Tagged::new(1);
    bus.attach_ports(0, 1, "zero", zero.clone()).unwrap();
    bus.attach_ports(0xFFFF, 1, "last", Tagged::new(2)).unwrap();
    assert_eq!(bus.port_in(0xFFFF, 4).unwrap().value, 0xFFFF_FF20);
    bus.port_out(0xFFFF, 4, 0).unwrap();
    assert!(zero.log.lock().is_empty());
}

#[test]
fn access_at_the_end_of_memory_does_not_wrap() {
    let bus = Bus::new();
    bus.attach_mmio(u64::MAX, 1, "last", Tagged::new(2)).unwrap();
    assert_eq!(bus.mmio_read(u64::MAX, 8).unwrap().value, u64::MAX << 8 | 0x20);
    assert_eq!(bus.mmio_read(u64::MAX - 1, 1).unwrap().by, Handler::Nobody);
}

#[test]
fn odd_size_is_split_into_bytes() {
    let bus = Bus::new();
    let device = Tagged::new(1);
    bus.attach_mmio(0x1000, 8, "device", device.clone()).unwrap();
    assert_eq!(bus.mmio_read(0x1001, 3).unwrap().value, 0x13_1211);
    bus.mmio_write(0x1001, 3, 0x0003_0201).unwrap();
    assert_eq!(*device.log.lock(), [(1, 1, 1), (2, 1, 2), (3, 1, 3)]);
}

#[test]
fn overlap_is_refused_and_names_the_owner() {
    let bus = Bus::new();
    bus.attach_ports(0x3F8, 8, "com1", Tagged::new(1)).unwrap();
    for (base, length) in [(0x3F8, 8), (0x3FF, 1), (0x3F0, 9), (0x3F0, 0x20), (0x3FA, 2)] {
        let error = bus.attach_ports(base, length, "x", Tagged::new(2)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("overlaps com1 at 0x3f8-0x3ff"), "{base:#x}: {text}");
    }
    bus.attach_ports(0x3F7, 1, "below", Tagged::new(2)).unwrap();
    bus.attach_ports(0x400, 1, "above", Tagged::new(2)).unwrap();
}

#[test]
fn empty_and_endless_ranges_are_refused() {
    let bus = Bus::new();
    for (base, length) in [(0, 0), (0xFFFF, 2), (0x1_0000, 1), (u64::MAX, 1), (1, u64::MAX)] {
        assert!(bus.attach_ports(base, length, "x", Tagged::new(1)).is_err(), "{base:#x}");
    }
    for (base, length) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
        assert!(bus.attach_mmio(base, length, "x", Tagged::new(1)).is_err(), "{base:#x}");
    }
}

#[test]
fn reserved_range_has_no_device_and_takes_none() {
    let bus = Bus::new();
    bus.reserve_ports(0x20, 2, "the interrupt controller").unwrap();
    assert_eq!(bus.port_in(0x20, 1).unwrap().by, Handler::Nobody);
    let error = bus.attach_ports(0x21, 1, "x", Tagged::new(1)).unwrap_err();
    assert!(error.to_string().contains("the interrupt controller"));
}

#[test]
fn taken_devices_no_longer_answer() {
    let bus = Bus::new();
    bus.attach_ports(0x80, 1, "x", Tagged::new(1)).unwrap();
    bus.attach_mmio(0x80, 1, "x", Tagged::new(1)).unwrap();
    assert_eq!(bus.take_devices().len(), 2);
    assert_eq!(bus.port_in(0x80, 1).unwrap().by, Handler::Nobody);
}

#[test]
fn device_may_attach_another_while_it_is_called() {
    struct Hotplug(Arc<Bus>);
    impl Device for Hotplug {
        fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
            self.0.attach_ports(0x90, 1, "plugged", Tagged::new(9)).map_err(DeviceError::new)?;
            Ok(1)
        }
        fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    let bus = Arc::new(Bus::new());
    bus.attach_ports(0x80, 1, "hotplug", Arc::new(Hotplug(Arc::clone(&bus)))).unwrap();
    assert_eq!(bus.port_in(0x80, 1).unwrap().value, 1);
    assert_eq!(bus.port_in(0x90, 1).unwrap().value, 0x90);
}
