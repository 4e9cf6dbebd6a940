//! A driver of the 82540EM that writes anything into rings and registers.

use std::sync::Arc;

use tetrarch_bus::Device;
use tetrarch_cards::e1000::{E1000, FIRST_REGISTER};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::input::Input;
use super::{BUFFERS, EXTRA, EXTRA_BYTES, Host, MAC, RAM, RINGS, address, frame};

const SIZE: u32 = 32;
const TX: u64 = RINGS;
const RX: u64 = RINGS + 0x1000;

const RCTL: u32 = 0x0100;
const TCTL: u32 = 0x0400;
const RING_REGISTERS: [u32; 2] = [0x3800, 0x2800];
const HEAD: u32 = 0x10;
const TAIL: u32 = 0x18;
const RXCSUM: u32 = 0x5000;
const ON: u32 = 1 << 1;

// Commands of descriptors.
const END: u32 = 1 << 24;
const REPORT: u32 = 1 << 27;
const EXTENDED: u32 = 1 << 29;
const DATA: u32 = EXTENDED | 1 << 20;

/// Registers that drivers write.
const REGISTERS: [u32; 24] = [
    0x38, 0xC0, 0xC4, 0xC8, 0xD0, 0xD8, RCTL, TCTL, 0x2800, 0x2804, 0x2808, 0x2810, 0x2818, 0x2820,
    0x282C, 0x2C00, 0x3800, 0x3808, 0x3810, 0x3818, 0x3820, 0x3828, 0x382C, RXCSUM,
];

struct Rig {
    host: Host,
    memory: Arc<GuestMemory>,
    card: E1000,
    registers: Box<dyn Device>,
    /// Places of the next descriptors, to send and to receive.
    next: [u32; 2],
}

impl Rig {
    fn new(ends: usize) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).expect("memory for a guest"));
        let (host, network) = Host::new(ends);
        let own = Arc::clone(&memory);
        let card = E1000::new(&host.io, own, "fuzz", MAC, network, Box::new(|_| ()));
        let card = card.expect("the host has events");
        let registers = Box::new(card.registers());
        Self { host, memory, card, registers, next: [0; 2] }
    }

    fn put(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write(GuestPhys(address), data);
    }

    fn write(&self, register: u32, value: u32) {
        let _ = self.registers.write((register - FIRST_REGISTER).into(), 4, value.into());
    }

    /// Rings of a good driver, both ways on.
    fn set_up(&mut self, control: u32) {
        self.next = [0; 2];
        for (ring, registers) in [TX, RX].into_iter().zip(RING_REGISTERS) {
            self.put(ring, &[0; 16 * SIZE as usize]);
            self.write(registers, ring as u32);
            self.write(registers + 4, 0);
            self.write(registers + 8, 16 * SIZE);
            self.write(registers + HEAD, 0);
            self.write(registers + TAIL, 0);
        }
        self.write(RCTL, control | ON);
        self.write(TCTL, ON | control & 8);
    }

    /// Gives a descriptor in the ring to send, or to receive.
    fn give(&mut self, which: usize, (address, word2, word3): (u64, u32, u32)) {
        let at = [TX, RX][which] + 16 * u64::from(self.next[which]);
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &word2.to_le_bytes());
        self.put(at + 12, &word3.to_le_bytes());
        self.next[which] = (self.next[which] + 1) % SIZE;
    }

    fn ring(&self, which: usize) {
        self.write(RING_REGISTERS[which] + TAIL, self.next[which]);
    }
}

fn long_word(input: &mut Input<'_>) -> u32 {
    u32::from(input.word()) << 16 | u32::from(input.word())
}

