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
    bus.attach_ports(0x3F8, 8, Sizes::ALL, "uart", low.clone()).unwrap();
    bus.attach_ports(0x400, 4, Sizes::ALL, "other", high.clone()).unwrap();
    assert_eq!(bus.port_in(0x3FD, 1).unwrap(), Answer { value: 0x15, by: Handler::Native });
    assert_eq!(bus.port_in(0x400, 4).unwrap().value, 0x20);
    bus.port_out(0x403, 1, 0x1FF).unwrap();
    assert_eq!(*high.log.lock(), [(3, 1, 0xFF)]);
    assert!(low.log.lock().is_empty());
}

#[test]
fn access_over_the_end_of_a_region_reaches_its_owner_alone() {
    let bus = Bus::new();
    let (first, second) = (Tagged::new(1), Tagged::python(2));
    bus.attach_ports(0x10, 2, Sizes::ALL, "first", first.clone()).unwrap();
    bus.attach_ports(0x12, 2, Sizes::ALL, "second", second.clone()).unwrap();
    // 0x11 is the first's last byte; 0x12 to 0x14 do not see a dword from there.
    let answer = bus.port_in(0x11, 4).unwrap();
    assert_eq!(answer, Answer { value: 0xFFFF_FF11, by: Handler::Native });
    assert_eq!(bus.port_out(0x11, 4, 0x4433_2211).unwrap(), Handler::Native);
    assert_eq!(*first.log.lock(), [(1, 1, 0x11)]);
    // A part of two bytes is one access, one of three is three.
    bus.port_out(0x10, 4, 0x4433_2211).unwrap();
    assert_eq!(first.log.lock()[1..], [(0, 2, 0x2211)]);
    assert!(second.log.lock().is_empty());
    let long = Tagged::new(3);
    bus.attach_ports(0x20, 3, Sizes::ALL, "long", long.clone()).unwrap();
    bus.port_out(0x20, 4, 0x4433_2211).unwrap();
    assert_eq!(*long.log.lock(), [(0, 1, 0x11), (1, 1, 0x22), (2, 1, 0x33)]);
    assert_eq!(bus.port_in(0x20, 4).unwrap().value, 0xFF32_3130);
}

#[test]
fn access_that_starts_below_a_region_passes_it_by() {
    let bus = Bus::new();
    let device = Tagged::new(3);
    bus.attach_mmio(0xD000_0002, 0x10, Sizes::ALL, "device", device.clone()).unwrap();
    let ones = Answer { value: 0xFFFF_FFFF, by: Handler::Nobody };
    assert_eq!(bus.mmio_read(0xD000_0000, 4).unwrap(), ones);
    assert_eq!(bus.mmio_write(0xD000_0000, 4, 0).unwrap(), Handler::Nobody);
    assert!(device.log.lock().is_empty());
}

/// PCI's configuration mechanism #1 and the reset register inside of it.
#[test]
fn dword_of_the_configuration_address_does_not_reach_the_reset_register() {
    let bus = Bus::new();
    let reset = Tagged::new(1);
    bus.attach_ports(0xCF9, 1, Sizes::ALL, "reset", reset.clone()).unwrap();
    // Function 4 of a device has bit 10 set, which as a byte would be RST_CPU.
    assert_eq!(bus.port_out(0xCF8, 4, 0x8000_2400).unwrap(), Handler::Nobody);
    assert_eq!(bus.port_out(0xCF8, 2, 0x2400).unwrap(), Handler::Nobody);
    assert_eq!(bus.port_in(0xCF8, 4).unwrap().value, 0xFFFF_FFFF);
    assert!(reset.log.lock().is_empty());

    let (address, data) = (Tagged::new(2), Tagged::new(3));
    let dwords = Sizes::of(&[4]).unwrap();
    bus.attach_ports(0xCF8, 4, dwords, "address", address.clone()).unwrap();
    bus.attach_ports(0xCFC, 4, Sizes::ALL, "data", data.clone()).unwrap();
    for (port, size) in [(0xCF8, 4), (0xCF9, 1), (0xCFA, 4), (0xCF8, 1), (0xCFA, 2), (0xCFD, 1)] {
        bus.port_out(port, size, 0x8000_2400 | u32::from(port) & 0xF).unwrap();
    }
    assert_eq!(*address.log.lock(), [(0, 4, 0x8000_2408)]);
    assert_eq!(*reset.log.lock(), [(0, 1, 9)]);
    assert_eq!(*data.log.lock(), [(1, 1, 0xD)]);
}

