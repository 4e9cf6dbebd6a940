//! The vCPUs by turns on one thread, in the order that the input gives: the same each time, but
//! for how long one sleeps.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::host::Standing;
use super::parallel::join;
use super::{Cpu, Machine, Plan, Step};
use crate::harness::Random;

/// A vCPU that has run for so long without giving its turn away sleeps.
const TURN: Duration = Duration::from_millis(1);
const HANG: Duration = Duration::from_secs(40);

/// The number of the turn, and whose it is; odd numbers are between turns.
#[derive(Default)]
struct Now {
    turn: AtomicU64,
    vcpu: AtomicU64,
}

const OVER: u64 = u64::MAX;

/// Kicks who sleeps.
fn watch(machine: &Machine, now: &Now) {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        std::thread::sleep(TURN / 2);
        let turn = now.turn.load(Ordering::SeqCst);
        if turn == OVER {
            return;
        }
        if turn != seen {
            (seen, since) = (turn, Instant::now());
        } else if since.elapsed() > HANG {
            eprintln!("the vCPU does not answer a kick: it hangs");
            std::process::abort();
        } else if turn & 1 == 0 && since.elapsed() >= TURN {
            machine.kick(now.vcpu.load(Ordering::SeqCst) as usize);
        }
    }
}

struct Turns<'a> {
    machine: &'a Machine,
    vcpus: Vec<Cpu>,
    ended: Vec<bool>,
    now: &'a Now,
    number: u64,
}

impl Turns<'_> {
    /// Runs a vCPU until it gives its turn away.
    fn turn(&mut self, id: usize) -> Result<(), String> {
        self.now.vcpu.store(id as u64, Ordering::SeqCst);
        self.number += 2;
        self.now.turn.store(self.number, Ordering::SeqCst);
        let result = loop {
            match self.vcpus[id].step() {
                Step::On => {}
                Step::Yield | Step::Kicked => break Ok(()),
                Step::Ended => {
                    self.ended[id] = true;
                    break Ok(());
                }
                Step::Wrong(wrong) => break Err(format!("vCPU {id}: {wrong}")),
            }
        };
        self.now.turn.store(self.number + 1, Ordering::SeqCst);
        result
    }

    /// All stand between two instructions.
    fn stand(&mut self) -> Result<(), String> {
        for id in 0..self.vcpus.len() {
            self.machine.kick(id);
            loop {
                if self.ended[id] {
                    break;
                }
                match self.vcpus[id].step() {
                    Step::On | Step::Yield => {}
                    Step::Kicked => break,
                    Step::Ended => self.ended[id] = true,
                    Step::Wrong(wrong) => return Err(format!("vCPU {id}: {wrong}")),
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, what: super::host::What) -> Result<(), String> {
        if !what.needs_pause() {
            self.machine.at_once(what);
            return Ok(());
        }
        self.stand()?;
        let ended = &self.ended;
        let mut standing: Vec<_> = self
            .vcpus
            .iter_mut()
            .zip(ended)
            .map(|(vcpu, &ended)| Standing { cpu: vcpu, ended })
            .collect();
        self.machine.standing(what, &mut standing);
        Ok(())
    }

    fn play(&mut self, plan: &Plan) -> Result<(), String> {
        let mut order = plan.order.iter().copied();
        let mut random = Random(plan.seed);
        let mut events = plan.events.iter().peekable();
        let mut due = events.peek().map_or(0, |event| u64::from(event.after_us));
        let (mut turns, mut all_turns) = (0, 0u64);
        let (mut progress, mut since) = (0, Instant::now());
        while self.ended.iter().any(|ended| !ended) {
            let choice = order.next().unwrap_or_else(|| random.next() as u8);
            let id = usize::from(choice) % self.vcpus.len();
            for _ in 0..=choice >> 6 {
                if !self.ended[id] {
                    self.turn(id)?;
                }
            }
            // Turns take the place of time.
            turns += u64::from(turns != 0 || self.machine.is_up());
            if turns >= due
                && let Some(event) = events.next()
            {
                self.event(event.what)?;
                due = turns + events.peek().map_or(0, |event| u64::from(event.after_us));
            }
            all_turns += 1;
            if all_turns.is_multiple_of(1024) {
                let now = self.machine.progress();
                if now != progress {
                    (progress, since) = (now, Instant::now());
                } else if since.elapsed() > HANG {
                    return Err("the vCPUs wait for ever".into());
                }
            }
        }
        Ok(())
    }
}

pub fn run(plan: &Plan) {
    let (machine, vcpus) = Machine::new(plan);
    let now = Now { turn: AtomicU64::new(1), ..Now::default() };
    std::thread::scope(|scope| {
        let (machine, now) = (&machine, &now);
        let watching = scope.spawn(|| watch(machine, now));
        let ended = vec![false; vcpus.len()];
        let mut turns = Turns { machine, vcpus, ended, now, number: 0 };
        let wrong = turns.play(plan).err();
        now.turn.store(OVER, Ordering::SeqCst);
        join(vec![watching]);
        if let Some(wrong) = wrong.or_else(|| machine.wrong_sums()) {
            panic!("{}", machine.report(plan, &wrong, &mut turns.vcpus));
        }
    });
}
