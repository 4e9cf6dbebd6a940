//! Runs a guest on one tier and takes down what can be seen of it.

use std::sync::Arc;
use std::time::Duration;

use tetrarch_engine::{
    Exit, GuestFault, Hypercalls, Platform, RegisterPorts, Registers, Reply, SystemRegisters, Trap,
    Traps, Vcpu, Vm,
};
use tetrarch_engine_bt::{Config, create_vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::code::END_PORT;
use super::guest::{Guest, Mode};
use super::input::{Input, Random};
use super::tables::{self, RAM, has_error_code};
use super::watchdog::Watchdog;

const MAX_EXITS: usize = 96;
/// XRSTOR from a device takes a hundred, and then there may be a fault.
const MAX_EXITS_OF_ONE_INSTRUCTION: usize = 1024;
const END: Exit = Exit::PortOut { port: END_PORT as u16, size: 1, data: 0 };
const ARITHMETIC_FLAGS: u16 = 0x8D5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Done,
    Halt,
    Shutdown,
    /// More exits than a run may have.
    Enough,
    /// The guest was still running when its time was over.
    Kicked,
}

#[derive(PartialEq)]
pub struct Outcome {
    pub end: End,
    pub exits: Vec<Exit>,
    /// What an exception handler returned to, or where the guest was, at each exit.
    pub places: Vec<u64>,
    pub registers: Registers,
    pub system: SystemRegisters,
    pub xsave: Vec<u8>,
    pub memory: Vec<u8>,
}

pub struct Machine {
    pub memory: Arc<GuestMemory>,
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
}

impl Machine {
    /// On the bare CPU.
    pub fn new(translate: bool) -> Self {
        Self::on(translate, Platform::default())
    }

    pub fn on(translate: bool, platform: Platform) -> Self {
        let memory = Arc::new(GuestMemory::new(RAM).expect("1 MiB of memory"));
        let vm =
            create_vm(Arc::clone(&memory), Config { translate, platform, ..Config::default() })
                .expect("the engine runs on this host");
        let vcpu = vm.create_vcpu(0).expect("the VM has a vCPU");
        Self { memory, vm, vcpu }
    }

    /// Runs the guest to its end. `chaos` says what a hostile world does to the
    /// machine at its exits.
    pub fn run(&mut self, guest: &Guest, limit: Duration, chaos: Option<Input>) -> Option<Outcome> {
        let loaded = guest.load(&self.memory, &mut *self.vcpu);
        loaded.then(|| self.go_on(guest, limit, chaos))
    }

    /// Runs on from the state that the vCPU has.
    pub fn go_on(&mut self, guest: &Guest, limit: Duration, mut chaos: Option<Input>) -> Outcome {
        let _watchdog = Watchdog::new(self.vcpu.kicker(), limit);
        let mut random = Random(guest.answers);
        let (mut exits, mut places) = (Vec::new(), Vec::new());
        let end = loop {
            let exit = match self.vcpu.run() {
                Ok(exit) => exit,
                Err(error) => panic!("the engine gave up: {error}"),
            };
            let exit = match exit {
                Exit::PortOut { port, .. } if port == u16::from(END_PORT) => END,
                other => other,
            };
            match exit {
                END => {
                    exits.push(exit);
                    break End::Done;
                }
                Exit::Halt => break End::Halt,
                Exit::Shutdown => break End::Shutdown,
                Exit::Kicked => break End::Kicked,
                Exit::PortOut { port: port @ 0..32, size: 1, .. } => {
                    if guest.repeatable {
                        hide_frame_flags(&mut exits);
                    }
                    let (place, done) = self.skip_faulting(guest, port as u8);
                    places.push(place);
                    if done {
                        break End::Done;
                    }
                }
                Exit::PortIn { .. } | Exit::MmioRead { .. } => {
                    self.vcpu.reply(Reply::Value(random.next()));
                }
                Exit::Hypercall { .. }
                | Exit::MsrRead { .. }
                | Exit::MsrWrite { .. }
                | Exit::PortWithRegisters { .. }
                | Exit::Trap(_) => self.answer_as_platform(exit, &mut random),
                _ => self.vcpu.reply(Reply::Done),
            }
            exits.push(exit);
            if places.len() < exits.len() {
                places.push(self.vcpu.registers().expect("state").rip);
            }
            if exits.len() == MAX_EXITS {
                break End::Enough;
            }
            if let Some(chaos) = &mut chaos
                && !chaos.is_empty()
            {
                self.disturb(guest, chaos);
            }
        };
        let mut memory = vec![0; RAM as usize];
        self.memory.read(GuestPhys(0), &mut memory).expect("all of RAM");
        let mut registers = self.vcpu.registers().expect("state");
        if guest.repeatable && end != End::Halt && exits.last() != Some(&END) {
            // As in `skip_faulting`.
            hide_frame_flags(&mut exits);
            registers.rflags &= !u64::from(ARITHMETIC_FLAGS);
        }
        Outcome {
            end,
            exits,
            places,
            registers,
            system: self.vcpu.system_registers().expect("state"),
            xsave: self.vcpu.xsave().expect("state"),
            memory,
        }
    }

