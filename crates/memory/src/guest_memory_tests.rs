use super::*;

/// What observers were told, in order.
#[derive(Default)]
struct Log {
    writes: Mutex<Vec<(u64, u64)>>,
    regions: Mutex<Vec<(bool, u64, u64)>>,
    refuses: bool,
}

impl MemoryObserver for Log {
    fn written(&self, address: GuestPhys, length: u64) {
        self.writes.lock().push((address.0, length));
    }

    fn mapped(&self, region: &Region) -> Result<(), Refusal> {
        if self.refuses {
            return Err("no slot is free".into());
        }
        self.regions.lock().push((true, region.start.0, region.len));
        Ok(())
    }

    fn unmapped(&self, region: &Region) {
        self.regions.lock().push((false, region.start.0, region.len));
    }
}

const MIB: u64 = 1 << 20;
/// Above RAM and below the APICs.
const ELSEWHERE: GuestPhys = GuestPhys(0xE000_0000);

fn observed() -> (GuestMemory, Arc<Log>) {
    let (memory, log) = (GuestMemory::new(MIB).unwrap(), Arc::new(Log::default()));
    memory.add_observer(log.clone());
    (memory, log)
}

#[test]
fn bytes_written_are_read_back() {
    let memory = GuestMemory::new(MIB).unwrap();
    memory.write(GuestPhys(0xFFE), &[1, 2, 3, 4]).unwrap();
    let mut data = [0; 4];
    memory.read(GuestPhys(0xFFE), &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
}

#[test]
fn range_over_the_end_is_refused_and_nothing_is_written() {
    let (memory, log) = observed();
    for (address, len) in [(MIB - 2, 4), (MIB, 1), (u64::MAX, 2), (u64::MAX - 1, 2)] {
        let address = GuestPhys(address);
        let data = vec![0xAA; len];
        assert!(matches!(memory.write(address, &data), Err(MemoryError::OutOfRange { .. })));
        assert!(memory.read(address, &mut vec![0; len]).is_err());
        assert!(
            !memory.contains(address, len as u64) && memory.host(address, len as u64).is_none()
        );
    }
    let mut last = [1; 2];
    memory.read(GuestPhys(MIB - 2), &mut last).unwrap();
    assert_eq!(last, [0, 0]);
    assert!(log.writes.lock().is_empty());
    assert!(memory.contains(GuestPhys(MIB - 2), 2) && !memory.contains(GuestPhys(0), u64::MAX));
}

#[test]
fn ram_over_3_gib_goes_on_at_4_gib() {
    let memory = GuestMemory::new(LOW_RAM_END + PAGE_SIZE).unwrap();
    assert!(memory.host(GuestPhys(LOW_RAM_END - 1), 1).is_some());
    assert!(memory.host(GuestPhys(LOW_RAM_END), 1).is_none());
    assert!(memory.host(GuestPhys(HIGH_RAM_START), PAGE_SIZE).is_some());
    assert!(memory.host(GuestPhys(HIGH_RAM_START), PAGE_SIZE + 1).is_none());
}

#[test]
fn bad_sizes_and_places_are_refused() {
    for size in [0, 1, 4095, 1 << 60] {
        assert!(GuestMemory::new(size).is_err(), "{size}");
    }
    let memory = GuestMemory::new(MIB).unwrap();
    for (start, len) in [(1, PAGE_SIZE), (!0xFFF, PAGE_SIZE), (MIB, 0)] {
        assert!(memory.add_region(GuestPhys(start), len).is_err(), "{start:#x}");
    }
    assert_eq!(memory.regions().len(), 1);
}

#[test]
fn every_observer_hears_of_each_write_by_any_way() {
    let (memory, first) = observed();
    let second = Arc::new(Log::default());
    memory.add_observer(second.clone());
    memory.write(GuestPhys(0x1000), &[0; 3]).unwrap();
    memory.write(GuestPhys(0x2000), &[]).unwrap();
    let space = memory.space().memory();
    space.write_obj(0u32, GuestAddress(0x2004)).unwrap();
    space.store(1u8, GuestAddress(0x3001), std::sync::atomic::Ordering::Release).unwrap();
    let slice = space.get_slices(GuestAddress(0x4000), 0x100).next().unwrap().unwrap();
    slice.subslice(0x10, 8).unwrap().copy_from(&[1u8; 8]);
    let seen = [(0x1000, 3), (0x2004, 4), (0x3001, 1), (0x4010, 8)];
    for log in [first, second] {
        assert_eq!(*log.writes.lock(), seen);
    }
}

#[test]
fn region_appears_and_goes_for_everybody() {
    let (memory, log) = observed();
    let region = memory.add_region(ELSEWHERE, 2 * MIB).unwrap();
    assert_eq!(memory.host(ELSEWHERE.offset(5), 1), Some(region.host().wrapping_add(5)));
    memory.write(ELSEWHERE.offset(0x10), &[7]).unwrap();
    assert_eq!(*log.writes.lock(), [(ELSEWHERE.0 + 0x10, 1)]);
    assert_eq!(memory.regions().len(), 2);
    assert!(matches!(
        memory.add_region(ELSEWHERE.offset(MIB), MIB),
        Err(MemoryError::Overlap { .. })
    ));

    // A device in the middle of a request goes on with what it found.
    let space = memory.space().memory();
    let gone = memory.remove_region(ELSEWHERE).unwrap();
    assert!(memory.host(ELSEWHERE, 1).is_none() && !memory.contains(ELSEWHERE, 1));
    assert_eq!(space.read_obj::<u8>(GuestAddress(ELSEWHERE.0 + 0x10)).unwrap(), 7);
    assert!(memory.space().memory().read_obj::<u8>(GuestAddress(ELSEWHERE.0)).is_err());
    assert!(matches!(memory.remove_region(ELSEWHERE), Err(MemoryError::NoRegion(_))));
    drop((space, gone, region));

    memory.add_region(ELSEWHERE, MIB).unwrap();
    let mut fresh = [1];
    memory.read(ELSEWHERE.offset(0x10), &mut fresh).unwrap();
    assert_eq!(fresh, [0]);
    let told =
        [(true, ELSEWHERE.0, 2 * MIB), (false, ELSEWHERE.0, 2 * MIB), (true, ELSEWHERE.0, MIB)];
    assert_eq!(*log.regions.lock(), told);
}

#[test]
fn region_that_one_observer_refuses_is_taken_from_the_others() {
    let (memory, willing) = observed();
    memory.add_observer(Arc::new(Log { refuses: true, ..Log::default() }));
    let error = memory.add_region(ELSEWHERE, MIB).err().unwrap().to_string();
    assert!(error.contains("no slot is free"), "{error}");
    assert!(memory.host(ELSEWHERE, 1).is_none() && memory.regions().len() == 1);
    let told = [(true, ELSEWHERE.0, MIB), (false, ELSEWHERE.0, MIB)];
    assert_eq!(*willing.regions.lock(), told);
}

#[test]
fn observer_that_keeps_a_region_ends_with_the_memory() {
    struct Keeper(Mutex<Option<Region>>);
    impl MemoryObserver for Keeper {
        fn written(&self, _: GuestPhys, _: u64) {}
        fn mapped(&self, region: &Region) -> Result<(), Refusal> {
            *self.0.lock() = Some(region.clone());
            Ok(())
        }
    }
    let memory = GuestMemory::new(MIB).unwrap();
    let keeper = Arc::new(Keeper(Mutex::default()));
    let gone = Arc::downgrade(&keeper);
    memory.add_observer(keeper);
    memory.add_region(ELSEWHERE, MIB).unwrap();
    drop(memory);
    assert!(gone.upgrade().is_none());
}

#[test]
fn regions_are_bounded() {
    let memory = GuestMemory::new(PAGE_SIZE).unwrap();
    let at = |index: u64| ELSEWHERE.offset(index * PAGE_SIZE);
    for index in 1..MAX_REGIONS as u64 {
        memory.add_region(at(index), PAGE_SIZE).unwrap();
    }
    assert!(matches!(memory.add_region(at(0), PAGE_SIZE), Err(MemoryError::TooMany)));
    assert!(memory.host(at(MAX_REGIONS as u64 - 1), PAGE_SIZE).is_some());
}

/// A reader never sees one region's start with another's host address.
#[test]
fn host_addresses_are_whole_while_regions_come_and_go() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let map = HostMap::new();
    let host = |start: u64| std::ptr::without_provenance_mut::<u8>(start as usize + 0x10_0000);
    let place = |start: u64| (GuestPhys(start), 0x1000, host(start));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = || {
            let mut found = 0u64;
            while !stop.load(Ordering::Relaxed) || found == 0 {
                for start in [0, 0x1000, 0x2000, 0x3000] {
                    if let Some(address) = map.find(GuestPhys(start + 8), 8) {
                        assert_eq!(address, host(start).wrapping_add(8));
                        found += 1;
                    }
                }
            }
        };
        scope.spawn(reader);
        scope.spawn(reader);
        for turn in 0..20_000u64 {
            let starts = [turn % 4, (turn + 1) % 4].map(|index| index * 0x1000);
            map.set(starts.into_iter().map(place));
        }
        stop.store(true, Ordering::Relaxed);
    });
}
