//! The queues from the driver's side.

use std::sync::Arc;

use tetrarch_memory::{GuestMemory, GuestPhys};

use super::*;

const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const DATA: u64 = 0x8000;
const SIZE: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A buffer as a driver gives it: address, length, flags.
type Buffer = (u64, u32, u16);

/// A driver that does as it is told, right or wrong.
struct Driver {
    memory: Arc<GuestMemory>,
    packed: bool,
    size: u16,
    /// Split: idx of the available ring. Packed: the next slot.
    next: u16,
    wrap: bool,
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(1 << 20).unwrap())
}

fn config(packed: bool, event_index: bool) -> QueueConfig {
    QueueConfig {
        size: SIZE,
        descriptors: GuestPhys(DESCRIPTORS),
        driver: GuestPhys(DRIVER),
        device: GuestPhys(DEVICE),
        packed,
        event_index,
        indirect: true,
    }
}

fn pair(packed: bool, event_index: bool) -> (Driver, Queue) {
    let memory = memory();
    let queue = Queue::new(Arc::clone(&memory), config(packed, event_index), None).unwrap();
    (Driver { memory, packed, size: SIZE, next: 0, wrap: true }, queue)
}

impl Driver {
    fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(GuestPhys(address), data).unwrap();
    }

    fn put16(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }

    fn get16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.memory.read(GuestPhys(address), &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    fn get32(&self, address: u64) -> u32 {
        u32::from(self.get16(address)) | u32::from(self.get16(address + 2)) << 16
    }

    fn descriptor(&self, table: u64, index: u16, buffer: Buffer, last: [u16; 2]) {
        let at = table + 16 * u64::from(index);
        self.put(at, &buffer.0.to_le_bytes());
        self.put(at + 8, &buffer.1.to_le_bytes());
        self.put16(at + 12, last[0]);
        self.put16(at + 14, last[1]);
    }

    /// Makes a chain available from a slot on: split rings use descriptors from `head` on.
    fn offer(&mut self, head: u16, buffers: &[Buffer]) {
        if self.packed {
            let (first, mut flags_of_first) = (self.next, 0);
            for (count, &buffer) in buffers.iter().enumerate() {
                let bits = if self.wrap { 1 << 7 } else { 1 << 15 };
                let next = if count + 1 < buffers.len() { NEXT } else { 0 };
                let flags = buffer.2 | next | bits;
                let index = self.next;
                if count == 0 {
                    flags_of_first = flags;
                    self.descriptor(
                        DESCRIPTORS,
                        index,
                        buffer,
                        [head, self.get16(DESCRIPTORS + 16 * u64::from(index) + 14)],
                    );
                } else {
                    self.descriptor(DESCRIPTORS, index, buffer, [head, flags]);
                }
                self.next += 1;
                if self.next == self.size {
                    self.next = 0;
                    self.wrap = !self.wrap;
                }
            }
            self.put16(DESCRIPTORS + 16 * u64::from(first) + 14, flags_of_first);
        } else {
            for (count, &buffer) in (0..).zip(buffers) {
                let last = count + 1 == buffers.len() as u16;
                let flags = buffer.2 | if last { 0 } else { NEXT };
                self.descriptor(DESCRIPTORS, head + count, buffer, [flags, head + count + 1]);
            }
            self.put16(DRIVER + 4 + 2 * u64::from(self.next % self.size), head);
            self.next = self.next.wrapping_add(1);
            self.put16(DRIVER + 2, self.next);
        }
    }

    /// (id, written) of a used entry.
    fn used(&self, index: u16) -> (u32, u32) {
        if self.packed {
            let at = DESCRIPTORS + 16 * u64::from(index);
            (u32::from(self.get16(at + 12)), self.get32(at + 8))
        } else {
            let at = DEVICE + 4 + 8 * u64::from(index);
            (self.get32(at), self.get32(at + 4))
        }
    }
}

fn text(list: &tetrarch_memory::ScatterList) -> Vec<u8> {
    let mut data = vec![0; list.len() as usize];
    list.read_at(0, &mut data);
    data
}