    /// Any answer that a handler can give, sensible or not.
    fn answer_as_platform(&mut self, exit: Exit, random: &mut Random) {
        let choice = random.next();
        if matches!(exit, Exit::Trap(_)) && choice & 7 == 0 {
            let mut system = self.vcpu.system_registers().expect("registers");
            system.cr0 ^= random.next() & 0x8001_0001;
            system.cs.attributes ^= random.next() as u32 & 0x60FF;
            system.ss.attributes ^= random.next() as u32 & 0x60FF;
            system.gs.base = random.next();
            let _ = self.vcpu.set_system_registers(&system);
        }
        let registers = self.vcpu.registers().expect("registers");
        let length = match exit {
            Exit::Trap(Trap::Syscall { next }) => next.wrapping_sub(registers.rip),
            Exit::Hypercall { .. } => 3,
            _ => 2,
        };
        self.vcpu.reply(match choice >> 8 & 7 {
            0 => Reply::Done,
            1 | 2 => Reply::Value(random.next()),
            3 => Reply::Fault(GuestFault {
                vector: random.next() as u8 & if choice & 64 == 0 { 31 } else { 255 },
                error: (choice & 128 != 0).then(|| random.next() as u32),
                address: random.next(),
            }),
            4 => {
                let mut registers = registers;
                registers.gpr[random.next() as usize & 15] = random.next();
                registers.rflags ^= random.next() >> (random.next() & 63);
                registers.rip = registers.rip.wrapping_add(random.next() & 15);
                Reply::Registers(Box::new(registers))
            }
            5 => Reply::Registers(Box::new(Registers {
                gpr: std::array::from_fn(|_| random.next()),
                rip: random.next(),
                rflags: random.next(),
            })),
            _ => {
                let rip = registers.rip.wrapping_add(length);
                Reply::Registers(Box::new(Registers { rip, ..registers }))
            }
        });
    }

    /// The guest is in an exception handler: makes it return to the instruction
    /// after the one that faulted. Returns where that was, and whether it was the
    /// end of the guest's code, where user code may not write to the port.
    fn skip_faulting(&mut self, guest: &Guest, vector: u8) -> (u64, bool) {
        self.vcpu.reply(Reply::Done);
        let word = guest.mode.frame_word();
        let error = if guest.mode != Mode::Real && has_error_code(vector) { word } else { 0 };
        let (registers, system) =
            (self.vcpu.registers().expect("state"), self.vcpu.system_registers().expect("state"));
        let sp = match guest.mode {
            Mode::Real => system.ss.base.wrapping_add(registers.gpr[4] & 0xFFFF),
            _ if word == 4 => registers.gpr[4] & 0xFFFF_FFFF,
            _ => registers.gpr[4],
        };
        let Some(at) = tables::physical(sp.wrapping_add(error)).map(GuestPhys) else {
            return (u64::MAX, false);
        };
        let size = word as usize;
        let mut bytes = [0; 8];
        if self.memory.read(at, &mut bytes[..size]).is_err() {
            return (u64::MAX, false);
        }
        if guest.repeatable {
            // The translator makes flags again that nothing would have needed, undefined
            // ones not as they were; since the instruction is skipped here, code after it
            // would see them.
            let flags = at.offset(2 * word);
            let mut kept = [0; 8];
            if self.memory.read(flags, &mut kept[..2]).is_ok() {
                let kept = u16::from_le_bytes([kept[0], kept[1]]) & !ARITHMETIC_FLAGS;
                let _ = self.memory.write(flags, &kept.to_le_bytes());
            }
        }
        let base = if guest.mode == Mode::Real { system.cs.base } else { 0 };
        let code = guest.code_at.wrapping_sub(base);
        let offset = u64::from_le_bytes(bytes).wrapping_sub(code);
        let end = guest.code.bytes.len() as u64;
        if offset < end {
            let next = code + guest.code.after(offset);
            let _ = self.memory.write(at, &next.to_le_bytes()[..size]);
        }
        (u64::from_le_bytes(bytes), (end - 3..end).contains(&offset))
    }

    /// A kick must end a guest that keeps the machine busy with exits.
    fn must_be_stoppable(&mut self) {
        let _watchdog = Watchdog::new(self.vcpu.kicker(), Duration::from_millis(4));
        self.vcpu.kicker().kick();
        for _ in 0..MAX_EXITS_OF_ONE_INSTRUCTION {
            match self.vcpu.run() {
                Ok(Exit::Kicked | Exit::Halt | Exit::Shutdown) => return,
                Ok(_) => self.vcpu.reply(Reply::Value(0)),
                Err(error) => panic!("the engine gave up: {error}"),
            }
        }
        panic!("the guest goes on after a kick");
    }

