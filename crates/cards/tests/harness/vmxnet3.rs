//! A driver of VMXNET3 that writes anything into what it shares, rings and registers.

use std::sync::Arc;

use tetrarch_bus::{Device, Interrupt};
use tetrarch_cards::vmxnet3::{Causes, MAX_INTERRUPTS, Vmxnet3};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::input::Input;
use super::{BUFFERS, EXTRA, EXTRA_BYTES, Host, MAC, RAM, RINGS, address, frame};

// Where the driver has what it shares, and its rings.
const SHARED: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const LISTS: u64 = 0x3000;
const RING: u64 = 0x400;
const SIZE: u64 = 32;
const MAGIC: u32 = 3_133_079_265;

const TXPROD: u64 = 0x600;
const RXPROD: u64 = 0x800;

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self) {}
}

struct Rig {
    host: Host,
    memory: Arc<GuestMemory>,
    card: Vmxnet3,
    registers: Box<dyn Device>,
    tx: u64,
    rx: u64,
    /// How many descriptors were given, by ring.
    given: [u64; 24],
}

impl Rig {
    fn new(ends: usize) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).expect("memory for a guest"));
        let (host, network) = Host::new(ends);
        let causes = Arc::new(Causes::new(Box::new(|_| ())));
        let vectors = (0..MAX_INTERRUPTS).map(|number| match number % 2 {
            0 => causes.interrupt(number),
            _ => Arc::new(Nobody),
        });
        let vectors = vectors.collect();
        let own = Arc::clone(&memory);
        let card = Vmxnet3::new(&host.io, own, "fuzz", MAC, network, causes, vectors);
        let card = card.expect("the host has events");
        let registers = Box::new(card.registers());
        Self { host, memory, card, registers, tx: 1, rx: 1, given: [0; 24] }
    }

    fn put(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write(GuestPhys(address), data);
    }

    fn word(&self, address: u64, value: u32) {
        self.put(address, &value.to_le_bytes());
    }

    /// Rings of queues: to send and its completions, then to receive, twice, and theirs.
    fn ring(&self, number: u64) -> u64 {
        RINGS + number * RING
    }

    /// Writes what a good driver shares.
    fn set_up(&mut self, tx: u64, rx: u64, features: u32) {
        (self.tx, self.rx, self.given) = (tx, rx, [0; 24]);
        self.put(SHARED, &[0; 720]);
        self.put(TABLE, &[0; 256 * 8]);
        self.put(RINGS, &vec![0; 24 * RING as usize]);
        self.word(SHARED, MAGIC);
        self.word(SHARED + 24, features);
        self.word(SHARED + 40, TABLE as u32);
        self.word(SHARED + 52, (tx + rx) as u32 * 256);
        self.word(SHARED + 56, 1500);
        self.word(SHARED + 60, (tx << 16 | rx << 24) as u32);
        self.word(SHARED + 80, 1);
        self.word(SHARED + 120, 0x1F);
        self.word(SHARED + 652, 176);
        self.word(SHARED + 656, LISTS as u32);
        for queue in 0..tx + rx {
            let at = TABLE + 256 * queue;
            let rings = if queue < tx {
                [self.ring(2 * queue), 0, self.ring(2 * queue + 1)]
            } else {
                let first = 2 * tx + 4 * (queue - tx);
                [self.ring(first), self.ring(first + 1), self.ring(first + 2)]
            };
            let sizes = if queue < tx { [SIZE, 0, SIZE] } else { [SIZE, SIZE, 2 * SIZE] };
            for (index, (ring, size)) in (0..).zip(rings.into_iter().zip(sizes)) {
                self.word(at + 16 + 8 * index, ring as u32);
                self.word(at + 56 + 4 * index, size as u32);
            }
            self.word(at + 72, queue as u32);
        }
    }

    /// Gives a descriptor in a ring; its generation is right, unless `turn` says otherwise.
    fn give(&mut self, ring: u64, bit: u32, turn: bool, (address, word2, word3): (u64, u32, u32)) {
        let given = &mut self.given[ring as usize % 24];
        let (index, round) = (*given % SIZE, *given / SIZE);
        *given += 1;
        let generation = u32::from(round.is_multiple_of(2) != turn) << bit;
        let at = self.ring(ring) + 16 * index;
        self.put(at, &address.to_le_bytes());
        self.word(at + 12, word3);
        self.word(at + 8, word2 & !(1 << bit) | generation);
    }

    fn kick(&self, offset: u64) {
        let _ = self.registers.write(offset, 4, 0);
    }
}