#[test]
fn chains_come_and_go_in_order_through_many_wraps() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, false);
        let mut slot = 0;
        for turn in 0..100_u16 {
            driver.put(DATA, &turn.to_le_bytes());
            driver.offer(
                turn % 3,
                &[(DATA, 2, 0), (DATA + 0x100, 4, WRITE), (DATA + 0x200, 4, WRITE)],
            );
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!(text(&chain.readable), turn.to_le_bytes());
            assert_eq!(chain.writable.len(), 8);
            assert!(queue.pop().unwrap().is_none());
            assert_eq!(chain.writable.write_at(2, b"done"), 4);
            queue.push(chain.used, 6);
            assert_eq!(driver.used(slot), (u32::from(turn % 3), 6), "packed {packed} {turn}");
            slot = if packed { (slot + 3) % SIZE } else { (slot + 1) % SIZE };
            if !packed {
                assert_eq!(driver.get16(DEVICE + 2), turn + 1);
            }
            assert!(queue.wants_interrupt());
            assert!(!queue.wants_interrupt(), "nothing since");
        }
    }
}

#[test]
fn several_chains_are_put_back_and_given_back_together() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, false);
        for turn in 0..40_u16 {
            for head in 0..3 {
                driver.offer(head, &[(DATA + 0x100 * u64::from(head), 4, WRITE)]);
            }
            for last in [true, false] {
                let mut chains = Vec::new();
                while let Some(chain) = queue.pop().unwrap() {
                    chains.push(chain);
                }
                assert_eq!(chains.len(), 3, "packed {packed}, turn {turn}");
                if last {
                    chains.into_iter().rev().for_each(|chain| queue.put_back(chain.used));
                } else {
                    queue.push_all(chains.into_iter().zip(1..).map(|(chain, n)| (chain.used, n)));
                }
            }
            let slots = (0..3).map(|count| (turn * 3 + count) % SIZE);
            for (slot, head) in slots.zip(0..) {
                assert_eq!(driver.used(slot), (head, head + 1), "packed {packed}, turn {turn}");
            }
            assert!(queue.wants_interrupt());
        }
    }
}

#[test]
fn indirect_tables_are_chains() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, false);
        for index in 0..3_u16 {
            let flags = if index == 2 { WRITE } else { 0 };
            let buffer = (DATA + 0x100 * u64::from(index), 1 + u32::from(index), flags);
            let next = if index < 2 { flags | NEXT } else { flags };
            let last = if packed { [0, flags] } else { [next, index + 1] };
            driver.descriptor(TABLE, index, buffer, last);
        }
        driver.offer(5, &[(TABLE, 48, INDIRECT)]);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (3, 3));
        queue.push(chain.used, 3);
        assert_eq!(driver.used(0), (5, 3));
    }
}

#[test]
fn notifications_and_interrupts_can_be_spared() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, false);
        let serve = |driver: &mut Driver, queue: &mut Queue| {
            driver.offer(0, &[(DATA, 1, WRITE)]);
            let chain = queue.pop().unwrap().unwrap();
            queue.push(chain.used, 1);
            queue.wants_interrupt()
        };
        let driver_flags = if packed { DRIVER + 2 } else { DRIVER };
        let device_flags = if packed { DEVICE + 2 } else { DEVICE };
        driver.put16(driver_flags, 1);
        assert!(!serve(&mut driver, &mut queue));
        driver.put16(driver_flags, 0);
        assert!(serve(&mut driver, &mut queue));
        queue.spare_notifications();
        assert_eq!(driver.get16(device_flags), 1);
        assert!(!queue.ask_notification());
        assert_eq!(driver.get16(device_flags), 0);
        queue.spare_notifications();
        driver.offer(0, &[(DATA, 1, WRITE)]);
        assert!(queue.ask_notification(), "it came while notifications were off");
    }
}

