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
use std::sync::Arc;

use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{Exit, Kick, Reply, Vcpu, Vm};
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
            rounds: if turns { rounds % 8 } else { rounds % 64 },
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

/// Runs a vCPU to its next exit and answers that.
fn step(vcpu: &mut dyn Vcpu) -> Step {
    let exit = match vcpu.run() {
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
        Exit::MmioWrite { .. } => (Reply::Done, Step::On),
        other => return Step::Wrong(format!("an exit that no action makes: {other:?}")),
    };
    vcpu.reply(reply);
    step
}

struct Machine {
    setup: Setup,
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
    kickers: Vec<Arc<dyn Kick>>,
}

impl Machine {
    fn new(plan: &Plan) -> (Self, Vec<Box<dyn Vcpu>>) {
        let setup = plan.setup;
        let memory = Arc::new(GuestMemory::new(RAM).expect("2 MiB of memory"));
        let config = Config {
            topology: Topology::flat(setup.vcpus as u32),
            translate: plan.translate,
            chaos: plan.chaos,
            ..Config::default()
        };
        layout::write_tables(&memory, setup.vcpus, setup.global);
        layout::write_functions(&memory);
        let vm = create_vm(Arc::clone(&memory), config).expect("the engine runs on this host");
        for (id, actions) in plan.actions.iter().enumerate() {
            program::load(&memory, id, setup, actions, plan.seed << 8 | id as u64);
        }
        let vcpus: Vec<Box<dyn Vcpu>> = (0..setup.vcpus)
            .map(|id| {
                let mut vcpu = vm.create_vcpu(id as u32).expect("the VM has it");
                layout::start(&mut *vcpu, id, setup.x2apic);
                vcpu
            })
            .collect();
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        (Self { setup, memory, vm, kickers }, vcpus)
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

    fn report(&self, plan: &Plan, what: &str, vcpus: &mut [Box<dyn Vcpu>]) -> String {
        let mut text = format!(
            "{what}\n{:?}, translated: {}, chaos: {:?}\n{:?}\n",
            self.setup, plan.translate, plan.chaos, plan.events
        );
        for (id, actions) in plan.actions.iter().enumerate() {
            let _ = writeln!(text, "vCPU {id}: {actions:?}");
        }
        for (id, vcpu) in vcpus.iter_mut().enumerate() {
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
