//! A driver of a PVSCSI controller.

use std::sync::Arc;

use tetrarch_bus::{Device, Interrupt};
use tetrarch_storage::pvscsi::{Pvscsi, RingPages};
use tetrarch_storage::scsi::Unit;

use super::{
    BUFFERS, EXTRA, Ground, Input, Nobody, PACKETS, TABLES, address, change, disk, number, wait,
};

const PAGE: u64 = 4096;
const STATE: u64 = TABLES;
const REQUESTS: u64 = TABLES + PAGE;
const COMPLETIONS: u64 = TABLES + 3 * PAGE;
const MESSAGES: u64 = TABLES + 5 * PAGE;
const LISTS: u64 = TABLES + 6 * PAGE;
const SENSE: u64 = TABLES + 8 * PAGE;
/// Requests of the ring, which has two pages.
const ENTRIES: u32 = 64;
/// Commands of disks, and one of nobody.
const COMMANDS: [u8; 27] = [
    0x00, 0x03, 0x08, 0x0A, 0x12, 0x1A, 0x1B, 0x25, 0x28, 0x2A, 0x2F, 0x35, 0x41, 0x42, 0x42, 0x5A,
    0x88, 0x8A, 0x8F, 0x91, 0x93, 0x93, 0x9E, 0xA0, 0xA8, 0xAA, 0xFF,
];

struct Rig {
    ground: Ground,
    pvscsi: Pvscsi,
    tail: u32,
}

impl Rig {
    fn good() -> RingPages {
        let pages = |at: u64| vec![at / PAGE, at / PAGE + 1];
        RingPages {
            state: STATE / PAGE,
            requests: pages(REQUESTS),
            completions: pages(COMPLETIONS),
        }
    }

    fn begin(&mut self) {
        self.pvscsi.reset_adapter();
        self.tail = 0;
        // The state may lie in memory that has gone.
        let _ = self.pvscsi.set_up_rings(&Self::good());
        let _ = self.pvscsi.set_up_messages(&[MESSAGES / PAGE]);
        let _ = self.pvscsi.set_threshold(true);
    }

    fn give(&mut self, entry: &[u8]) {
        let at = REQUESTS + 128 * u64::from(self.tail % ENTRIES);
        self.ground.put(at, entry);
        self.tail = self.tail.wrapping_add(1);
        self.ground.put(STATE, &self.tail.to_le_bytes());
    }

    fn register(&self, offset: u64, value: u64) {
        self.pvscsi.registers().write(offset, 4, value).expect("it is a register");
    }

    fn kick(&self) {
        self.register(0x3018, 0);
    }

    /// The driver takes all that was answered.
    fn take(&self) {
        let posted = self.ground.get(STATE + 12);
        self.ground.put(STATE + 16, &posted.to_le_bytes());
    }

    /// Of a context, target and command, with a buffer.
    fn entry(context: u64, target: u8, cdb: &[u8], flags: u32, data: (u64, u64)) -> Vec<u8> {
        let mut entry = context.to_le_bytes().to_vec();
        entry.extend(data.0.to_le_bytes());
        entry.extend(data.1.to_le_bytes());
        entry.extend(SENSE.to_le_bytes());
        entry.extend(18u32.to_le_bytes());
        entry.extend(flags.to_le_bytes());
        entry.extend(cdb);
        entry.resize(56, 0);
        entry.push(cdb.len() as u8);
        entry.resize(67, 0);
        entry.push(target);
        entry.resize(128, 0);
        entry
    }
}

fn unit(number: usize, readonly: bool) -> Unit {
    let disk = disk(readonly || number != 0);
    if number == 1 { Unit::cd(disk, "1") } else { Unit::disk(disk, "0") }
}