fn step(rig: &mut Rig, input: &mut Input<'_>) {
    let op = input.byte();
    let (tx, rx) = (rig.tx, rig.rx);
    match op % 16 {
        0 => {
            let features = u32::from(op >> 4);
            rig.set_up(1 + u64::from(op >> 4 & 1), 1 + u64::from(op >> 5 & 3), features);
            // Some of it is changed.
            for _ in 0..input.byte() % 3 {
                let at = if input.byte() & 1 == 0 { SHARED } else { TABLE };
                let at = at + u64::from(input.word() % 720) / 4 * 4;
                let value =
                    if input.byte() & 1 == 0 { address(input) as u32 } else { input.byte().into() };
                rig.word(at, value);
            }
            // What cannot be is refused.
            let _ = rig
                .card
                .activate(if op == 0x80 { address(input) } else { SHARED }, input.byte() & 1 != 0);
        }
        1..=4 => {
            let ring = 2 * (u64::from(input.byte()) % tx);
            for index in 0..1 + op / 64 {
                let last = index == op / 64 && op & 0x20 == 0;
                let any = input.byte();
                let bytes = frame(input);
                let at =
                    if any & 1 == 0 { BUFFERS + u64::from(input.word()) } else { address(input) };
                rig.put(at, &bytes);
                let length = if any & 2 == 0 { bytes.len() as u32 } else { input.word().into() };
                let position = u32::from(input.word() & 0x7FF);
                let mut word2 = length & 0x3FFF | position << 18;
                let mut word3 = u32::from(last) << 12 | 1 << 13 | u32::from(input.word() & 0xFFF);
                word3 = if last { word3 | 1 << 12 } else { word3 & !(1 << 12) };
                if any & 4 != 0 {
                    word3 |= 1 << 15 | u32::from(any) << 16;
                }
                if any == 0xFF {
                    word2 |= 1 << 16;
                }
                rig.give(ring, 14, any % 32 == 31, (at, word2, word3));
            }
            rig.kick(TXPROD + 4 * ring);
        }
        5..=7 => {
            let queue = u64::from(input.byte()) % rx;
            let second = u64::from(op >> 7);
            for _ in 0..op >> 4 {
                let any = input.byte();
                let length = if any & 8 == 0 { 2048 } else { u32::from(input.word()) & 0x7FFF };
                let at =
                    if any & 7 != 0 { BUFFERS + u64::from(input.word()) } else { address(input) };
                let body = u32::from(any & 16 != 0 || second == 1) << 14;
                let ring = 2 * tx + 4 * queue + second;
                rig.give(ring, 31, any == 0xFF, (at, length | body, 0));
            }
            rig.kick(RXPROD + 0x200 * second + 8 * queue);
        }
        8 | 9 => rig.host.arrive(input),
        10 => rig.host.drain(input),
        11 => {
            let offset = u64::from(input.word()) % 0x1000;
            let size = 1 << (op >> 6);
            let _ = rig.registers.read(offset, size);
            let _ = rig.registers.write(offset, size, input.long());
            for number in 0..u64::from(op >> 4) {
                let _ = rig.registers.write(8 * number, 4, u64::from(op & 0x80));
            }
        }
        12 => match op >> 4 {
            0 => rig.card.reset(),
            1 => rig.card.quiesce(),
            2..=4 => rig.card.set_master(false),
            5..=8 => rig.card.set_master(true),
            9 => rig.card.set_mac([2, 0, 0, 0, 0, op]),
            10 => drop(rig.card.take_causes()),
            11 => rig.card.clear_events(input.byte().into()),
            _ => rig.host.rest(|| ()),
        },
        13 => match op >> 4 {
            0 => rig.card.update_rx_mode(),
            1 => {
                rig.word(SHARED + 124, input.word().into());
                rig.put(SHARED + 128, &address(input).to_le_bytes());
                rig.card.update_mac_filters();
            }
            2 => rig.card.update_vlan_filters(),
            3..=5 => {
                let bytes = [op, 0, 1, 0, 40, 0, input.byte(), 0];
                rig.put(LISTS, &bytes);
                rig.put(LISTS + 48, &(0..128).map(|_| input.byte()).collect::<Vec<_>>());
                rig.put(
                    SHARED + 656,
                    &if op & 1 == 0 { LISTS } else { address(input) }.to_le_bytes(),
                );
                rig.card.update_rss();
            }
            6..=8 => {
                rig.word(SHARED + 24, input.byte().into());
                rig.card.update_features();
            }
            9..=11 => rig.card.put_status(),
            _ => rig.card.put_statistics(),
        },
        14 => save_and_load(rig, input),
        _ => {
            let start = GuestPhys(EXTRA);
            match input.byte() % 8 {
                0 => drop(rig.memory.add_region(start, EXTRA_BYTES)),
                1 => drop(rig.memory.remove_region(start)),
                _ => {
                    let at = address(input);
                    let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                    rig.put(at, &bytes);
                }
            }
        }
    }
}

