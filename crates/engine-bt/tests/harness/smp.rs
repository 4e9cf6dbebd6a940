//! Several vCPUs over one memory, whose programs hold invariants against one another.
//!
//! The input says how many there are, what each does, and what the host does to the machine
//! meanwhile. They run each on a thread of its own, as they do in a machine; or by turns on one
//! thread, in an order that the input gives too, so that what was found is found again.

mod actions;
mod host;
mod layout;
mod parallel;
mod program;
mod turns;
mod wild;

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{Exit, GuestDebug, Kick, Platform, Reply, Vcpu, Vm};
use tetrarch_engine_bt::{Config, create_vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::input::Input;
use actions::{Action, NO_REGION};
use host::Event;
use layout::{COUNTED, MAX_VCPUS, RAM};
use program::{END, FAULT, Setup, WRONG, WRONGS, YIELD};

/// A machine and what is done with it.
struct Plan {
    setup: Setup,
    actions: Vec<Vec<Action>>,
    events: Vec<Event>,
    /// Whose turn it is.
    order: Vec<u8>,
    translate: bool,
    chaos: Option<u64>,
    seed: u64,
}

impl Plan {
    fn read(input: &mut Input) -> Self {
        let (size, options, rounds) = (input.u8(), input.u8(), input.u8());
        let seed = input.u16();
        let on = |bit: u8| options >> bit & 1 != 0;
        let turns = on(0);
        let vcpus = 2 + usize::from(size) % (MAX_VCPUS - 1);
        let setup = Setup {
            vcpus,
            turns,
            x2apic: on(1),
            global: on(2),
            victim: on(3),
            kvm: on(5),
            rounds: if turns { rounds % 8 } else { rounds % 16 },
        };
        let mut actions = vec![Vec::new(); vcpus];
        for actions in &mut actions {
            for _ in 0..=input.u8() % 12 {
                actions.push(Action::read(input));
            }
        }
        let mut events = Vec::new();
        for _ in 0..input.u8() % 24 {
            events.push(Event::read(input));
        }
        Self {
            setup,
            actions,
            events,
            order: input.rest().to_vec(),
            translate: size < 0xE0,
            chaos: on(4).then_some(seed.into()),
            seed: seed.into(),
        }
    }
}

/// What became of a run of a vCPU.
enum Step {
    On,
    Yield,
    Kicked,
    Ended,
    Wrong(String),
}

/// A vCPU, and the single steps that it is to go.
struct Cpu {
    vcpu: Box<dyn Vcpu>,
    steps: u32,
}

impl Cpu {
    fn begin_steps(&mut self, count: u32) {
        self.steps = count;
        let debug = GuestDebug {
            step: count != 0,
            block_interrupts: count & 8 != 0,
            ..GuestDebug::default()
        };
        self.vcpu.set_guest_debug(&debug).expect("single steps");
    }

    /// Runs it to its next exit and answers that.
    fn step(&mut self) -> Step {
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return Step::Wrong(format!("the engine gave up: {error}")),
        };
        let port = |number: u8| u16::from(number);
        let (reply, step) = match exit {
            Exit::Kicked => return Step::Kicked,
            Exit::PortOut { port: at, data, .. } if at == port(WRONG) => {
                let wrong = WRONGS.get(data as usize).unwrap_or(&"an unknown wrong");
                (Reply::Done, Step::Wrong((*wrong).into()))
            }
            Exit::PortOut { port: at, data, .. } if at == port(FAULT) => {
                (Reply::Done, Step::Wrong(format!("exception {data}")))
            }
            Exit::PortOut { port: at, .. } if at == port(YIELD) => (Reply::Done, Step::Yield),
            Exit::PortOut { port: at, .. } if at == port(END) => (Reply::Done, Step::Ended),
            Exit::MmioRead { .. } => (Reply::Value(NO_REGION.into()), Step::On),
            Exit::MmioWrite { .. } | Exit::Debug(_) => (Reply::Done, Step::On),
            other => return Step::Wrong(format!("an exit that no action makes: {other:?}")),
        };
        self.vcpu.reply(reply);
        if matches!(exit, Exit::Debug(_)) {
            self.begin_steps(self.steps.saturating_sub(1));
        }
        step
    }
}

struct Machine {
    setup: Setup,
    memory: Arc<GuestMemory>,
    config: Config,
    /// Another one after it was saved and loaded there.
    now: Mutex<Now>,
}

struct Now {
    vm: Arc<dyn Vm>,
    kickers: Vec<Arc<dyn Kick>>,
}

impl Now {
    fn new(memory: &Arc<GuestMemory>, config: &Config) -> (Self, Vec<Box<dyn Vcpu>>) {
        let vm = create_vm(Arc::clone(memory), config.clone()).expect("the engine runs here");
        let vcpus: Vec<_> = (0..config.topology.vcpus())
            .map(|id| vm.create_vcpu(id).expect("the VM has it"))
            .collect();
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        (Self { vm, kickers }, vcpus)
    }
}

