//! What a host may do to a guest at any time, done often: a debug option that finds races.
//!
//! At random moments a vCPU leaves translated code at the next block, and there its timer
//! interrupts, its TLB, the page's translations or all go, or its thread sleeps a while. None of that is
//! wrong for a CPU: timers may be early by the guest's own reckoning (Linux looks at the time in
//! each), caches may be emptied, and a host may take its CPU away. A guest that fails by it has
//! met an error of the engine, or one of its own.
//!
//! Each vCPU draws from a sequence of its own, which the seed begins: what is done, and after
//! how many nanoseconds of machine time. Where the guest then stands is up to the host.

use std::thread::sleep;
use std::time::Duration;

use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use super::BtVcpu;

/// The longest time between two disturbances of a vCPU.
const MOST_NS: u64 = 1 << 23;
/// The longest sleep.
const SLEEP_NS: u64 = 1 << 21;

pub struct Chaos {
    state: u64,
    /// When the next disturbance is due, in nanoseconds of the machine's clock.
    pub next_ns: u64,
}

enum Disturbance {
    Timer,
    Tlb,
    /// The translations of the page that runs.
    Page,
    Code,
    Sleep(Duration),
}

impl Chaos {
    pub fn new(seed: u64, vcpu: usize) -> Self {
        let mut chaos = Self { state: seed, next_ns: 0 };
        // So that neighbours' sequences have nothing in common.
        chaos.state = chaos.draw() ^ (vcpu as u64) << 32;
        chaos
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// Up to `most`, a power of two, each order of magnitude as often as another.
    fn spread(&mut self, most: u64) -> u64 {
        let order = self.draw() % u64::from(most.trailing_zeros() + 1);
        self.draw() & ((1 << order) - 1)
    }

    fn next(&mut self, now_ns: u64) -> Option<Disturbance> {
        if now_ns < self.next_ns {
            return None;
        }
        self.next_ns = now_ns + self.spread(MOST_NS);
        // To translate all anew takes a large part of a second.
        if self.draw().is_multiple_of(8192) {
            return Some(Disturbance::Code);
        }
        Some(match self.draw() % 16 {
            0..=6 => Disturbance::Timer,
            7..=12 => Disturbance::Tlb,
            13 => Disturbance::Page,
            _ => Disturbance::Sleep(Duration::from_nanos(self.spread(SLEEP_NS))),
        })
    }
}

impl BtVcpu {
    /// Between two instructions.
    pub(super) fn disturb(&mut self) {
        let Some(chaos) = &mut self.chaos else { return };
        let now = self.cpu.vm.clock.now_ns();
        let Some(disturbance) = chaos.next(now) else { return };
        if let Some(timer) = &mut self.timer {
            timer.expired();
        }
        match disturbance {
            Disturbance::Timer => self.cpu.vm.irqchip.interrupt_by_timer(self.cpu.id),
            Disturbance::Tlb => self.cpu.tlb.flush(true),
            Disturbance::Page => {
                if let Some(address) = self.cpu.peek_walk(self.cpu.st.rip) {
                    let page = GuestPhys(address.0 & !(PAGE_SIZE - 1));
                    self.cpu.vm.code.wrote(page, PAGE_SIZE);
                }
            }
            Disturbance::Code => {
                if let Some(translator) = &mut self.translator {
                    translator.clear_cache(&mut self.cpu);
                }
            }
            Disturbance::Sleep(time) => sleep(time),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_each_vcpu_a_sequence_of_its_own_again() {
        let drawn = |seed, vcpu| {
            let mut chaos = Chaos::new(seed, vcpu);
            (0..100).map(|_| chaos.spread(MOST_NS)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(1, 0), drawn(1, 0));
        assert_ne!(drawn(1, 0), drawn(1, 1));
        assert_ne!(drawn(1, 0), drawn(2, 0));
        assert!(drawn(3, 0).iter().all(|&ns| ns < MOST_NS));
    }

    #[test]
    fn nothing_is_done_before_its_time() {
        let mut chaos = Chaos::new(7, 0);
        for round in 0..1000 {
            assert!(chaos.next(chaos.next_ns).is_some(), "round {round}");
            assert!(chaos.next_ns == 0 || chaos.next(chaos.next_ns - 1).is_none());
        }
    }
}
