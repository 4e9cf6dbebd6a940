//! A driver of an NVMe controller.

use std::sync::Arc;

use tetrarch_bus::{Device, Interrupt};
use tetrarch_storage::nvme::{About, AdminQueues, Nvme, PAGE};

use super::{
    BUFFERS, Ground, Input, Nobody, TABLES, address, change, disk, number, put_ranges, wait,
};

/// Queue pairs, the admin queues among them; each has its queues a page apart.
const PAIRS: u64 = 4;
const ENTRIES: u32 = 16;
const LISTS: u64 = TABLES + 2 * PAGE * PAIRS;
const ADMIN: [u8; 11] = [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0xFF];
const IO: [u8; 6] = [0x00, 0x01, 0x02, 0x08, 0x09, 0xFF];

fn submissions(queue: u64) -> u64 {
    TABLES + 2 * PAGE * queue
}

fn completions(queue: u64) -> u64 {
    submissions(queue) + PAGE
}

struct Rig {
    ground: Ground,
    nvme: Nvme,
    tails: [u32; PAIRS as usize],
    entries: u32,
}

/// What a command says beside its opcode: namespace, PRP entries, words from 10 on.
#[derive(Default)]
struct Parameters {
    namespace: u32,
    prps: (u64, u64),
    words: [u32; 6],
}

impl Rig {
    fn enable(&mut self, queues: AdminQueues) {
        self.nvme.reset();
        self.tails = [0; PAIRS as usize];
        // What cannot be is refused.
        let _ = self.nvme.enable(queues);
    }

    fn good(&self) -> AdminQueues {
        AdminQueues {
            submissions: submissions(0),
            submission_entries: self.entries,
            completions: completions(0),
            completion_entries: self.entries,
        }
    }

    fn doorbell(&self, index: u64, size: u8, value: u64) {
        self.nvme.doorbells().write(index, size, value).expect("it is a register");
    }

    fn give(&mut self, queue: u64, first: u32, parameters: &Parameters) {
        let Parameters { namespace, prps, words } = parameters;
        let tail = &mut self.tails[queue as usize];
        let mut entry = Vec::new();
        entry.extend(first.to_le_bytes());
        entry.extend(namespace.to_le_bytes());
        entry.extend([0; 16]);
        entry.extend(prps.0.to_le_bytes());
        entry.extend(prps.1.to_le_bytes());
        words.iter().for_each(|word| entry.extend(word.to_le_bytes()));
        self.ground.put(submissions(queue) + 64 * u64::from(*tail), &entry);
        *tail = (*tail + 1) % self.entries;
        let tail = u64::from(*tail);
        self.doorbell(8 * queue, 4, tail);
    }

    /// A pair of queues as a good driver makes it.
    fn make_pair(&mut self, queue: u64, answers: u64) {
        let size = (self.entries - 1) << 16;
        let mut words = [queue as u32 | size, 0b11 | (queue as u32) << 16, 0, 0, 0, 0];
        if answers == queue {
            let prps = (completions(queue), 0);
            self.give(0, 0x05, &Parameters { prps, words, ..Parameters::default() });
        }
        words[1] = 1 | (answers as u32) << 16;
        let prps = (submissions(queue), 0);
        self.give(0, 0x01, &Parameters { prps, words, ..Parameters::default() });
        self.tails[queue as usize] = 0;
    }

    fn begin(&mut self) {
        self.enable(self.good());
        (1..PAIRS).for_each(|queue| self.make_pair(queue, if queue == 3 { 1 } else { queue }));
        self.take_answers();
    }

    /// The driver takes what the admin queue has answered.
    fn take_answers(&self) {
        self.ground.rest(|| ());
        self.doorbell(4, 4, self.tails[0].into());
    }
}

/// A page of data, or where one begins.
fn prp(input: &mut Input<'_>) -> u64 {
    match input.byte() % 8 {
        0..=3 => address(input) & !(PAGE - 1),
        4 | 5 => LISTS + 8 * u64::from(input.word() % 1024),
        6 => address(input) & !3,
        _ => address(input),
    }
}

fn admin(input: &mut Input<'_>, opcode: u8) -> Parameters {
    let mut words = [0; 6];
    let raw = input.byte();
    for word in words.iter_mut().take(4) {
        *word = number(input) as u32;
    }
    if !raw.is_multiple_of(4) && matches!(opcode, 0x00 | 0x01 | 0x04 | 0x05) {
        words[0] = (words[0] % (PAIRS as u32 + 1)) | (u32::from(input.byte() % 40) << 16);
        words[1] = words[1] & 2 | 1 | u32::from(input.byte() % 6) << 16;
    }
    // Log pages and features that there are.
    if !raw.is_multiple_of(4) && matches!(opcode, 0x02 | 0x09 | 0x0A) {
        words[0] = words[0] & !0xFF_00FF | u32::from(input.byte() % 16);
        words[3] = 0;
    }
    Parameters { namespace: number(input) as u32, prps: (prp(input), prp(input)), words }
}

