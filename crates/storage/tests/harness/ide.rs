//! A driver of an IDE controller.

use std::sync::Arc;

use tetrarch_bus::Device;
use tetrarch_storage::ide::{CHANNELS, ControlPort, Ide, MasterPorts, TaskPorts};

use super::{
    BUFFERS, COMMANDS, Ground, Input, PACKETS, TABLES, TRIM, address, change, drives, number,
    put_ranges, wait,
};

/// The bus masters' tables, a page for each channel.
const APART: u64 = 0x1000;

const DATA_REQUEST: u64 = 1 << 3;
const BUSY: u64 = 1 << 7;

struct Rig {
    ground: Ground,
    ide: Arc<Ide>,
}

impl Rig {
    fn task(&self, channel: usize, offset: u64, value: u64) {
        let ports = TaskPorts(Arc::clone(&self.ide), channel);
        ports.write(offset, 1, value).expect("it is a port");
    }

    fn read(&self, channel: usize, offset: u64) -> u64 {
        let ports = TaskPorts(Arc::clone(&self.ide), channel);
        let size = if offset == 0 { 2 } else { 1 };
        ports.read(offset, size).expect("it is a port")
    }

    fn control(&self, channel: usize, value: u64) {
        let port = ControlPort(Arc::clone(&self.ide), channel);
        port.write(0, 1, value).expect("it is a port");
    }

    fn status(&self, channel: usize) -> u64 {
        ControlPort(Arc::clone(&self.ide), channel).read(0, 1).expect("it is a port")
    }

    fn master(&self, offset: u64, size: u8, value: u64) {
        MasterPorts(Arc::clone(&self.ide)).write(offset, size, value).expect("it is a port");
    }
}

pub fn drive(input: &mut Input<'_>) {
    let ground = Ground::new();
    let lines = [0; CHANNELS].map(|_| Box::new(|_: bool| ()) as tetrarch_devices::Drive);
    let ide = Ide::new(&ground.io, &ground.memory, "fuzz", drives(false), lines);
    let rig = Rig { ground, ide: Arc::new(ide.expect("the host has events")) };
    while !input.has_ended() {
        step(&rig, input);
    }
    rig.ground.rest(|| ());
    // A good driver is served.
    rig.ide.set_master(true);
    rig.ide.reset();
    rig.task(0, 6, 0xA0);
    rig.task(0, 7, 0xEC);
    wait("IDE", || rig.status(0) & (BUSY | DATA_REQUEST) == DATA_REQUEST);
    let words: Vec<u64> = (0..256).map(|_| rig.read(0, 0)).collect();
    assert_ne!(words[60], 0, "how many sectors");
    assert_eq!(rig.read(0, 7) & (BUSY | DATA_REQUEST | 1), 0, "neither data nor an error");
    rig.ide.close();
}

fn step(rig: &Rig, input: &mut Input<'_>) {
    let op = input.byte();
    let channel = usize::from(op >> 7);
    match op % 16 {
        0..=6 => command(rig, input, op),
        7 | 8 => move_words(rig, input, op),
        9 => {
            let (offset, size) = (u64::from(op >> 4 & 7), 1 << (input.byte() % 3));
            if offset + u64::from(size) <= 8 {
                let ports = TaskPorts(Arc::clone(&rig.ide), channel);
                ports.write(offset, size, number(input)).expect("they are ports");
                ports.read(offset, size).expect("they are ports");
            }
        }
        10 => rig.control(channel, u64::from(input.byte() & 0x8F)),
        11 => {
            let (offset, size) = (u64::from(input.byte() % 16), 1 << ((op >> 4 & 3) % 3));
            rig.master(offset, size, number(input));
            let masters = MasterPorts(Arc::clone(&rig.ide));
            masters.read(offset, size).expect("they are ports");
        }
        12 => table(rig, input, channel),
        13 => match op >> 4 {
            0 => rig.ide.reset(),
            1..=3 => rig.ide.set_master(false),
            4..=7 => rig.ide.set_master(true),
            _ => rig.ground.rest(|| ()),
        },
        14 => save_and_load(rig, input),
        _ => rig.ground.change_memory(input),
    }
}