impl Machine {
    fn new(plan: &Plan) -> (Self, Vec<Cpu>) {
        let setup = plan.setup;
        let memory = Arc::new(GuestMemory::new(RAM).expect("2 MiB of memory"));
        let config = Config {
            topology: Topology::flat(setup.vcpus as u32),
            translate: plan.translate,
            chaos: plan.chaos,
            platform: Platform { kvm: setup.kvm, ..Platform::default() },
            ..Config::default()
        };
        layout::write_tables(&memory, setup.vcpus, setup.global);
        layout::write_functions(&memory);
        for (id, actions) in plan.actions.iter().enumerate() {
            program::load(&memory, id, setup, actions, plan.seed << 8 | id as u64);
        }
        let (now, mut vcpus) = Now::new(&memory, &config);
        for (id, vcpu) in vcpus.iter_mut().enumerate() {
            layout::start(&mut **vcpu, id, setup.x2apic);
        }
        let vcpus = vcpus.into_iter().map(|vcpu| Cpu { vcpu, steps: 0 }).collect();
        (Self { setup, memory, config, now: Mutex::new(now) }, vcpus)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vm(&self) -> Arc<dyn Vm> {
        Arc::clone(&self.now().vm)
    }

    /// Another machine over the same memory takes the place of this one.
    fn renew(&self) -> Vec<Box<dyn Vcpu>> {
        let (now, vcpus) = Now::new(&self.memory, &self.config);
        *self.now() = now;
        vcpus
    }

    fn kick(&self, id: usize) {
        self.now().kickers[id].kick();
    }

    fn kick_all(&self) {
        self.now().kickers.iter().for_each(|kicker| kicker.kick());
    }

    fn u64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(GuestPhys(at), &mut bytes).expect("the layout lies in RAM");
        u64::from_le_bytes(bytes)
    }

    fn u32(&self, at: u64) -> u32 {
        layout::get32(&self.memory, at)
    }

    fn ids(&self) -> std::ops::Range<usize> {
        0..self.setup.vcpus
    }

    /// Grows as long as any vCPU comes on that is to end by itself.
    fn progress(&self) -> u64 {
        let steady = self.ids().filter(|&id| !self.setup.is_victim(id));
        steady.map(|id| self.u64(program::progress(id))).sum()
    }

    /// Whether interrupts reach all: events begin then.
    fn is_up(&self) -> bool {
        self.ids().all(|id| self.u32(program::ONLINE + id as u64 * 4) != 0)
    }

    /// What must hold when all have ended.
    fn wrong_sums(&self) -> Option<String> {
        // A vCPU that began anew may have counted in the shared word alone.
        let lost = 4 * u64::from(self.u32(program::INITS));
        for (place, &at) in COUNTED.iter().enumerate() {
            let own: u64 = self.ids().map(|id| self.u64(program::own_count(id, place))).sum();
            let shared = self.u64(at);
            if !(own..=own + lost).contains(&shared) {
                return Some(format!("{own} were added at {at:#x}, which is {shared}"));
            }
        }
        None
    }

    fn report(&self, plan: &Plan, what: &str, vcpus: &mut [Cpu]) -> String {
        let mut text = format!(
            "{what}\n{:?}, translated: {}, chaos: {:?}\n{:?}\n",
            self.setup, plan.translate, plan.chaos, plan.events
        );
        for (id, actions) in plan.actions.iter().enumerate() {
            let _ = writeln!(text, "vCPU {id}: {actions:?}");
        }
        for (id, Cpu { vcpu, .. }) in vcpus.iter_mut().enumerate() {
            let registers = vcpu.registers();
            let found = self.u32(program::found(id));
            let _ = writeln!(text, "vCPU {id}: found {found:#x}, {registers:x?}");
            if let Ok(system) = vcpu.system_registers() {
                let _ = writeln!(text, "  cr2 {:#x} cs {:#x}", system.cr2, system.cs.selector);
            }
            let words: Vec<_> =
                (0..0xE0).step_by(4).map(|at| self.u32(layout::block(id) + at)).collect();
            let _ = writeln!(text, "  its block {words:x?}");
        }
        let words: Vec<_> = (0..0x390).step_by(4).map(|at| self.u32(layout::SHARED + at)).collect();
        let _ = writeln!(text, "shared {words:x?}");
        text
    }
}

/// Several vCPUs, and what a host does to them.
pub fn smp(data: &[u8]) {
    let (&kind, data) = data.split_first().unwrap_or((&0, &[]));
    if kind & 7 == 7 {
        return wild::run(data);
    }
    let plan = Plan::read(&mut Input::new(data));
    if plan.setup.turns { turns::run(&plan) } else { parallel::run(&plan) }
}