fn io(input: &mut Input<'_>) -> Parameters {
    let mut words = [0; 6];
    words[0] = u32::from(input.word()) % 600;
    words[1] = if input.byte().is_multiple_of(16) { number(input) as u32 } else { 0 };
    let flags = u32::from(input.byte() & 0b0110_0110) << 24;
    words[2] = flags | u32::from(input.byte()) | u32::from(input.byte().is_multiple_of(16)) << 12;
    if input.byte().is_multiple_of(4) {
        // Dataset management: a range or two, that are to go.
        (words[0], words[1]) = (u32::from(input.byte() % 3), 4);
    }
    let namespace = if input.byte().is_multiple_of(16) { number(input) as u32 } else { 1 };
    Parameters { namespace, prps: (prp(input), prp(input)), words }
}

pub fn drive(input: &mut Input<'_>) {
    let ground = Ground::new();
    let about = About { vendor: 1, model: "fuzz".into(), serial: "1".into(), uuid: [1; 16] };
    let interrupts = (0..PAIRS).map(|_| Arc::new(Nobody) as Arc<dyn Interrupt>).collect();
    let memory = Arc::clone(&ground.memory);
    let line = Box::new(|_| ());
    let nvme =
        Nvme::new(&ground.io, memory, "fuzz", disk(input.byte() & 1 != 0), about, interrupts, line)
            .expect("the host has events");
    let mut rig = Rig { ground, nvme, tails: [0; PAIRS as usize], entries: ENTRIES };
    rig.entries = 2 + u32::from(input.byte() % 31);
    rig.begin();
    while !input.has_ended() {
        step(&mut rig, input);
    }
    rig.ground.rest(|| ());
    // A good driver is served.
    rig.nvme.set_master(true);
    rig.entries = ENTRIES;
    rig.nvme.reset();
    rig.ground.put(TABLES, &vec![0; (2 * PAGE * PAIRS) as usize]);
    rig.enable(rig.good());
    let mut words = [0; 6];
    words[0] = 1;
    rig.give(0, 0x06, &Parameters { prps: (BUFFERS, 0), words, ..Parameters::default() });
    wait("NVMe", || rig.ground.get(completions(0) + 12) >> 16 == 1);
    assert_eq!(rig.ground.get(BUFFERS) & 0xFFFF, 1, "the vendor");
    rig.nvme.close();
}

fn step(rig: &mut Rig, input: &mut Input<'_>) {
    let op = input.byte();
    match op % 16 {
        0 if op & 16 == 0 => rig.begin(),
        0 => {
            let mut queues = rig.good();
            match op >> 5 {
                0 => queues.submissions = address(input),
                1 => queues.completions = address(input),
                2 => queues.submission_entries = number(input) as u32,
                _ => queues.completion_entries = number(input) as u32,
            }
            rig.enable(queues);
        }
        1..=4 => {
            let opcode = match op >> 4 {
                0 => input.byte(),
                choice => ADMIN[usize::from(choice) % ADMIN.len()],
            };
            let flags =
                if input.byte().is_multiple_of(16) { u32::from(input.byte()) << 8 } else { 0 };
            let parameters = admin(input, opcode);
            rig.give(0, u32::from(opcode) | flags | u32::from(op) << 16, &parameters);
            if op & 0x80 == 0 {
                rig.take_answers();
            }
        }
        5..=9 => {
            let opcode = IO[usize::from(op >> 4) % IO.len()];
            let queue = 1 + u64::from(input.byte()) % (PAIRS - 1);
            let mut parameters = io(input);
            if opcode == 0x09 && op & 0x80 == 0 {
                put_ranges(&rig.ground, input, true);
                (parameters.prps.0, parameters.words[1]) = (BUFFERS, 4);
            }
            rig.give(queue, u32::from(opcode) | u32::from(op) << 16, &parameters);
        }
        10 => {
            // What a good driver took.
            rig.ground.rest(|| ());
            let queue = usize::from(input.byte()) % rig.tails.len();
            rig.doorbell(8 * queue as u64 + 4, 4, rig.tails[queue].into());
        }
        11 => {
            let size = 1 << (op >> 4 & 3);
            let index = u64::from(input.word()) % if op & 0x80 == 0 { 40 } else { PAGE };
            rig.doorbell(index, size, number(input));
        }
        12 => {
            for entry in 0..u64::from(input.byte() % 8) {
                let at = LISTS + 8 * (u64::from(op) + entry);
                rig.ground.put(at, &prp(input).to_le_bytes());
            }
        }
        13 => match op >> 4 {
            0 => rig.nvme.reset(),
            1..=3 => rig.nvme.set_master(false),
            4..=6 => rig.nvme.set_master(true),
            7 => rig.nvme.resized(),
            8 => rig.nvme.shut_down(),
            9 | 10 => rig.nvme.set_mask(number(input) as u32),
            _ => rig.ground.rest(|| ()),
        },
        14 => save_and_load(rig, input),
        _ => rig.ground.change_memory(input),
    }
}

/// A controller that is enabled is saved and loaded; then one with other numbers is loaded.
fn save_and_load(rig: &Rig, input: &mut Input<'_>) {
    let nvme = &rig.nvme;
    rig.ground.rest(|| {
        let saved = nvme.save();
        if saved.submissions.is_empty() {
            return;
        }
        // Its queues may be in memory that has gone.
        if nvme.load(&saved).is_ok() {
            assert_eq!(nvme.save(), saved, "what was saved is what was loaded");
        }
        let mut other = saved;
        for row in [
            &mut other.submissions,
            &mut other.completions,
            &mut other.features,
            &mut other.requests,
            &mut other.events,
        ] {
            change(input, row);
        }
        let _ = nvme.load(&other);
    });
}
