//! Each vCPU on a thread of its own.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use super::host::Standing;
use super::{Cpu, Machine, Plan, Step};

/// Who is kicked and does not come back for so long hangs; so do vCPUs that come on no more.
const HANG: Duration = Duration::from_secs(40);

#[derive(Default)]
struct State {
    held: bool,
    stop: bool,
    parked: usize,
    ended: Vec<usize>,
    wrong: Option<String>,
}

/// What the threads tell one another.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// After a kick: stands while the machine is held. Returns whether to go on.
    fn park(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.held && !state.stop {
            state = self.wait(state, HANG);
        }
        state.parked -= 1;
        !state.stop
    }

    fn end(&self, id: usize, wrong: Option<String>) {
        let mut state = self.lock();
        state.ended.push(id);
        if wrong.is_some() {
            state.stop = true;
            let before = state.wrong.take();
            state.wrong = before.or(wrong);
        }
        self.changed.notify_all();
    }

    /// Waits until so many have parked or ended.
    fn all_stand(&self, count: usize) -> MutexGuard<'_, State> {
        let start = Instant::now();
        let mut state = self.lock();
        while state.parked + state.ended.len() < count {
            if start.elapsed() > HANG {
                eprintln!("a vCPU does not answer a kick: it hangs; ended are {:?}", state.ended);
                std::process::abort();
            }
            state = self.wait(state, Duration::from_millis(50));
        }
        state
    }
}

type Slot = Mutex<Cpu>;

fn lock(slot: &Slot) -> MutexGuard<'_, Cpu> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn live(slot: &Slot, gate: &Gate, what: &str) -> Option<String> {
    loop {
        let stepped = catch_unwind(AssertUnwindSafe(|| lock(slot).step()));
        match stepped {
            Ok(Step::On | Step::Yield) => {}
            Ok(Step::Kicked) => {
                if !gate.park() {
                    return None;
                }
            }
            Ok(Step::Ended) => return None,
            Ok(Step::Wrong(wrong)) => return Some(format!("{what}: {wrong}")),
            Err(_) => return Some(format!("{what}: a panic")),
        }
    }
}

/// Holds the machine for `during`.
fn hold(machine: &Machine, slots: &[Slot], gate: &Gate, during: impl FnOnce(&mut [Standing])) {
    gate.lock().held = true;
    machine.kick_all();
    let ended = gate.all_stand(slots.len()).ended.clone();
    let mut vcpus: Vec<_> = slots.iter().map(lock).collect();
    let mut standing: Vec<_> = vcpus
        .iter_mut()
        .enumerate()
        .map(|(id, vcpu)| Standing { cpu: &mut *vcpu, ended: ended.contains(&id) })
        .collect();
    during(&mut standing);
    drop(standing);
    drop(vcpus);
    gate.lock().held = false;
    gate.changed.notify_all();
}

fn wait_until_up(machine: &Machine, gate: &Gate) {
    let start = Instant::now();
    while !machine.is_up() && !gate.lock().stop && start.elapsed() < HANG {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Returns when all have ended, or one found something, or none comes on.
fn wait_for_end(machine: &Machine, gate: &Gate) {
    let (mut progress, mut since) = (machine.progress(), Instant::now());
    let mut state = gate.lock();
    while state.ended.len() < machine.setup.vcpus && !state.stop {
        state = gate.wait(state, Duration::from_millis(100));
        let now = machine.progress();
        if now != progress {
            (progress, since) = (now, Instant::now());
        } else if since.elapsed() > HANG {
            state.wrong = Some("the vCPUs wait for ever".into());
            state.stop = true;
        }
    }
}

/// Waits until the threads are gone: what they have of their own seems to leak as long as they end.
pub fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    for thread in threads {
        if let Err(panic) = thread.join() {
            resume_unwind(panic);
        }
    }
}

pub fn run(plan: &Plan) {
    let (machine, vcpus) = Machine::new(plan);
    let slots: Vec<Slot> = vcpus.into_iter().map(Mutex::new).collect();
    let gate = Gate::default();
    std::thread::scope(|scope| {
        let (gate, mut threads) = (&gate, Vec::new());
        for (id, slot) in slots.iter().enumerate() {
            threads.push(scope.spawn(move || {
                let wrong = live(slot, gate, &format!("vCPU {id}"));
                gate.end(id, wrong);
            }));
        }
        wait_until_up(&machine, gate);
        for event in &plan.events {
            std::thread::sleep(Duration::from_micros(event.after_us.into()));
            let state = gate.lock();
            if state.stop || state.ended.len() == slots.len() {
                break;
            }
            drop(state);
            if event.what.needs_pause() {
                hold(&machine, &slots, gate, |vcpus| machine.standing(event.what, vcpus));
            } else {
                machine.at_once(event.what);
            }
        }
        wait_for_end(&machine, gate);
        // Who found nothing stops, too.
        gate.lock().stop = true;
        gate.changed.notify_all();
        machine.kick_all();
        drop(gate.all_stand(slots.len()));
        join(threads);
    });
    let wrong = gate.lock().wrong.take().or_else(|| machine.wrong_sums());
    if let Some(wrong) = wrong {
        let vcpus = slots.into_iter().map(|slot| slot.into_inner());
        let mut vcpus: Vec<_> =
            vcpus.map(|vcpu| vcpu.unwrap_or_else(PoisonError::into_inner)).collect();
        panic!("{}", machine.report(plan, &wrong, &mut vcpus));
    }
}