/// Serves chains of one descriptor; the interrupts that there were, by chain.
fn interrupts(packed: bool, chains: u16, batch: u16, event_after: impl Fn(u16) -> u16) -> Vec<u16> {
    let (mut driver, mut queue) = pair(packed, true);
    let mut seen = Vec::new();
    for turn in 0..chains {
        if packed {
            let event = event_after(turn);
            let wrapped = (event / SIZE) % 2 == 1;
            driver.put16(DRIVER, (event % SIZE) | if wrapped { 0 } else { 1 << 15 });
            driver.put16(DRIVER + 2, 2);
        } else {
            driver.put16(DRIVER + 4 + 2 * u64::from(SIZE), event_after(turn));
        }
        driver.offer(0, &[(DATA, 1, WRITE)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.push(chain.used, 0);
        if (turn + 1) % batch == 0 && queue.wants_interrupt() {
            seen.push(turn);
        }
    }
    seen
}

#[test]
fn interrupts_come_at_the_index_that_the_driver_named() {
    for packed in [false, true] {
        // Every third: an interrupt when entry 3n + 2 is used.
        let every_third = |turn: u16| turn / 3 * 3 + 2;
        assert_eq!(interrupts(packed, 30, 1, every_third), [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]);
        // In batches of four each batch of which holds the entry that was named.
        let in_batch = |turn: u16| turn / 4 * 4 + 1;
        assert_eq!(interrupts(packed, 24, 4, in_batch), [3, 7, 11, 15, 19, 23]);
        // Never: the named one lies always half a ring ahead.
        assert!(interrupts(packed, 40, 1, |turn| turn + 4).is_empty());
    }
}

#[test]
fn driver_is_asked_to_notify_at_the_next_chain() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, true);
        for turn in 0..20_u16 {
            assert!(!queue.ask_notification());
            let event = if packed { DEVICE } else { DEVICE + 4 + 8 * u64::from(SIZE) };
            let wrap = if (turn / SIZE).is_multiple_of(2) { 1 << 15 } else { 0 };
            let expected = if packed { (turn % SIZE) | wrap } else { turn };
            assert_eq!(driver.get16(event), expected);
            driver.offer(0, &[(DATA, 1, WRITE)]);
            let chain = queue.pop().unwrap().unwrap();
            queue.push(chain.used, 0);
        }
    }
}

#[test]
fn queue_goes_on_from_a_saved_position() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, true);
        for turn in 0..50_u16 {
            driver.offer(1, &[(DATA, 1, 0), (DATA, 1, WRITE), (DATA, 1, WRITE)]);
            let position = queue.position();
            queue = Queue::new(Arc::clone(&driver.memory), config(packed, true), Some(position))
                .unwrap();
            let chain = queue.pop().unwrap().unwrap_or_else(|| panic!("packed {packed} {turn}"));
            queue.push(chain.used, 0);
        }
        let beyond = QueuePosition { available: SIZE, used: 0 };
        let found = Queue::new(Arc::clone(&driver.memory), config(packed, true), Some(beyond));
        assert_eq!(found.is_err(), packed);
    }
}

#[test]
fn what_breaks_the_rules_is_an_error_and_ends() {
    type Broken = fn(&mut Driver);
    let both: &[(&str, Broken)] = &[
        ("outside RAM", |driver| driver.offer(0, &[(1 << 40, 1, 0)])),
        ("over the end", |driver| driver.offer(0, &[((1 << 20) - 1, 2, 0)])),
        ("wraps", |driver| driver.offer(0, &[(u64::MAX, 2, WRITE)])),
        ("order", |driver| driver.offer(0, &[(DATA, 1, WRITE), (DATA, 1, 0)])),
        ("table outside", |driver| driver.offer(0, &[(1 << 40, 16, INDIRECT)])),
        ("table of a part", |driver| driver.offer(0, &[(TABLE, 17, INDIRECT)])),
        ("table of nothing", |driver| driver.offer(0, &[(TABLE, 0, INDIRECT)])),
        ("table that goes on", |driver| driver.offer(0, &[(TABLE, 16, INDIRECT | NEXT)])),
        ("4 GiB", |driver| {
            // Of a table whose entries name the same megabyte again and again.
            for index in 0..1024 {
                let flags = if driver.packed { [0, 0] } else { [NEXT, index + 1] };
                driver.descriptor(0x1_0000, index, (0, 1 << 20, 0), flags);
            }
            driver.offer(0, &[(0x1_0000, 0x4000 * 1024, INDIRECT)]);
        }),
    ];
    let split: &[(&str, Broken)] = &[
        ("no descriptor", |driver| {
            driver.offer(0, &[(DATA, 1, 0)]);
            driver.put16(DRIVER + 4, SIZE);
        }),
        ("next is none", |driver| {
            driver.descriptor(DESCRIPTORS, 0, (DATA, 1, 0), [NEXT, 0xFFFF]);
            driver.put16(DRIVER + 2, 1);
        }),
        ("loop", |driver| {
            driver.descriptor(DESCRIPTORS, 0, (DATA, 1, 0), [NEXT, 0]);
            driver.put16(DRIVER + 2, 1);
        }),
        ("loop in a table", |driver| {
            driver.descriptor(TABLE, 0, (DATA, 1, 0), [NEXT, 0]);
            driver.offer(0, &[(TABLE, 16, INDIRECT)]);
        }),
        ("table in a table", |driver| {
            driver.descriptor(TABLE, 0, (TABLE, 16, 0), [INDIRECT, 0]);
            driver.offer(0, &[(TABLE, 16, INDIRECT)]);
        }),
        ("too many", |driver| driver.put16(DRIVER + 2, SIZE + 1)),
        ("went back", |driver| driver.put16(DRIVER + 2, 0xFFFF)),
    ];
    let packed: &[(&str, Broken)] = &[
        ("never ends", |driver| {
            for index in 0..SIZE {
                driver.descriptor(DESCRIPTORS, index, (DATA, 1, 0), [0, NEXT | 1 << 7]);
            }
        }),
        ("table behind another", |driver| {
            driver.offer(0, &[(DATA, 1, 0), (TABLE, 16, INDIRECT)]);
        }),
    ];
    for (is_packed, cases) in [(false, both), (true, both), (false, split), (true, packed)] {
        for (what, broken) in cases {
            let (mut driver, mut queue) = pair(is_packed, false);
            broken(&mut driver);
            assert!(queue.pop().is_err(), "{what}, packed {is_packed}");
        }
    }
    let (mut driver, _) = pair(false, false);
    driver.offer(0, &[(TABLE, 16, INDIRECT)]);
    let direct = QueueConfig { indirect: false, ..config(false, false) };
    let mut queue = Queue::new(Arc::clone(&driver.memory), direct, None).unwrap();
    assert!(matches!(queue.pop(), Err(QueueError::Indirect)), "not negotiated");
}