#[test]
fn one_device_claims_all_of_the_configuration_mechanism() {
    let bus = Bus::new();
    let (reset, host) = (Tagged::new(1), Tagged::new(2));
    bus.attach_ports(0xCF9, 1, Sizes::ALL, "reset", reset.clone()).unwrap();
    let error = bus.attach_ports(0xCF8, 8, Sizes::ALL, "host", host.clone()).err().unwrap();
    assert!(error.to_string().contains("overlaps reset at 0xcf9-0xcf9"), "{error}");
    let wide = Sizes::of(&[2, 4]).unwrap();
    bus.attach_ports(0xCF8, 8, wide, "host", host.clone()).unwrap();
    bus.port_out(0xCF8, 4, 1).unwrap();
    bus.port_out(0xCFE, 2, 2).unwrap();
    bus.port_out(0xCF9, 1, 3).unwrap();
    assert_eq!(*host.log.lock(), [(0, 4, 1), (6, 2, 2)]);
    assert_eq!(*reset.log.lock(), [(0, 1, 3)]);
}

#[test]
fn sizes_that_no_access_can_have_are_refused() {
    assert!(Sizes::of(&[]).is_none() && Sizes::of(&[1, 3]).is_none());
    let bus = Bus::new();
    let sizes = Sizes::of(&[2, 4, 8]).unwrap();
    let error = bus.attach_ports(0x80, 1, sizes, "x", Tagged::new(1)).err().unwrap();
    assert!(error.to_string().contains("no access of 2/4/8 bytes"), "{error}");
}

#[test]
fn access_at_the_last_port_does_not_wrap() {
    let bus = Bus::new();
    let zero = Tagged::new(1);
    bus.attach_ports(0, 1, Sizes::ALL, "zero", zero.clone()).unwrap();
    bus.attach_ports(0xFFFF, 1, Sizes::ALL, "last", Tagged::new(2)).unwrap();
    assert_eq!(bus.port_in(0xFFFF, 4).unwrap().value, 0xFFFF_FF20);
    bus.port_out(0xFFFF, 4, 0).unwrap();
    assert!(zero.log.lock().is_empty());
}

#[test]
fn access_at_the_end_of_memory_does_not_wrap() {
    let bus = Bus::new();
    bus.attach_mmio(u64::MAX, 1, Sizes::ALL, "last", Tagged::new(2)).unwrap();
    assert_eq!(bus.mmio_read(u64::MAX, 8).unwrap().value, u64::MAX << 8 | 0x20);
    assert_eq!(bus.mmio_read(u64::MAX - 1, 1).unwrap().by, Handler::Nobody);
}

#[test]
fn odd_size_is_split_into_bytes() {
    let bus = Bus::new();
    let device = Tagged::new(1);
    bus.attach_mmio(0x1000, 8, Sizes::ALL, "device", device.clone()).unwrap();
    assert_eq!(bus.mmio_read(0x1001, 3).unwrap().value, 0x13_1211);
    bus.mmio_write(0x1001, 3, 0x0003_0201).unwrap();
    assert_eq!(*device.log.lock(), [(1, 1, 1), (2, 1, 2), (3, 1, 3)]);
}

#[test]
fn overlap_is_refused_and_names_the_owner() {
    let bus = Bus::new();
    bus.attach_ports(0x3F8, 8, Sizes::ALL, "com1", Tagged::new(1)).unwrap();
    for (base, length) in [(0x3F8, 8), (0x3FF, 1), (0x3F0, 9), (0x3F0, 0x20), (0x3FA, 2)] {
        let error = bus.attach_ports(base, length, Sizes::ALL, "x", Tagged::new(2)).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("overlaps com1 at 0x3f8-0x3ff"), "{base:#x}: {text}");
    }
    bus.attach_ports(0x3F7, 1, Sizes::ALL, "below", Tagged::new(2)).unwrap();
    bus.attach_ports(0x400, 1, Sizes::ALL, "above", Tagged::new(2)).unwrap();
}

#[test]
fn empty_and_endless_ranges_are_refused() {
    let bus = Bus::new();
    for (base, length) in [(0, 0), (0xFFFF, 2), (0x1_0000, 1), (u64::MAX, 1), (1, u64::MAX)] {
        assert!(
            bus.attach_ports(base, length, Sizes::ALL, "x", Tagged::new(1)).is_err(),
            "{base:#x}"
        );
    }
    for (base, length) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
        assert!(
            bus.attach_mmio(base, length, Sizes::ALL, "x", Tagged::new(1)).is_err(),
            "{base:#x}"
        );
    }
}