    /// One thing that other parts of a machine do while a guest runs.
    fn disturb(&mut self, guest: &Guest, input: &mut Input) {
        match input.u8() {
            0 | 1 => self.vm.irq_line(u32::from(input.u8()), input.bool()),
            2 => self.vm.msi(0xFEE0_0000 | u64::from(input.u32()), input.u32()),
            3 | 4 => {
                let at = guest.code_at % tables::PROGRAMS + u64::from(input.u8());
                let length = usize::from(input.u8() % 16);
                let _ = self.memory.write(GuestPhys(at), input.bytes(length));
            }
            5 => {
                let at = u64::from(input.u32());
                let _ = self.memory.write(GuestPhys(at % RAM), input.bytes(8));
            }
            6 => {
                let state = self.vm.save().expect("it always can");
                self.vm.load(&state).expect("what was saved is valid");
            }
            7 => {
                let mut bytes = [0; 64];
                self.vcpu.peek(input.u64(), &mut bytes);
            }
            8 => {
                let mut registers = self.vcpu.registers().expect("state");
                registers.rip = registers.rip.wrapping_add(u64::from(input.u8()));
                registers.rflags ^= u64::from(input.u32());
                self.vcpu.set_registers(&registers).expect("registers");
            }
            9 => {
                let bases = [0, 0x170, 0x200, 0x250, 0x6E0, 0x800, 0xC000_0080, 0x4B56_4D00];
                let index = bases[usize::from(input.u8()) % 8] + u32::from(input.u8());
                let value = input.u64();
                let _ = self.vcpu.set_msr(index, value);
                let _ = self.vcpu.msr(index);
            }
            10 => {
                let image = self.vcpu.xsave().expect("state");
                self.vcpu.set_xsave(&image).expect("what was saved is valid");
            }
            11 => {
                let mut system = self.vcpu.system_registers().expect("state");
                system.cr3 ^= u64::from(input.u16()) << 12;
                system.cr4 ^= u64::from(input.u32()) & 0x15_07FF;
                system.cr0 ^= u64::from(input.u8());
                let _ = self.vcpu.set_system_registers(&system);
            }
            12 => {
                let system = self.vcpu.system_registers().expect("state");
                let _ = self.vcpu.set_system_registers(&system);
            }
            _ => {}
        }
    }
}

/// As in `skip_faulting`, for a frame that went to a device just now.
fn hide_frame_flags(exits: &mut [Exit]) {
    for exit in exits.iter_mut().rev() {
        match exit {
            Exit::MmioWrite { data, .. } => *data &= !u64::from(ARITHMETIC_FLAGS),
            _ => break,
        }
    }
}

fn hostile(data: &[u8], translate: bool) {
    hostile_on(data, translate, Platform { kvm: true, ..Platform::default() }, |_| {});
}

fn hostile_on(data: &[u8], translate: bool, platform: Platform, change: impl Fn(&mut Guest)) {
    let mut input = Input::new(data);
    let share = usize::from(input.u8()) % 4;
    let chaos = input.bytes(data.len() / 8 * share);
    let mut guest = Guest::read(&mut input, false);
    change(&mut guest);
    let mut machine = Machine::on(translate, platform);
    let outcome = machine.run(&guest, Duration::from_millis(4), Some(Input::new(chaos)));
    if outcome.is_some_and(|outcome| outcome.end == End::Enough) {
        machine.must_be_stoppable();
    }
}

/// Any guest in any world, interpreted.
pub fn interpreter(data: &[u8]) {
    hostile(data, false);
}

/// Any guest in any world, translated.
pub fn translator(data: &[u8]) {
    hostile(data, true);
}

/// A platform that takes whatever it can, with handlers that answer anything.
pub fn platform(data: &[u8]) {
    let (&first, data) = data.split_first().unwrap_or((&0, &[]));
    let platform = Platform {
        kvm: first & 2 != 0,
        msrs: vec![if first & 64 != 0 { 0..=u32::MAX } else { 0xC000_0080..=0xC000_0103 }],
        hypercalls: if first & 4 != 0 { Hypercalls::All } else { Hypercalls::Kernel },
        ports: vec![
            RegisterPorts { ports: 0x40..=0x43, any_privilege: false },
            RegisterPorts { ports: 0x100..=0xFFFF, any_privilege: first & 8 != 0 },
        ],
        traps: Traps {
            exceptions: if first & 16 != 0 { u32::MAX } else { 0 },
            syscall: first & 32 != 0,
        },
        ..Platform::default()
    };
    hostile_on(data, first & 1 != 0, platform, |guest| {
        let mut random = Random(guest.answers);
        guest.code.replace_some(|| {
            let instructions: [&[u8]; 8] = [
                &[0x0F, 0x01, 0xC1], // vmcall
                &[0x0F, 0x01, 0xD9], // vmmcall
                &[0x0F, 0x32],       // rdmsr
                &[0x0F, 0x30],       // wrmsr
                &[0x0F, 0x05],       // syscall
                &[0xED],             // in eax, dx
                &[0xF3, 0x6E],       // rep outsb
                &[0x6D],             // insd
            ];
            let choice = random.next();
            instructions.get((choice & 15) as usize).copied()
        });
    });
}