#[test]
fn no_more_is_in_flight_than_the_ring_has() {
    for packed in [false, true] {
        let (mut driver, mut queue) = pair(packed, false);
        let mut popped = Vec::new();
        for head in 0..SIZE {
            driver.offer(head, &[(DATA, 16, 0)]);
            popped.push(queue.pop().unwrap().unwrap().used);
        }
        // What was put back is none of them, nor what is given back.
        queue.put_back(popped.pop().unwrap());
        popped.push(queue.pop().unwrap().unwrap().used);
        queue.push(popped.remove(0), 0);
        driver.offer(0, &[(DATA, 16, 0)]);
        popped.push(queue.pop().unwrap().unwrap().used);
        // One of those that the device still has. RAM that comes changes nothing of it.
        driver.memory.add_region(GuestPhys(1 << 31), 0x1000).unwrap();
        driver.offer(1, &[(DATA, 16, 0)]);
        assert!(matches!(queue.pop(), Err(QueueError::InFlight)), "packed {packed}");
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let memory = memory();
    for packed in [false, true] {
        let good = config(packed, true);
        for size in [0, 3, MAX_SIZE + 1, u16::MAX] {
            // A packed ring may have any size.
            let refused =
                Queue::new(Arc::clone(&memory), QueueConfig { size, ..good }, None).is_err();
            assert_eq!(refused, !packed || size != 3, "{size}");
        }
        for bad in [
            QueueConfig { descriptors: GuestPhys(DESCRIPTORS + 8), ..good },
            QueueConfig { driver: GuestPhys(DRIVER + 1), ..good },
            QueueConfig { device: GuestPhys(DEVICE + 2), ..good },
            QueueConfig { descriptors: GuestPhys((1 << 20) - 16), ..good },
            QueueConfig { driver: GuestPhys(1 << 20), ..good },
            QueueConfig { device: GuestPhys(u64::MAX - 3), ..good },
        ] {
            assert!(Queue::new(Arc::clone(&memory), bad, None).is_err(), "{bad:?}");
        }
    }
}

#[test]
fn ring_is_found_again_where_ram_changes_and_missed_where_it_goes() {
    let memory = memory();
    let region = memory.add_region(GuestPhys(1 << 30), 0x4000).unwrap();
    let at = |offset: u64| GuestPhys((1 << 30) + offset);
    let config = QueueConfig {
        descriptors: at(0),
        driver: at(0x1000),
        device: at(0x2000),
        ..config(false, false)
    };
    let mut queue = Queue::new(Arc::clone(&memory), config, None).unwrap();
    memory.add_region(GuestPhys(1 << 31), 0x1000).unwrap();
    assert!(queue.pop().unwrap().is_none());
    drop(memory.remove_region(region.start).unwrap());
    assert!(queue.pop().is_err());
}
