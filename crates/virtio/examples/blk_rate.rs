//! Requests a second through the block device's data path: `blk_rate FILE COUNT DEPTH
//! direct|cached`. A driver's mock keeps DEPTH random reads of 4 KiB in a split ring; the
//! device serves them on its I/O thread, by io_uring on FILE. Prints the number.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tetrarch_block::{Cache, Format, ImageOptions};
use tetrarch_io::{Event, IoThread};
use tetrarch_memory::{GuestMemory, GuestPhys};
use tetrarch_virtio::queue::QueueConfig;
use tetrarch_virtio::{Blk, Control, Device, QueueSetup};

const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const HEADERS: u64 = 0x4_0000;
const STATUS: u64 = 0x5_0000;
const DATA: u64 = 0x10_0000;
const BLOCK: u64 = 4096;
const SIZE: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Interrupt(Event);

impl tetrarch_bus::Interrupt for Interrupt {
    fn raise(&self) {
        self.0.signal();
    }
}

/// The driver's side of one split ring with event indices (virtio 1.2, 2.7).
struct Driver {
    memory: Arc<GuestMemory>,
    available: u16,
    used: u16,
}

impl Driver {
    fn put(&self, address: u64, data: &[u8]) {
        self.memory.write(GuestPhys(address), data).expect("it is RAM");
    }

    fn get16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.memory.read(GuestPhys(address), &mut data).expect("it is RAM");
        u16::from_le_bytes(data)
    }

    /// Three descriptors for each request: header, data, status. They stay as they are.
    fn prepare(&self, depth: u16) {
        for slot in 0..depth {
            let at = u64::from(slot);
            let parts = [
                (HEADERS + 16 * at, 16u32, NEXT),
                (DATA + BLOCK * at, BLOCK as u32, NEXT | WRITE),
                (STATUS + at, 1, WRITE),
            ];
            for (index, (address, length, flags)) in (0..).zip(parts) {
                let index = 3 * slot + index;
                let mut entry = address.to_le_bytes().to_vec();
                entry.extend(length.to_le_bytes());
                entry.extend(flags.to_le_bytes());
                entry.extend((index + 1).to_le_bytes());
                self.put(DESCRIPTORS + 16 * u64::from(index), &entry);
            }
        }
    }

    fn offer(&mut self, slot: u16, block: u64) {
        let mut header = [0; 16];
        header[8..].copy_from_slice(&(block * (BLOCK / 512)).to_le_bytes());
        self.put(HEADERS + 16 * u64::from(slot), &header);
        let place = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.put(place, &(3 * slot).to_le_bytes());
        self.available = self.available.wrapping_add(1);
    }

    /// Makes what was offered visible; whether the device wants to be told.
    fn publish(&self, before: u16) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put(AVAILABLE + 2, &self.available.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let event = self.get16(USED + 4 + 8 * u64::from(SIZE));
        let new = self.available;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(before)
    }

    /// The slot of the next answer.
    fn take(&mut self) -> Option<u16> {
        if self.get16(USED + 2) == self.used {
            return None;
        }
        let head = self.get16(USED + 4 + 8 * u64::from(self.used % SIZE));
        self.used = self.used.wrapping_add(1);
        Some(head / 3)
    }

    /// Asks for an interrupt at the next answer.
    fn wait_for_next(&self) {
        self.put(AVAILABLE + 4 + 2 * u64::from(SIZE), &self.used.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let [_, path, count, depth, mode] = &words[..] else {
        eprintln!("usage: blk_rate FILE COUNT DEPTH direct|cached");
        std::process::exit(2);
    };
    let count: u64 = count.parse().expect("a number");
    let depth: u16 = depth.parse().expect("a number");
    assert!((1..=SIZE / 3).contains(&depth), "a depth that the ring has descriptors for");
    let cache = if mode == "direct" { Cache::None } else { Cache::Writeback };
    let options = ImageOptions {
        format: Some(Format::Raw),
        readonly: true,
        cache,
        ..ImageOptions::default()
    };
    let disk: Arc<dyn tetrarch_block::BlockBackend> =
        Arc::from(tetrarch_block::open(Path::new(path), options).expect("an image"));
    let blocks = disk.info().size / BLOCK;
    let memory = Arc::new(GuestMemory::new(4 << 20).expect("memory"));
    let io = IoThread::new("bench").expect("a thread");
    let device = Device::new(&io, Arc::clone(&memory), "disk", 1, Blk::new(disk, "disk"));
    let device = device.expect("a device");
    let interrupt = Arc::new(Interrupt(Event::new().expect("an event")));
    let mut driver = Driver { memory, available: 0, used: 0 };
    driver.prepare(depth);
    let config = QueueConfig {
        size: SIZE,
        descriptors: GuestPhys(DESCRIPTORS),
        driver: GuestPhys(AVAILABLE),
        device: GuestPhys(USED),
        event_index: true,
        ..QueueConfig::default()
    };
    let setup = QueueSetup { config, position: None, interrupt: interrupt.clone() };
    // VIRTIO_BLK_F_FLUSH.
    device.start(1 << 9, vec![Some(setup)], interrupt.clone()).expect("a queue");

    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % blocks
    };
    let (mut begun, mut done) = (0, 0);
    let start = Instant::now();
    let mut free: Vec<u16> = (0..depth).collect();
    while done < count {
        let before = driver.available;
        while begun < count
            && let Some(slot) = free.pop()
        {
            driver.offer(slot, random());
            begun += 1;
        }
        if driver.available != before && driver.publish(before) {
            device.doorbells()[0].signal();
        }
        let had = free.len();
        while let Some(slot) = driver.take() {
            free.push(slot);
            done += 1;
        }
        if free.len() == had && done < count {
            driver.wait_for_next();
            match driver.take() {
                Some(slot) => {
                    free.push(slot);
                    done += 1;
                }
                None => {
                    let mut fds =
                        [rustix::event::PollFd::new(&interrupt.0, rustix::event::PollFlags::IN)];
                    rustix::event::poll(&mut fds, None).expect("an interrupt comes");
                    interrupt.0.take();
                }
            }
        }
    }
    println!("{:.0}", count as f64 / start.elapsed().as_secs_f64());
    let mut status = vec![0xFF; usize::from(depth)];
    driver.memory.read(GuestPhys(STATUS), &mut status).expect("it is RAM");
    assert!(status.iter().all(|&byte| byte == 0), "a request failed");
}
