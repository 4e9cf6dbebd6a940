//! The ring of a back end, which can write all of its memory.

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::ring::{AVAILABLE, BYTES, DriverRing, RingError, SIZE, USED};
use super::*;

const RAM: u64 = 1 << 20;

struct Rig {
    guest: GuestMemory,
    rings: GuestMemory,
    ring: DriverRing,
}

impl Rig {
    fn new() -> Self {
        let (guest, rings) = (GuestMemory::new(RAM).unwrap(), GuestMemory::new(2 * BYTES).unwrap());
        let ring = DriverRing::new(&rings, BYTES).unwrap();
        Self { guest, rings, ring }
    }

    fn chain(&self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Chain {
        let list = |ranges: &[(u64, u64)]| {
            let ranges = ranges.iter().map(|&(address, length)| (GuestPhys(address), length));
            ScatterList::of(self.guest.snapshot(), ranges).unwrap()
        };
        Chain::of(list(readable), list(writable))
    }

    fn number(&self, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.rings.read(GuestPhys(BYTES + offset), &mut data[..bytes]).unwrap();
        u64::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u64, bytes: usize) {
        let data = value.to_le_bytes();
        self.rings.write(GuestPhys(BYTES + offset), &data[..bytes]).unwrap();
    }

    /// The back end gives a chain back, as the `count`th.
    fn give_back(&self, count: u16, id: u32, written: u32) {
        let slot = USED + 4 + 8 * u64::from((count - 1) % SIZE);
        self.set(slot, (u64::from(written) << 32) | u64::from(id), 8);
        self.set(USED + 2, count.into(), 2);
    }
}

#[test]
fn a_chain_is_in_the_table_as_the_specification_has_it() {
    let mut rig = Rig::new();
    let chain = rig.chain(&[(0x1000, 16), (0x2000, 8)], &[(0x3000, 512)]);
    let head = rig.ring.add(&chain).unwrap();
    assert_eq!(rig.number(AVAILABLE + 2, 2), 0, "not published yet");
    assert!(rig.ring.publish());
    assert_eq!(rig.number(AVAILABLE + 2, 2), 1);
    assert_eq!(rig.number(AVAILABLE + 4, 2), u64::from(head));
    let mut at = u64::from(head);
    for (address, length, flags) in [(0x1000, 16, 1), (0x2000, 8, 1), (0x3000, 512, 2)] {
        assert_eq!(rig.number(16 * at, 8), address);
        assert_eq!(rig.number(16 * at + 8, 4), length);
        assert_eq!(rig.number(16 * at + 12, 2), flags);
        at = rig.number(16 * at + 14, 2);
    }
    rig.set(USED, 1, 2);
    assert!(!rig.ring.publish(), "the back end wants no kick");
    assert_eq!(rig.ring.take(), Ok(None));
    rig.give_back(1, head.into(), 512);
    assert_eq!(rig.ring.take(), Ok(Some((head, 512))));
    assert_eq!(rig.ring.take(), Ok(None));
}

#[test]
fn what_comes_back_and_was_not_given_is_told() {
    let mut rig = Rig::new();
    let chain = rig.chain(&[], &[(0x1000, 1), (0x2000, 1)]);
    let head = u32::from(rig.ring.add(&chain).unwrap());
    rig.ring.publish();
    rig.set(USED + 2, 2, 2);
    assert_eq!(rig.ring.take(), Err(RingError::TooMany { given: 2, had: 1 }));
    for id in [head + 1, u32::from(SIZE), u32::MAX] {
        rig.give_back(1, id, 1);
        assert_eq!(rig.ring.take(), Err(RingError::NotGiven(id)), "the second descriptor too");
    }
    rig.give_back(1, head, 1);
    assert!(rig.ring.take().unwrap().is_some());
    // Once more.
    rig.ring.add(&rig.chain(&[(0, 1)], &[(0, 1), (0, 1)])).unwrap();
    rig.give_back(2, 999, 0);
    assert_eq!(rig.ring.take(), Err(RingError::NotGiven(999)));
}

#[test]
fn a_full_ring_takes_a_chain_when_there_is_room_again() {
    let mut rig = Rig::new();
    let pages: Vec<_> = (0..u64::from(SIZE)).map(|page| ((page % 256) << 12, 1)).collect();
    let (whole, one) = (rig.chain(&pages, &[]), rig.chain(&[], &[(0, 1)]));
    for round in 1..=3 {
        let head = rig.ring.add(&whole).unwrap();
        assert!(rig.ring.add(&one).is_none());
        rig.ring.publish();
        rig.give_back(2 * round - 1, head.into(), 0);
        assert_eq!(rig.ring.take(), Ok(Some((head, 0))));
        let head = rig.ring.add(&one).unwrap();
        assert!(rig.ring.add(&whole).is_none());
        rig.ring.publish();
        rig.give_back(2 * round, head.into(), 1);
        assert_eq!(rig.ring.take(), Ok(Some((head, 1))));
    }
    assert!(rig.ring.add(&rig.chain(&[], &[])).is_none(), "of nothing there is no chain");
}

/// Whatever is in the memory, each chain comes back once at most.
#[test]
fn noise_gives_no_chain_back_twice() {
    let mut rig = Rig::new();
    let mut seed = 0x2545_F491_4F6C_DD1D_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut out = std::collections::BTreeSet::new();
    let mut returned = 0_u32;
    for _ in 0..20_000 {
        if random() % 2 == 0 {
            let count = random() % 4 + 1;
            let pieces: Vec<_> = (0..count).map(|page| (page << 12, 1)).collect();
            if let Some(head) = rig.ring.add(&rig.chain(&[], &pieces)) {
                assert!(out.insert(head), "a head that is out");
                rig.ring.publish();
            }
        }
        // Near what would be right, or anywhere.
        let index = rig.number(USED + 2, 2);
        rig.set(USED + 2, index.wrapping_add(random() % 3), 2);
        rig.set(USED + 4 + 8 * (random() % u64::from(SIZE)), random() % 64, 4);
        rig.set((random() % (BYTES - 8)) & !7, random(), 8);
        match rig.ring.take() {
            Ok(Some((head, _))) => {
                assert!(out.remove(&head), "one that is not out");
                returned += 1;
            }
            Ok(None) => {}
            Err(_) => {
                rig.ring.reset();
                out.clear();
            }
        }
    }
    assert!(returned > 100, "{returned}");
}

#[test]
fn requests_to_a_back_end_that_is_gone_end_in_errors() {
    let rig = Rig::new();
    let answer = |served, chain: Chain| {
        let (_, written) = refuse(served, chain);
        let mut data = [0; 16];
        rig.guest.read(GuestPhys(0x3000), &mut data).unwrap();
        rig.guest.write(GuestPhys(0x3000), &[0; 16]).unwrap();
        (written, data)
    };
    let chain = |room| rig.chain(&[(0x1000, 40)], &[(0x3000, room)]);
    let mut ioerr = [0; 16];
    ioerr[4] = 1;
    assert_eq!(answer(Served::Blk, chain(5)), (1, ioerr));
    assert_eq!(answer(Served::Blk, rig.chain(&[(0x1000, 16)], &[])), (0, [0; 16]));
    rig.guest.write(GuestPhys(0x1008), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let eio = [16, 0, 0, 0, 0xFB, 0xFF, 0xFF, 0xFF, 1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(answer(Served::Fs, chain(16)), (16, eio));
    assert_eq!(answer(Served::Fs, chain(15)), (0, [0; 16]));
    assert_eq!(answer(Served::Net, chain(16)), (0, [0; 16]));
}