fn cdb(input: &mut Input<'_>, cd: bool) -> Vec<u8> {
    let choice = usize::from(input.byte());
    let code = match (choice, cd) {
        (255, _) => input.byte(),
        (_, true) => PACKETS[choice % PACKETS.len()],
        (_, false) => COMMANDS[choice % COMMANDS.len()],
    };
    let mut cdb = vec![0; 16];
    cdb[0] = code;
    if input.byte().is_multiple_of(4) {
        cdb[1..].fill_with(|| input.byte());
        return cdb;
    }
    cdb[1] = input.byte() & 0b0001_1011;
    let (first, count) = (input.word() % 600, input.byte());
    // Where each group has the low bits of its block's number, and how many.
    match code >> 5 {
        0 => (cdb[2], cdb[3], cdb[4]) = (input.byte() % 0xC0, first as u8, count),
        1 | 2 => (cdb[4], cdb[5], cdb[8]) = ((first >> 8) as u8, first as u8, count),
        5 => (cdb[4], cdb[5], cdb[9]) = ((first >> 8) as u8, first as u8, count),
        _ => (cdb[8], cdb[9], cdb[13]) = ((first >> 8) as u8, first as u8, count),
    }
    cdb
}

pub fn drive(input: &mut Input<'_>) {
    let ground = Ground::new();
    let memory = Arc::clone(&ground.memory);
    let messages = vec![Arc::new(Nobody) as Arc<dyn Interrupt>];
    let pvscsi = Pvscsi::new(&ground.io, memory, "fuzz", Box::new(|_| ()), messages)
        .expect("the host has events");
    let readonly = input.byte() & 1 != 0;
    (0..3).for_each(|number| pvscsi.attach(number, "unit", unit(number, readonly)).expect("free"));
    let mut rig = Rig { ground, pvscsi, tail: 0 };
    rig.begin();
    while !input.has_ended() {
        step(&mut rig, input);
    }
    rig.ground.rest(|| ());
    // A good driver is served.
    rig.pvscsi.set_master(true);
    rig.pvscsi.detach(0);
    rig.pvscsi.attach(0, "unit", unit(0, false)).expect("it was detached");
    rig.ground.put(TABLES, &vec![0; (LISTS - TABLES) as usize]);
    rig.begin();
    rig.give(&Rig::entry(7, 0, &[0x12, 0, 0, 0, 36, 0], 1 << 3, (BUFFERS, 36)));
    rig.kick();
    wait("PVSCSI", || rig.ground.get(STATE + 12) == 1);
    assert_eq!(rig.ground.get(COMPLETIONS), 7, "the context");
    assert_eq!(rig.ground.get(BUFFERS + 8).to_le_bytes(), *b"TETR", "the vendor");
    rig.pvscsi.close();
}

