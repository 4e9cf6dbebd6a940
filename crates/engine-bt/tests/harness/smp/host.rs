//! What the host does to a machine that runs.

use tetrarch_engine::RunState;
use tetrarch_memory::GuestPhys;

use super::layout::*;
use super::program::{Counted, HOST_FLAG, LOWEST, REGION_GENERATION};
use super::{Cpu, Machine};
use crate::harness::Input;

/// An event, and how long after the one before.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub after_us: u16,
    pub what: What,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    Kick(u8),
    Interrupt(u8),
    Nmi(u8),
    LowestPriority,
    /// Changes the host's function.
    Code,
    DirtyLog(bool),
    TakeLog,
    /// The machine stands for it:
    Pause,
    /// A vCPU is saved and loaded,
    Reload(u8),
    /// its registers are read and set,
    SetRegisters(u8),
    /// all of the machine is saved and loaded,
    ReloadAll,
    /// into another one,
    Migrate,
    /// a vCPU goes so many single steps from there,
    Step(u8),
    /// the region comes or goes.
    Region,
}

impl Event {
    pub fn read(input: &mut Input) -> Self {
        let (kind, number, after) = (input.u8(), input.u8(), input.u8());
        let what = match kind % 20 {
            0 | 1 => What::Kick(number),
            2 | 3 => What::Interrupt(number),
            4 => What::Nmi(number),
            5 => What::LowestPriority,
            6 | 7 => What::Code,
            8 => What::DirtyLog(number & 1 != 0),
            9 => What::TakeLog,
            10 => What::Pause,
            11 => What::Reload(number),
            12 => What::SetRegisters(number),
            13 => What::ReloadAll,
            14 => What::Migrate,
            15 | 16 => What::Step(number),
            _ => What::Region,
        };
        Self { after_us: u16::from(after) * if after & 0xC0 == 0xC0 { 16 } else { 1 }, what }
    }
}

/// A vCPU of a machine that stands. One that has ended is in the middle of its last instruction.
pub struct Standing<'a> {
    pub cpu: &'a mut Cpu,
    pub ended: bool,
}

impl What {
    /// Whether the vCPUs have to stand between two instructions.
    pub fn needs_pause(self) -> bool {
        matches!(
            self,
            Self::Pause
                | Self::Reload(_)
                | Self::SetRegisters(_)
                | Self::ReloadAll
                | Self::Migrate
                | Self::Step(_)
                | Self::Region
        )
    }
}

impl Machine {
    fn add(&self, at: u64) -> u32 {
        let value = self.u32(at) + 1;
        put32(&self.memory, at, value);
        value
    }

    /// An event for which nobody has to stand.
    pub fn at_once(&self, what: What) {
        let vcpu = |number: u8| usize::from(number) % self.setup.vcpus;
        let to = |id: usize| 0xFEE0_0000 | (id as u64) << 12;
        match what {
            What::Kick(number) => self.kick(vcpu(number)),
            What::Interrupt(number) => {
                let id = vcpu(number);
                let kind = if number & 0x80 == 0 { Counted::Low } else { Counted::High };
                self.add(kind.sent_by_host(id));
                self.vm().msi(to(id), kind.vector().into());
            }
            What::Nmi(number) => {
                // The victim may have no handler at the moment.
                let id = vcpu(number) % (self.setup.vcpus - usize::from(self.setup.victim));
                self.add(Counted::Nmi.sent_by_host(id));
                self.vm().msi(to(id), 0x400);
            }
            What::LowestPriority => {
                // Logical destination with redirection hint: all of them.
                let all = (1u64 << self.setup.vcpus) - 1;
                self.vm().msi(0xFEE0_000C | all << 12, 0x100 | u32::from(LOWEST));
            }
            What::Code => {
                let value = self.add(FUNCTIONS + MAX_VCPUS as u64 * 0x1000 + 4);
                put32(&self.memory, HOST_FLAG, value);
            }
            What::DirtyLog(on) => self.vm().set_dirty_log(on).expect("a log"),
            What::TakeLog => drop(self.vm().take_dirty_log().expect("a log")),
            _ => {}
        }
    }