#[test]
fn reserved_range_has_no_device_and_takes_none() {
    let bus = Bus::new();
    bus.reserve_ports(0x20, 2, "the interrupt controller").unwrap();
    assert_eq!(bus.port_in(0x20, 1).unwrap().by, Handler::Nobody);
    let error = bus.attach_ports(0x21, 1, Sizes::ALL, "x", Tagged::new(1)).err().unwrap();
    assert!(error.to_string().contains("the interrupt controller"));
}

#[test]
fn taken_devices_no_longer_answer() {
    let bus = Bus::new();
    bus.attach_ports(0x80, 1, Sizes::ALL, "x", Tagged::new(1)).unwrap();
    bus.attach_mmio(0x80, 1, Sizes::ALL, "x", Tagged::new(1)).unwrap();
    assert_eq!(bus.take_devices().len(), 2);
    assert_eq!(bus.port_in(0x80, 1).unwrap().by, Handler::Nobody);
}

#[test]
fn region_answers_where_it_was_moved_and_not_while_it_is_unmapped() {
    let bus = Bus::new();
    let region = bus.attach_mmio(0xE000_0000, 0x1000, Sizes::ALL, "bar", Tagged::new(1)).unwrap();
    let answers = |address| bus.mmio_read(address, 1).unwrap().by == Handler::Native;
    region.move_to(0xF000_0000).unwrap();
    assert!(!answers(0xE000_0000) && answers(0xF000_0000) && answers(0xF000_0FFF));
    region.unmap().unwrap();
    region.move_to(0xE000_1000).unwrap();
    assert!(!answers(0xF000_0000) && !answers(0xE000_1000));
    assert_eq!(region.place(), Some((0xE000_1000, 0x1000, false)));
    region.map().unwrap();
    assert!(answers(0xE000_1000));
    assert!(region.move_to(u64::MAX).is_err(), "past the end");
    assert!(answers(0xE000_1000), "a move that is refused changes nothing");
}

#[test]
fn region_moved_onto_another_answers_only_what_is_free_until_that_leaves() {
    let bus = Bus::new();
    let attach = |base, tag| bus.attach_ports(base, 4, Sizes::ALL, "x", Tagged::new(tag)).unwrap();
    let (fixed, bar) = (attach(0x100, 1), attach(0x200, 2));
    let tag = |port| bus.port_in(port, 1).unwrap().value >> 4;
    bar.move_to(0x102).unwrap();
    assert_eq!([tag(0x101), tag(0x103), tag(0x104), tag(0x105)], [1, 1, 2, 2]);
    // Who comes back comes last.
    fixed.unmap().unwrap();
    assert_eq!([tag(0x101), tag(0x103)], [0xF, 2]);
    fixed.map().unwrap();
    assert_eq!([tag(0x101), tag(0x103)], [1, 2]);
    fixed.map().unwrap();
    bar.detach();
    assert_eq!([tag(0x103), tag(0x105)], [1, 0xF]);
    assert_eq!(bar.map(), Err(AttachError::Detached));
    assert!(bar.detach().is_none() && bar.place().is_none());
}

/// Lets a device be detached while an access is inside of it.
#[test]
fn access_in_flight_finishes_on_a_device_that_is_detached() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Barrier, Weak};

    struct Slow {
        inside: Barrier,
        detached: Barrier,
        dropped: Arc<AtomicBool>,
        bus: Weak<Bus>,
    }
    impl Device for Slow {
        fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
            self.inside.wait();
            self.detached.wait();
            assert!(!self.dropped.load(Ordering::SeqCst));
            Ok(0x5A)
        }
        fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    impl Drop for Slow {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::SeqCst);
            // Would hang if a lock of the bus were held.
            let bus = self.bus.upgrade().expect("the bus outlives its devices");
            bus.attach_ports(0x90, 1, Sizes::ALL, "late", Tagged::new(2)).expect("free");
        }
    }

    let (bus, dropped) = (Arc::new(Bus::new()), Arc::new(AtomicBool::new(false)));
    let slow = Arc::new(Slow {
        inside: Barrier::new(2),
        detached: Barrier::new(2),
        dropped: Arc::clone(&dropped),
        bus: Arc::downgrade(&bus),
    });
    let region = bus.attach_ports(0x80, 1, Sizes::ALL, "slow", slow.clone()).unwrap();
    std::thread::scope(|scope| {
        let access = scope.spawn(|| bus.port_in(0x80, 1).unwrap());
        slow.inside.wait();
        drop(region.detach());
        assert_eq!(bus.port_in(0x80, 1).unwrap().by, Handler::Nobody);
        slow.detached.wait();
        assert_eq!(access.join().unwrap().value, 0x5A);
    });
    assert!(!dropped.load(Ordering::SeqCst));
    drop(slow);
    assert!(dropped.load(Ordering::SeqCst));
    assert_eq!(bus.port_in(0x90, 1).unwrap().value, 0x20);
}