fn step(rig: &mut Rig, input: &mut Input<'_>) {
    let op = input.byte();
    match op % 16 {
        0 if op & 16 == 0 => rig.begin(),
        0 => {
            let mut pages = Rig::good();
            match op >> 5 {
                0 => pages.state = address(input) / PAGE,
                1 => pages.state = number(input),
                2 => pages.requests[1] = address(input) / PAGE,
                3 => pages.completions[0] = number(input),
                4 => pages.requests = vec![REQUESTS / PAGE; usize::from(input.byte() % 40)],
                5 => pages.completions = vec![EXTRA / PAGE; usize::from(input.byte() % 40)],
                _ => pages.completions = vec![COMPLETIONS / PAGE],
            }
            // What cannot be is refused.
            let _ = rig.pvscsi.set_up_rings(&pages);
            let _ = rig.pvscsi.set_up_messages(&vec![number(input); usize::from(op >> 5)]);
            rig.tail = 0;
        }
        1..=8 => {
            let target = if op & 0x80 == 0 { input.byte() % 4 } else { input.byte() };
            let cdb = cdb(input, target == 1);
            let length = if op & 0x40 == 0 { 16 } else { input.byte() % 20 };
            let flags = u32::from(input.byte()) % 32;
            let at = if flags & 1 != 0 && op & 0x20 == 0 { LISTS } else { address(input) };
            let room = if input.byte().is_multiple_of(8) { number(input) } else { 0x2_0000 };
            let mut entry = Rig::entry(op.into(), target, &cdb, flags, (at, room));
            entry[56] = length;
            if input.byte().is_multiple_of(16) {
                entry[24..32].copy_from_slice(&address(input).to_le_bytes());
            }
            if op & 0x10 == 0 {
                // A list of ranges for UNMAP is where its data is.
                let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
                list.extend((0..32).map(|_| input.byte() & 3));
                rig.ground.put(at, &list);
            }
            rig.give(&entry);
            if op & 8 == 0 {
                rig.kick();
            }
        }
        9 => {
            rig.take();
            rig.kick();
        }
        10 => match op >> 4 {
            // Indices of nonsense.
            0..=7 => {
                let at = STATE + 4 * (u64::from(input.byte()) % 36);
                rig.ground.put(at, &(number(input) as u32).to_le_bytes());
                rig.kick();
            }
            _ => {
                let offset = [0x0C, 0x1010, 0x2014, 0x3018, 0x3FFC][usize::from(op >> 4) % 5];
                rig.register(offset, number(input));
            }
        },
        11 => {
            for entry in 0..u64::from(input.byte() % 8) {
                let at = LISTS + 16 * (u64::from(op >> 4) * 32 + entry);
                let mut bytes = address(input).to_le_bytes().to_vec();
                bytes.extend(u32::from(input.word() % 9000).to_le_bytes());
                let chain = u32::from(input.byte().is_multiple_of(16));
                bytes.extend(chain.to_le_bytes());
                rig.ground.put(at, &bytes);
            }
        }
        12 => match op >> 4 {
            0 => rig.pvscsi.reset(),
            1..=3 => rig.pvscsi.set_master(false),
            4..=6 => rig.pvscsi.set_master(true),
            7 => rig.pvscsi.resized(usize::from(input.byte()) % 20),
            8 => drop(rig.pvscsi.reset_targets(None)),
            9 => drop(rig.pvscsi.reset_targets(Some(number(input) as usize))),
            10 => rig.pvscsi.abort(),
            11 => {
                let at = address(input);
                rig.ground.put(BUFFERS, &Rig::entry(1, op % 3, &cdb(input, false), 8, (at, 512)));
                let _ = rig.pvscsi.issue(BUFFERS, address(input));
            }
            12 => drop(rig.pvscsi.configuration(0x1958, 0x2120 << 32, address(input))),
            _ => rig.ground.rest(|| ()),
        },
        13 => {
            let target = usize::from(input.byte() % 20);
            match op >> 6 {
                0 => rig.pvscsi.ask_to_leave(target),
                1 => rig.pvscsi.detach(target),
                2 => drop(rig.pvscsi.attach(target, "unit", unit(target, op & 16 != 0))),
                _ => drop(rig.pvscsi.has_left(target)),
            }
        }
        14 => save_and_load(rig, input),
        _ => rig.ground.change_memory(input),
    }
}

/// A controller is saved and loaded; then one with other numbers is loaded.
fn save_and_load(rig: &Rig, input: &mut Input<'_>) {
    let pvscsi = &rig.pvscsi;
    rig.ground.rest(|| {
        let saved = pvscsi.save();
        // Its rings may be in memory that has gone.
        if pvscsi.load(&saved).is_ok() {
            assert_eq!(pvscsi.save(), saved, "what was saved is what was loaded");
        }
        let mut other = saved;
        let target = usize::from(input.byte()) % other.targets.len();
        let mut state = [other.state];
        change(input, &mut state);
        other.state = state[0];
        for row in [
            &mut other.positions,
            &mut other.requests,
            &mut other.completions,
            &mut other.messages,
            &mut other.answers,
            &mut other.news,
            &mut other.leaving,
            &mut other.targets[target],
        ] {
            change(input, row);
        }
        let _ = pvscsi.load(&other);
    });
}