fn send(rig: &mut Rig, op: u8, input: &mut Input<'_>) {
    if op & 0x30 == 0x30 {
        let address = if op & 0x40 == 0 {
            // Sums of IPv4 and TCP.
            0x0021_180E | u64::from(u32::from(input.byte()) << 16 | 0x3222) << 32
        } else {
            input.long()
        };
        let command = EXTENDED | u32::from(input.byte() & 0xF) << 24;
        let sizes = u32::from(input.byte()) << 8 | u32::from(input.word() & 0xFFF) << 16;
        rig.give(0, (address, command | long_word(input) & 0xF_FFFF, sizes));
    }
    for index in 0..1 + op / 64 {
        let any = input.byte();
        let bytes = frame(input);
        let at = if any & 1 == 0 { BUFFERS + u64::from(input.word()) } else { address(input) };
        rig.put(at, &bytes);
        let length = if any & 2 == 0 { bytes.len() as u32 } else { input.word().into() };
        let mut word2 = length | u32::from(input.byte() & !1) << 24;
        if index == op / 64 && any & 0x1C != 0x1C {
            word2 |= END;
        }
        word2 = match any >> 5 {
            0..=3 => word2 & !EXTENDED | u32::from(any) << 16,
            4..=6 => word2 | DATA,
            _ => word2 | EXTENDED | u32::from(any & 0xF) << 20,
        };
        rig.give(0, (at, word2, long_word(input)));
    }
    rig.ring(0);
}

fn step(rig: &mut Rig, input: &mut Input<'_>) {
    let op = input.byte();
    match op % 16 {
        0 => {
            let control = long_word(input);
            rig.set_up(control);
        }
        1..=4 => send(rig, op, input),
        5..=7 => {
            for _ in 0..op >> 4 {
                let any = input.byte();
                let at =
                    if any & 7 != 0 { BUFFERS + u64::from(input.word()) } else { address(input) };
                rig.give(1, (at, any.into(), any.into()));
            }
            rig.ring(1);
        }
        8 | 9 => rig.host.arrive(input),
        10 => rig.host.drain(input),
        11 => {
            let register = match op >> 4 {
                0..=9 => REGISTERS[usize::from(input.byte()) % REGISTERS.len()],
                10 => 0x5200 + u32::from(input.word()) % 0x600,
                11 => 0x4000 + u32::from(input.byte()),
                _ => FIRST_REGISTER + u32::from(input.word()),
            };
            let size = 1 << (op >> 4 & 3);
            let value = match input.byte() % 4 {
                0 => address(input),
                1 => input.byte().into(),
                2 => (RINGS + u64::from(input.word())) & !0x7F,
                _ => input.long(),
            };
            let offset = u64::from(register - FIRST_REGISTER);
            let _ = rig.registers.read(offset, size);
            let _ = rig.registers.write(offset, size.max(4), value);
        }
        12 => match op >> 4 {
            0 | 1 => rig.card.reset(),
            2..=4 => rig.card.set_master(false),
            5..=8 => rig.card.set_master(true),
            9 => rig.card.set_tags(input.byte() & 1 != 0),
            10 | 11 => rig.card.set_loopback(input.byte() & 1 != 0),
            12 => rig.card.raise(input.word().into()),
            _ => rig.host.rest(|| ()),
        },
        13 => {
            let control = long_word(input) | ON;
            rig.write(RCTL, control);
            rig.write(RXCSUM, u32::from(input.word() & 0x3FF));
        }
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
        card.load(&saved).expect("what was saved");
        assert_eq!(card.save(), saved, "what was saved is what was loaded");
        let mut other = saved;
        for _ in 0..input.byte() % 4 {
            let value = if input.byte() & 1 == 0 { long_word(input) } else { input.byte().into() };
            let (row, at) = (input.byte(), usize::from(input.byte()));
            let row = match row % 6 {
                0 => &mut other.registers[..],
                1 => &mut other.filter,
                2 => &mut other.interrupts,
                3 => &mut other.places,
                4 => &mut other.contexts,
                _ => &mut other.state,
            };
            let length = row.len();
            row[at % length] = value;
        }
        card.load(&other).expect("numbers are cut to those that there are");
    });
}

/// A driver of a card, and then a good one.
pub fn run(mut input: Input<'_>) {
    let mut rig = Rig::new(1 + usize::from(input.byte() % 2));
    while !input.has_ended() {
        step(&mut rig, &mut input);
    }
    rig.card.set_master(true);
    rig.card.set_loopback(false);
    rig.card.reset();
    rig.set_up(0);
    // The other end may be in the middle of a frame: what the guest sends is enough.
    rig.put(BUFFERS, &[0xEE; 64]);
    rig.give(0, (BUFFERS, 64 | END | REPORT | 1 << 25, 0));
    rig.ring(0);
    let Rig { host, memory, .. } = &mut rig;
    host.wait("a frame", || {
        let mut word = [0; 4];
        memory.read(GuestPhys(TX + 12), &mut word).expect("it is RAM");
        word[0] & 1 != 0
    });
}