#[test]
fn device_whose_region_is_refused_is_dropped_under_no_lock() {
    struct Last(Arc<Bus>);
    impl Device for Last {
        fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
            Ok(0)
        }
        fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    impl Drop for Last {
        fn drop(&mut self) {
            // Would hang if a lock of the bus were held.
            self.0.attach_ports(0x90, 1, Sizes::ALL, "late", Tagged::new(2)).expect("free");
        }
    }
    let bus = Arc::new(Bus::new());
    bus.attach_ports(0x80, 1, Sizes::ALL, "first", Tagged::new(1)).unwrap();
    let last = Arc::new(Last(Arc::clone(&bus)));
    assert!(bus.attach_ports(0x80, 1, Sizes::ALL, "last", last).is_err());
    assert_eq!(bus.port_in(0x90, 1).unwrap().value, 0x20);
}

/// Whatever is placed, moved and detached, each access has the owner that the
/// rule at [`Bus`] names, said here without a table.
#[test]
fn table_agrees_with_the_rule_for_random_regions() {
    struct Model {
        base: u64,
        length: u64,
        sizes: Vec<u8>,
        tag: u8,
    }
    let mut seed = 0x2545_F491_4F6C_DD1Du64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let choices: [&[u8]; 5] = [&[1, 2, 4, 8], &[1, 2, 4, 8], &[4], &[1], &[1, 4]];
    for _ in 0..200 {
        let bus = Bus::new();
        let mut models: Vec<Model> = Vec::new();
        for tag in 1..8 {
            let sizes = choices[random(5) as usize];
            let (base, length) = (random(24), 4 + random(6));
            // Placed one by one from afar: a move may overlap, attaching may not.
            let far = 0x1000 + u64::from(tag) * 0x100;
            let set = Sizes::of(sizes).unwrap();
            let region = bus.attach_ports(far, length, set, "x", Tagged::new(tag)).unwrap();
            region.move_to(base).unwrap();
            models.push(Model { base, length, sizes: sizes.to_vec(), tag });
            if random(3) == 0 {
                region.unmap().unwrap();
                models.pop();
            }
        }
        for size in [1u8, 2, 4] {
            for port in 0..40u16 {
                let at = u64::from(port);
                let holds = |m: &&Model, bytes: u64| {
                    at >= m.base && at + bytes <= m.base + m.length && m.sizes.contains(&size)
                };
                let whole = models.iter().find(|m| holds(m, u64::from(size)));
                let part = models.iter().find(|m| holds(m, 1) && m.sizes.contains(&1));
                let owner = whole.or(part).map(|m| m.tag);
                let answer = bus.port_in(port, size).unwrap();
                let seen =
                    (answer.by != Handler::Nobody).then_some((answer.value >> 4 & 0xF) as u8);
                assert_eq!(seen, owner, "size {size} at {port}");
            }
        }
    }
}

#[test]
fn device_may_attach_another_while_it_is_called() {
    struct Hotplug(Arc<Bus>);
    impl Device for Hotplug {
        fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
            self.0
                .attach_ports(0x90, 1, Sizes::ALL, "plugged", Tagged::new(9))
                .map_err(DeviceError::new)?;
            Ok(1)
        }
        fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    let bus = Arc::new(Bus::new());
    bus.attach_ports(0x80, 1, Sizes::ALL, "hotplug", Arc::new(Hotplug(Arc::clone(&bus)))).unwrap();
    assert_eq!(bus.port_in(0x80, 1).unwrap().value, 1);
    assert_eq!(bus.port_in(0x90, 1).unwrap().value, 0x90);
}

#[test]
fn region_that_is_not_mapped_is_in_nobodys_way_until_its_driver_maps_it() {
    let bus = Bus::new();
    bus.attach_mmio(0, 0x1000, Sizes::ALL, "first", Tagged::new(1)).unwrap();
    let second = bus.attach_mmio_unmapped(0, 0x2000, Sizes::ALL, "second", Tagged::new(2)).unwrap();
    assert_eq!(bus.mmio_read(0x1001, 1).unwrap().by, Handler::Nobody);
    second.map().unwrap();
    assert_eq!(bus.mmio_read(1, 1).unwrap().value, 0x11, "who was there first answers");
    assert_eq!(bus.mmio_read(0x1001, 1).unwrap().value, 0x21);
}
