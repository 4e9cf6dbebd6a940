//! What finding a host address costs an engine: `cargo bench -p tetrarch-memory`.
//!
//! The best of many short rounds counts: what others do on the host only adds.

use std::hint::black_box;
use std::time::Instant;

use tetrarch_memory::{GuestMemory, GuestPhys, PAGE_SIZE};

const ROUNDS: u32 = 300;
const LOOKUPS: u32 = 20_000;

fn measure(memory: &GuestMemory, address: u64) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for page in 0..LOOKUPS {
            let address = GuestPhys(address + u64::from(page % 16) * PAGE_SIZE);
            black_box(black_box(memory).host(black_box(address), PAGE_SIZE));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(LOOKUPS));
    }
    best
}

fn main() {
    // Sparse: only what is touched is there, and nothing is.
    let memory = GuestMemory::new((3 << 30) + (1 << 30)).expect("4 GiB of address space");
    println!("RAM below 3 GiB  {:5.2} ns", measure(&memory, 1 << 20));
    println!("RAM above 4 GiB  {:5.2} ns", measure(&memory, (4 << 30) + (1 << 20)));
    println!("no RAM           {:5.2} ns", measure(&memory, 0xD000_0000));
}