    /// An event at which all vCPUs stand.
    pub fn standing(&self, what: What, vcpus: &mut [Standing<'_>]) {
        self.vm().clock().stop().expect("the clock can stand");
        match what {
            What::Reload(number) => {
                let id = usize::from(number) % vcpus.len();
                reload(&mut vcpus[id]);
            }
            What::SetRegisters(number) => {
                let id = usize::from(number) % vcpus.len();
                set_registers(&mut vcpus[id]);
            }
            What::ReloadAll | What::Migrate if vcpus.iter().all(|vcpu| !vcpu.ended) => {
                let state = self.vm().save().expect("the chips can be saved");
                let save = |standing: &mut Standing| standing.cpu.vcpu.save().expect("it stands");
                let states: Vec<_> = vcpus.iter_mut().map(save).collect();
                if what == What::Migrate {
                    let new = self.renew();
                    for (standing, vcpu) in vcpus.iter_mut().zip(new) {
                        *standing.cpu = Cpu { vcpu, steps: 0 };
                    }
                    self.vm().clock().stop().expect("the clock can stand");
                }
                self.vm().load(&state).expect("what was saved");
                for (standing, state) in vcpus.iter_mut().zip(&states) {
                    standing.cpu.vcpu.load(state).expect("what was saved");
                }
            }
            What::Step(number) => {
                let id = usize::from(number) % vcpus.len();
                if !vcpus[id].ended {
                    vcpus[id].cpu.begin_steps(number.into());
                }
            }
            What::Region => self.change_region(),
            _ => {}
        }
        self.vm().clock().start().expect("the clock can run");
    }

    fn change_region(&self) {
        let generation = self.add(REGION_GENERATION);
        if generation.is_multiple_of(2) {
            drop(self.memory.remove_region(GuestPhys(REGION)).expect("it is there"));
            return;
        }
        self.memory.add_region(GuestPhys(REGION), REGION_LEN).expect("it is not there");
        for word in [0x10, 0xFF8, 0x1800] {
            put32(&self.memory, REGION + word, generation);
        }
    }
}

fn reload(standing: &mut Standing) {
    if standing.ended {
        return;
    }
    let state = standing.cpu.vcpu.save().expect("it stands");
    standing.cpu.vcpu.load(&state).expect("what was saved");
    let again = standing.cpu.vcpu.save().expect("it stands");
    assert_eq!(state, again, "a vCPU is another when it was saved and loaded");
}

fn set_registers(standing: &mut Standing) {
    if standing.ended {
        return;
    }
    let state = standing.cpu.vcpu.save().expect("it stands");
    let vcpu = &mut *standing.cpu.vcpu;
    let image = vcpu.xsave().expect("state");
    vcpu.set_xsave(&image).expect("what was read");
    for index in [0x10u32, 0x277, 0xC000_0100, 0xC000_0102] {
        let value = vcpu.msr(index).expect("state").expect("an MSR that exists");
        if index != 0x10 {
            assert!(vcpu.set_msr(index, value).expect("state"), "MSR {index:#x}");
        }
    }
    let mut code = [0; 16];
    vcpu.peek(state.registers.rip, &mut code);
    vcpu.translate(state.registers.rip);
    // What waits for the next instruction, and HLT, end with registers that are set.
    let events = state.events;
    let plain = !events.shadow_sti && !events.shadow_mov_ss && events.interrupt.is_none();
    if plain && events.exception.is_none() && state.run == RunState::Runnable {
        let (registers, system) = (vcpu.registers(), vcpu.system_registers());
        vcpu.set_system_registers(&system.expect("state")).expect("what was read");
        vcpu.set_registers(&registers.expect("state")).expect("what was read");
    }
}
