//! What the fuzzer of disk controllers does with its input: a driver that writes anything into
//! queues, tables and registers, through the public interface alone.
//!
//! A finding is a panic, a controller that keeps its I/O thread from coming to rest, one that
//! refuses the state which it saved, or one that serves no good driver after a reset.

mod ahci;
mod ide;
#[path = "../../../virtio/tests/harness/input.rs"]
mod input;
mod nvme;
mod pvscsi;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tetrarch_block::{BlockBackend, ImageOptions};
use tetrarch_bus::Interrupt;
use tetrarch_io::IoThread;
use tetrarch_memory::{GuestMemory, GuestPhys};
use tetrarch_storage::ata::Drive;

use input::Input;

const RAM: u64 = 1 << 20;
/// A region that comes and goes.
const EXTRA: u64 = 16 << 20;
const EXTRA_BYTES: u64 = 64 << 10;
/// Queues, command lists and tables, which the harness lays out.
const TABLES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4_0000;
const PATIENCE: Duration = Duration::from_secs(60);
const DISK_BYTES: usize = 256 << 10;

/// Packet commands of CD-ROM drives, and one of nobody.
const PACKETS: [u8; 18] = [
    0x00, 0x03, 0x12, 0x1A, 0x5A, 0x1B, 0x1E, 0x25, 0x28, 0xA8, 0x2B, 0x43, 0x46, 0x4A, 0x51, 0xBB,
    0xBD, 0xFF,
];
/// Commands of ATA devices, and one of nobody.
const COMMANDS: [u8; 32] = [
    0xEC, 0xC8, 0xCA, 0x25, 0x35, 0x60, 0x61, 0x06, 0xE7, 0xEA, 0x20, 0x30, 0x24, 0x34, 0x2F, 0xEF,
    0x91, 0xC6, 0x90, 0xE5, 0x40, 0x42, 0x3D, 0xA0, 0xA1, 0x08, 0xC4, 0xC5, 0x29, 0x39, 0xCE, 0xFF,
];

/// DATA SET MANAGEMENT.
const TRIM: u8 = 0x06;

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self) {}
}

/// A machine without a CPU.
struct Ground {
    memory: Arc<GuestMemory>,
    io: IoThread,
}

impl Ground {
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).expect("memory for a guest"));
        Self { memory, io: IoThread::new("fuzz").expect("the host has threads") }
    }

    fn put(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write(GuestPhys(address), data);
    }

    fn get(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(GuestPhys(address), &mut data).expect("it is RAM");
        u32::from_le_bytes(data)
    }

    /// The machine is held, and goes on after `body`: nothing keeps the thread.
    fn rest<T>(&self, body: impl FnOnce() -> T) -> T {
        if let Err(error) = self.io.pause(PATIENCE) {
            panic!("the I/O thread does not come to rest: {error}");
        }
        let result = body();
        self.io.resume();
        result
    }

    /// RAM comes and goes, and the guest writes to it.
    fn change_memory(&self, input: &mut Input<'_>) {
        let start = GuestPhys(EXTRA);
        match input.byte() % 8 {
            0 => drop(self.memory.add_region(start, EXTRA_BYTES)),
            1 => drop(self.memory.remove_region(start)),
            _ => {
                let at = address(input);
                let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                self.put(at, &bytes);
            }
        }
    }
}

/// An address of a buffer or a table: good ones, those at an end of RAM, and any.
fn address(input: &mut Input<'_>) -> u64 {
    let choice = input.byte();
    let low = u64::from(input.word());
    match choice % 8 {
        0 | 1 => BUFFERS + low,
        2 => BUFFERS + (low << 9) % 0x4_0000,
        3 => TABLES + low,
        4 => RAM - low % 32,
        5 => EXTRA + low,
        6 => low.wrapping_sub(0x8000),
        _ => input.long(),
    }
}

/// A number that is small, most of the time.
fn number(input: &mut Input<'_>) -> u64 {
    match input.byte() % 8 {
        0..=3 => u64::from(input.byte() % 8),
        4 => u64::from(input.byte()),
        5 => u64::from(input.word()),
        6 => u64::MAX - u64::from(input.byte()),
        _ => input.long(),
    }
}

/// Ranges of a disk in a buffer, as TRIM has them (first sector, and sectors from bit 48) or as
/// dataset management (blocks from bit 32, first block from bit 64).
fn put_ranges(ground: &Ground, input: &mut Input<'_>, nvme: bool) {
    for index in 0..u64::from(input.byte() % 6) {
        let (first, sectors) = (u64::from(input.word() % 600), u64::from(input.byte()));
        if nvme {
            let range = u128::from(first) << 64 | u128::from(sectors) << 32;
            ground.put(BUFFERS + 16 * index, &range.to_le_bytes());
        } else {
            ground.put(BUFFERS + 8 * index, &(first | sectors << 48).to_le_bytes());
        }
    }
}

/// With some numbers changed.
fn change(input: &mut Input<'_>, row: &mut [u64]) {
    for _ in 0..input.byte() % 4 {
        let at = usize::from(input.byte());
        if let Some(value) = row.get_mut(at % row.len().max(1)) {
            *value = number(input);
        }
    }
}

/// Until something has come about.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: no answer after a reset");
        std::thread::yield_now();
    }
}

/// One for all inputs: its data are of no matter.
fn disk(readonly: bool) -> Arc<dyn BlockBackend> {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    static DISKS: OnceLock<[Arc<dyn BlockBackend>; 2]> = OnceLock::new();
    let open = |readonly: bool| {
        let folder = FOLDER.get_or_init(|| TempDir::new().expect("room for temporary files"));
        let path = folder.path().join(if readonly { "cd.img" } else { "disk.img" });
        std::fs::write(&path, vec![0x5A; DISK_BYTES]).expect("room for a file");
        let options = ImageOptions {
            format: Some(tetrarch_block::Format::Raw),
            readonly,
            ..ImageOptions::default()
        };
        Arc::from(tetrarch_block::open(&path, options).expect("a raw image"))
    };
    Arc::clone(&DISKS.get_or_init(|| [open(false), open(true)])[usize::from(readonly)])
}

/// A disk, a CD, a disk that cannot be written, and none.
fn drives(sata: bool) -> Vec<Option<(String, Drive)>> {
    vec![
        Some(("disk".into(), Drive::disk(disk(false), "1", sata))),
        Some(("cd".into(), Drive::cd(disk(true), "2", sata))),
        Some(("readonly".into(), Drive::disk(disk(true), "3", sata))),
        None,
    ]
}

/// A driver of a controller, which the first byte chooses.
pub fn controllers(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 4 {
        0 => nvme::drive(&mut input),
        1 => ahci::drive(&mut input),
        2 => pvscsi::drive(&mut input),
        _ => ide::drive(&mut input),
    }
}
