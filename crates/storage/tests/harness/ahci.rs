//! A driver of an AHCI controller.

use std::sync::Arc;

use tetrarch_bus::Device;
use tetrarch_storage::ahci::{Ahci, AhciRegisters, SLOTS};

use super::{
    BUFFERS, COMMANDS, Ground, Input, Nobody, PACKETS, TABLES, TRIM, address, change, drives,
    number, put_ranges, wait,
};

const PORTS: u64 = 4;
/// Of each port: the list, what is received, and a table for each slot.
const APART: u64 = 0x4000;
const RECEIVED: u64 = 0x400;
const TABLE: u64 = 0x1000;
const TABLE_BYTES: u64 = 0x180;

// Registers of the controller, and of a port.
const GHC: u64 = 0x04;
const LIST: u64 = 0x00;
const FRAMES: u64 = 0x08;
const ENABLED: u64 = 0x14;
const COMMAND: u64 = 0x18;
const TASK: u64 = 0x20;
const CONTROL: u64 = 0x2C;
const ACTIVE: u64 = 0x34;
const ISSUED: u64 = 0x38;
const RUNS: u64 = 1 | 1 << 4;

struct Rig {
    ground: Ground,
    ahci: Arc<Ahci>,
    registers: AhciRegisters,
}

impl Rig {
    fn write(&self, offset: u64, size: u8, value: u64) {
        self.registers.write(offset, size, value).expect("it is a register");
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        self.registers.read(offset, size).expect("it is a register")
    }

    fn port(port: u64, register: u64) -> u64 {
        0x100 + 0x80 * port + register
    }

    fn set(&self, port: u64, register: u64, value: u64) {
        self.write(Self::port(port, register), 4, value);
    }

    /// As a good driver starts a port.
    fn start(&self, port: u64) {
        self.set(port, COMMAND, 0);
        self.set(port, LIST, TABLES + APART * port);
        self.set(port, LIST + 4, 0);
        self.set(port, FRAMES, TABLES + APART * port + RECEIVED);
        self.set(port, FRAMES + 4, 0);
        self.set(port, ENABLED, u64::from(u32::MAX));
        self.set(port, COMMAND, RUNS);
        self.write(GHC, 4, 1 << 31 | 2);
    }

    fn table(port: u64, slot: u64) -> u64 {
        TABLES + APART * port + TABLE + TABLE_BYTES * (slot % 16)
    }

    /// A command's header, with a table of so many regions.
    fn header(&self, port: u64, slot: u64, first: u32, table: u64) {
        let at = TABLES + APART * port + 32 * slot;
        self.ground.put(at, &first.to_le_bytes());
        self.ground.put(at + 8, &table.to_le_bytes());
    }
}

pub fn drive(input: &mut Input<'_>) {
    let ground = Ground::new();
    let memory = Arc::clone(&ground.memory);
    let line = Box::new(|_| ());
    let ahci = Ahci::new(&ground.io, memory, "fuzz", drives(true), line, Arc::new(Nobody));
    let ahci = Arc::new(ahci.expect("the host has events"));
    let rig = Rig { ground, registers: AhciRegisters(Arc::clone(&ahci)), ahci };
    (0..PORTS).for_each(|port| rig.start(port));
    while !input.has_ended() {
        step(&rig, input);
    }
    rig.ground.rest(|| ());
    // A good driver is served.
    rig.ahci.set_master(true);
    rig.ahci.reset();
    rig.ground.put(TABLES, &[0; 0x2000]);
    rig.start(0);
    rig.header(0, 3, 1 << 16 | 5, Rig::table(0, 3));
    let mut frame = [0; 20];
    (frame[0], frame[1], frame[2]) = (0x27, 0x80, 0xEC);
    rig.ground.put(Rig::table(0, 3), &frame);
    rig.ground.put(Rig::table(0, 3) + 0x80, &(u128::from(BUFFERS) | 511 << 96).to_le_bytes());
    rig.set(0, ISSUED, 8);
    wait("AHCI", || rig.read(Rig::port(0, ISSUED), 4) == 0);
    assert_eq!(rig.read(Rig::port(0, TASK), 4) & 0x89, 0, "neither busy nor an error");
    assert_ne!(rig.ground.get(BUFFERS + 200), 0, "how many sectors");
    rig.ahci.close();
}

