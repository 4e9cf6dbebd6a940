//! Entropy device (5.4): the host's random numbers for the guest's.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::device::DataPath;
use crate::queue::{Chain, QueueError, Used};
use crate::queues::Queues;

/// One buffer gets no more at once, so that other devices' turn comes; a driver asks again.
const MOST: u64 = 1 << 16;

#[derive(Default)]
pub struct Rng;

impl DataPath for Rng {
    fn serve(&mut self, queues: &mut Queues, index: usize) -> Result<(), QueueError> {
        queues.serve(index, |chain| Some(fill(chain)))
    }
}

fn fill(chain: Chain) -> (Used, u32) {
    let mut bytes = [0; 4096];
    let mut done = 0;
    while done < chain.writable.len().min(MOST) {
        let wanted = (chain.writable.len().min(MOST) - done).min(4096) as usize;
        // Blocks only where the host has just been booted and has none itself.
        match getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) {
            Ok(got) => done += chain.writable.write_at(done, &bytes[..got]) as u64,
            Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    (chain.used, done as u32)
}