/// The bus master's regions, and perhaps its start.
fn table(rig: &Rig, input: &mut Input<'_>, channel: usize) {
    let at = TABLES + APART * channel as u64;
    let bits = input.byte();
    let regions = u64::from(bits % 8);
    for region in 0..regions {
        let bytes = match input.byte() % 4 {
            0 => 512,
            1 => u64::from(input.byte()),
            2 => u64::from(input.word()),
            _ => 0,
        };
        let last = region + 1 == regions && bits & 8 == 0;
        let entry = address(input) & 0xFFFF_FFFF | bytes << 32 | u64::from(last) << 63;
        rig.ground.put(at + 8 * region, &entry.to_le_bytes());
    }
    let master = 8 * channel as u64;
    let place = if bits & 0x70 == 0 { address(input) } else { at };
    rig.master(master + 4, 4, place & 0xFFFF_FFFF);
    if bits & 0x80 != 0 {
        rig.master(master, 1, 1 | u64::from(bits & 16) >> 1);
    }
}

/// Data as it is asked for, to its end or to somewhere before.
fn move_words(rig: &Rig, input: &mut Input<'_>, op: u8) {
    let channel = usize::from(op >> 7);
    let ports = TaskPorts(Arc::clone(&rig.ide), channel);
    let count = if op & 16 == 0 { 256 } else { u32::from(input.word() % 2048) };
    let (size, value) = (if op & 64 == 0 { 2 } else { 4 }, number(input));
    for _ in 0..count {
        let done =
            if op & 32 == 0 { ports.read(0, size).map(drop) } else { ports.write(0, size, value) };
        done.expect("it is the data port");
    }
    rig.ground.rest(|| ());
}

/// A command that is good but for what the input says.
fn command(rig: &Rig, input: &mut Input<'_>, op: u8) {
    let (channel, second, which) = (usize::from(op >> 7), op >> 6 & 1, input.byte());
    let is_cd = channel == 0 && second == 1;
    let packet = is_cd && op & 16 == 0;
    let code = if packet { 0xA0 } else { COMMANDS[usize::from(which) % COMMANDS.len()] };
    rig.task(channel, 6, u64::from(0xE0 | second << 4));
    let wide = [0x24, 0x29, 0x25, 0x34, 0x39, 0xCE, 0x35, 0x3D, 0x42, 0xEA].contains(&code);
    for register in 1..=5 {
        if wide {
            rig.task(channel, register, u64::from(input.byte().is_multiple_of(64)));
        }
        let value = match (register, packet) {
            (1, _) => input.byte() % 4,
            (2, _) => input.byte() % 32,
            (4, true) => input.byte(),
            (4, _) => input.byte() % 4,
            (5, _) => u8::from(input.byte() == 0),
            _ => input.byte(),
        };
        rig.task(channel, register, value.into());
    }
    if !input.byte().is_multiple_of(4) {
        table(rig, input, channel);
    }
    if code == TRIM {
        // Of one sector, with all of it in one region that goes from memory.
        put_ranges(&rig.ground, input, false);
        let (at, master) = (TABLES + APART * channel as u64, 8 * channel as u64);
        rig.ground.put(at, &(BUFFERS | 512 << 32 | 1 << 63).to_le_bytes());
        rig.master(master + 4, 4, at);
        rig.master(master, 1, 0);
        rig.task(channel, 1, 1);
        (0..2).for_each(|high| rig.task(channel, 2, high));
        rig.master(master, 1, 1);
    }
    rig.task(channel, 7, code.into());
    if packet {
        let ports = TaskPorts(Arc::clone(&rig.ide), channel);
        let mut packet = [0; 12];
        packet[0] = PACKETS[usize::from(which) % PACKETS.len()];
        for _ in 0..input.byte() % 6 {
            packet[1 + usize::from(input.byte() % 11)] = input.byte();
        }
        for word in packet.chunks(2) {
            let word = u64::from(word[0]) | u64::from(word[1]) << 8;
            ports.write(0, 2, word).expect("it is the data port");
        }
    }
    if op & 32 == 0 {
        rig.ground.rest(|| ());
    }
}

/// A controller is saved and loaded; then one with other numbers is.
fn save_and_load(rig: &Rig, input: &mut Input<'_>) {
    let ide = &rig.ide;
    rig.ground.rest(|| {
        let saved = ide.save();
        ide.load(&saved).expect("what was saved can be loaded");
        assert_eq!(ide.save(), saved, "what was saved is what was loaded");
        let mut other = saved;
        for rows in [&mut other.channels, &mut other.buffers, &mut other.drives] {
            let row = usize::from(input.byte()) % rows.len();
            change(input, &mut rows[row]);
        }
        if ide.load(&other).is_err() {
            ide.reset();
        }
    });
}