/// A card is saved and loaded; then one with other numbers is loaded.
fn save_and_load(rig: &Rig, input: &mut Input<'_>) {
    let card = &rig.card;
    rig.host.rest(|| {
        let saved = card.save();
        // Its rings may be in memory that has gone.
        if card.load(&saved).is_ok() {
            assert_eq!(card.save(), saved, "what was saved is what was loaded");
        }
        let mut other = saved;
        for _ in 0..input.byte() % 4 {
            let value = if input.byte() & 1 == 0 { address(input) } else { input.byte().into() };
            let (row, at) = (usize::from(input.byte()), usize::from(input.byte()));
            let (tx, rx) = (other.tx.len().max(1), other.rx.len().max(1));
            let row = match row % 4 {
                0 => Some(&mut other.setup),
                1 => other.tx.get_mut(row / 4 % tx),
                _ => other.rx.get_mut(row / 4 % rx),
            };
            if let Some(row) = row
                && let length = row.len().max(1)
                && let Some(number) = row.get_mut(at % length)
            {
                *number = value;
            }
        }
        let _ = card.load(&other);
    });
}

/// A driver of a card, and then a good one.
pub fn run(mut input: Input<'_>) {
    let mut rig = Rig::new(1 + usize::from(input.byte() % 2));
    while !input.has_ended() {
        step(&mut rig, &mut input);
    }
    rig.card.set_master(true);
    rig.card.reset();
    rig.set_up(1, 1, 0);
    rig.card.activate(SHARED, false).expect("what a good driver shares");
    // The other end may be in the middle of a frame: what the guest sends is enough.
    let frame = [0xEE; 64];
    rig.put(BUFFERS, &frame);
    rig.give(0, 14, false, (BUFFERS, 64, 3 << 12));
    rig.kick(TXPROD);
    let Rig { host, memory, .. } = &mut rig;
    host.wait("a frame", || {
        let mut word = [0; 4];
        memory.read(GuestPhys(RINGS + RING + 12), &mut word).expect("it is RAM");
        u32::from_le_bytes(word) >> 31 != 0
    });
}