fn step(rig: &Rig, input: &mut Input<'_>) {
    let op = input.byte();
    let port = u64::from(op >> 6);
    match op % 16 {
        0..=8 => command(rig, input, op),
        9 => rig.start(port),
        10 => {
            let register = u64::from(input.byte() % 16) * 4;
            let size = if op & 16 == 0 { 4 } else { 8 };
            rig.write(Rig::port(port, register), size, number(input));
        }
        11 => {
            let offset = u64::from(input.word()) % 0x1100;
            let size = 1 << (op >> 4 & 3);
            rig.write(offset, size, number(input));
            rig.read(offset, size);
        }
        12 => match op >> 4 & 3 {
            0 => rig.set(port, CONTROL, number(input)),
            1 => rig.set(port, COMMAND, number(input)),
            2 => rig.set(port, LIST, address(input)),
            _ => rig.set(port, FRAMES, address(input)),
        },
        13 => match op >> 4 {
            0 => rig.ahci.reset(),
            1..=3 => rig.ahci.set_master(false),
            4..=7 => rig.ahci.set_master(true),
            8 => rig.write(GHC, 4, 1),
            _ => rig.ground.rest(|| ()),
        },
        14 => save_and_load(rig, input),
        _ => rig.ground.change_memory(input),
    }
}

/// A command that is good but for what the input says.
fn command(rig: &Rig, input: &mut Input<'_>, op: u8) {
    let (port, bits, which) = (u64::from(op >> 6), input.byte(), input.byte());
    let slot = u64::from(bits) % SLOTS as u64;
    let regions = input.byte() % 16;
    let table = if op & 0b1111 == 8 { address(input) } else { Rig::table(port, slot) };
    let mut first = 5 | u32::from(regions) << 16;
    if input.byte().is_multiple_of(16) {
        first = number(input) as u32;
    }
    rig.header(port, slot, first, table);
    let code = match port {
        1 if op & 16 == 0 => 0xA0,
        _ => COMMANDS[usize::from(which) % COMMANDS.len()],
    };
    let mut frame = [0; 20];
    (frame[0], frame[1], frame[2]) = (0x27, 0x80, code);
    frame[4] = input.byte();
    frame[5] = input.byte() % 4;
    frame[7] = input.byte() & 0x4F | 0x40;
    (frame[3], frame[12]) = (input.byte(), input.byte() % 64);
    if matches!(code, 0x60 | 0x61) {
        (frame[3], frame[12]) = (frame[12], (slot as u8) << 3);
    }
    let trims = code == TRIM && bits & 0x80 == 0;
    if trims {
        (frame[3], frame[12]) = (1, 1);
        put_ranges(&rig.ground, input, false);
    }
    for _ in 0..(input.byte() % 16).saturating_sub(12) {
        frame[usize::from(input.byte() % 20)] = input.byte();
    }
    rig.ground.put(table, &frame);
    let mut packet = [0; 16];
    packet[0] = PACKETS[usize::from(which) % PACKETS.len()];
    for _ in 0..input.byte() % 6 {
        packet[1 + usize::from(input.byte() % 11)] = input.byte();
    }
    rig.ground.put(table.wrapping_add(0x40), &packet);
    for region in 0..u64::from(regions) {
        let bytes = match input.byte() % 4 {
            0 => 511,
            1 => u128::from(input.byte()),
            2 => u128::from(input.word()),
            _ => u128::from(number(input) as u32),
        };
        let (at, bytes) = if trims { (BUFFERS, 511) } else { (address(input), bytes) };
        let entry = u128::from(at) | bytes << 96;
        rig.ground.put(table.wrapping_add(0x80 + 16 * region), &entry.to_le_bytes());
    }
    let queued = matches!(code, 0x60 | 0x61) != (bits & 0x40 != 0 && bits & 0x20 != 0);
    if queued {
        rig.set(port, ACTIVE, 1 << slot);
    }
    rig.set(port, ISSUED, 1 << slot);
    if bits & 0x80 == 0 {
        rig.ground.rest(|| ());
    }
}

/// A controller is saved and loaded; then one with other numbers is.
fn save_and_load(rig: &Rig, input: &mut Input<'_>) {
    let ahci = &rig.ahci;
    rig.ground.rest(|| {
        let saved = ahci.save();
        ahci.load(&saved).expect("what was saved can be loaded");
        let mut other = saved;
        change(input, &mut other.controller);
        let port = usize::from(input.byte()) % other.ports.len();
        change(input, &mut other.ports[port]);
        let _ = ahci.load(&other);
    });
}
