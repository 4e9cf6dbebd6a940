//! What the bus costs an access, without vCPU and exit: `cargo bench -p tetrarch-bus`.
//!
//! A PC's ports, a device that does nothing, one thread and two. Of one thread
//! the best of many short rounds counts, since what others do on the host only
//! adds; of two the median, since they have to run at the same time.

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use tetrarch_bus::{Bus, Device, DeviceError, Sizes};

const ROUNDS: u32 = 200;
const ACCESSES: u32 = 20_000;
/// Ranges as on a PC: base, length.
const PORTS: [(u64, u64); 8] = [
    (0x60, 1),
    (0x64, 1),
    (0x70, 2),
    (0x3F8, 8),
    (0x500, 1),
    (0x600, 0x40),
    (0xCF9, 1),
    (0xCFC, 4),
];

struct Nothing;

impl Device for Nothing {
    fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Nanoseconds an access in each round, in ascending order.
fn measure(bus: &Bus, port: u16) -> Vec<f64> {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for value in 0..ACCESSES {
                let _ = black_box(bus.port_out(black_box(port), 1, value));
            }
            start.elapsed().as_nanos() as f64 / f64::from(ACCESSES)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds
}

fn main() {
    let bus = Arc::new(Bus::new());
    for (base, length) in PORTS {
        bus.attach_ports(base, length, Sizes::ALL, "nothing", Arc::new(Nothing)).expect("free");
    }
    println!("claimed port      {:6.1} ns", measure(&bus, 0x500)[0]);
    println!("unclaimed port    {:6.1} ns", measure(&bus, 0x80)[0]);
    let start = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (bus, start) = (Arc::clone(&bus), Arc::clone(&start));
            std::thread::spawn(move || {
                start.wait();
                measure(&bus, 0x500)
            })
        })
        .collect();
    for thread in threads {
        let rounds = thread.join().expect("no panic");
        println!("one of 2 threads  {:6.1} ns", rounds[rounds.len() / 2]);
    }
}
