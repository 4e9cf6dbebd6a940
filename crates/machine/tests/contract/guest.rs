//! A VM of either engine in front of a few bytes of code.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use tetrarch_engine::{Exit, Registers, Reply, Segment, Vcpu, Vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

pub const MIB: u64 = 1 << 20;
pub const CODE: u64 = 0x1000;
pub const STACK: u64 = 0x800;
/// PML4, page directory pointers, page directory, and the page tables of the first
/// and of the second 2 MiB.
pub const PAGE_TABLES: [u64; 5] = [0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x1_4000];
pub const FRESH: u64 = 2 * MIB;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Bt,
    /// `Bt` without its translator.
    Interpreter,
    Kvm,
}

impl Engine {
    pub const ALL: [Self; 3] = [Self::Bt, Self::Interpreter, Self::Kvm];

    pub fn vm(self, memory: &Arc<GuestMemory>) -> Arc<dyn Vm> {
        let memory = Arc::clone(memory);
        let made = match self {
            Self::Kvm => {
                let config = tetrarch_engine_kvm::Config::default();
                tetrarch_engine_kvm::create_vm(memory, config).map(|vm| vm as Arc<dyn Vm>)
            }
            _ => {
                let translate = self == Self::Bt;
                let config = tetrarch_engine_bt::Config { translate, ..Default::default() };
                tetrarch_engine_bt::create_vm(memory, config)
            }
        };
        made.unwrap_or_else(|error| panic!("no VM: {error}"))
    }
}

/// No exit of these guests is longer in coming, on any host.
pub const LONGEST: Duration = Duration::from_secs(60);

/// Makes a vCPU look up now and then while this lives, so that a guest that
/// hangs is seen.
struct Watchdog {
    _end: Sender<()>,
}

impl Watchdog {
    fn new(vcpu: &dyn Vcpu) -> Self {
        let (kicker, (end, ended)) = (vcpu.kicker(), channel());
        std::thread::spawn(move || {
            while ended.recv_timeout(LONGEST / 10) == Err(RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        Self { _end: end }
    }
}

pub struct Guest {
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
    pub memory: Arc<GuestMemory>,
    _watchdog: Watchdog,
}

impl Guest {
    /// In real mode, before its first instruction.
    pub fn new(engine: Engine, code: &[u8]) -> Self {
        let memory = Arc::new(GuestMemory::new(MIB).expect("a mebibyte"));
        let vm = engine.vm(&memory);
        let vcpu = vm.create_vcpu(0).expect("vCPU 0");
        let _watchdog = Watchdog::new(&*vcpu);
        let mut guest = Self { vm, vcpu, memory, _watchdog };
        guest.write(CODE, code);
        guest.start_at(CODE);
        guest
    }

    /// In 64-bit mode, where `Bt` translates. The first 2 MiB are mapped to themselves
    /// with all A and D bits set, and once more from [`FRESH`] on with those of
    /// the pages clear.
    pub fn new_64_bit(engine: Engine, code: &[u8]) -> Self {
        const TABLE: u64 = 3; // present and writable
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        let mut guest = Self::new(engine, code);
        let [root, pointers, directory, first, second] = PAGE_TABLES;
        for (at, entry) in [
            (root, pointers | TABLE | ACCESSED),
            (pointers, directory | TABLE | ACCESSED),
            (directory, first | TABLE | ACCESSED),
            (directory + 8, second | TABLE | ACCESSED),
        ] {
            guest.write(at, &entry.to_le_bytes());
        }
        for page in 0..512 {
            let entry = page << 12 | TABLE;
            guest.write(first + page * 8, &(entry | ACCESSED | DIRTY).to_le_bytes());
            guest.write(second + page * 8, &entry.to_le_bytes());
        }
        let mut system = guest.vcpu.system_registers().expect("state");
        system.cs = Segment { base: 0, limit: 0xFFFF_FFFF, attributes: 0xA09B, selector: 8 };
        let data = Segment { base: 0, limit: 0xFFFF_FFFF, attributes: 0xC093, selector: 16 };
        (system.ds, system.es, system.ss) = (data, data, data);
        system.cr0 = 0x8000_0011; // PG, ET, PE
        system.cr3 = root;
        system.cr4 = 0x20; // PAE
        system.efer = 0x500; // LMA, LME
        guest.vcpu.set_system_registers(&system).expect("64-bit mode");
        guest
    }

    /// Lets 64-bit code reach a page that is not RAM, at an address of the second MiB.
    pub fn map(&self, linear: u64, page: u64) {
        let [.., table, _] = PAGE_TABLES;
        self.write(table + (linear >> 12) * 8, &(page | 0x63).to_le_bytes());
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory.write(GuestPhys(address), data).expect("RAM");
    }

    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(GuestPhys(address), &mut data).expect("RAM");
        data
    }

    pub fn start_at(&mut self, rip: u64) {
        let mut system = self.vcpu.system_registers().expect("state");
        system.cs = Segment { base: 0, limit: 0xFFFF, attributes: 0x9B, selector: 0 };
        self.vcpu.set_system_registers(&system).expect("real mode");
        let mut registers = Registers { rip, rflags: 2, ..Registers::default() };
        registers.gpr[4] = STACK;
        self.vcpu.set_registers(&registers).expect("registers");
    }

    /// Runs to the next exit that is no kick.
    pub fn run(&mut self) -> Exit {
        let start = Instant::now();
        loop {
            match self.vcpu.run().unwrap_or_else(|error| panic!("{error}")) {
                Exit::Kicked => assert!(start.elapsed() < LONGEST, "the guest hangs"),
                exit => return exit,
            }
        }
    }

    /// Finishes the instruction whose exit was answered.
    pub fn settle(&mut self) {
        self.vcpu.kicker().kick();
        assert_eq!(self.vcpu.run().unwrap_or_else(|error| panic!("{error}")), Exit::Kicked);
    }

    /// The next exit, which must be an OUT to port 0x80; what it writes.
    pub fn out(&mut self) -> u32 {
        match self.run() {
            Exit::PortOut { port: 0x80, data, .. } => {
                self.vcpu.reply(Reply::Done);
                data
            }
            exit => panic!("{exit:?}, not an OUT to port 0x80"),
        }
    }
}

/// Whether the kernel lets a vCPU's TSC be set and then leaves it alone. A KVM without
/// hardware may not; and on a host whose TSC is unstable KVM moves it at each entry by
/// a clock of its own (Linux, arch/x86/kvm/x86.c, tsc_catchup).
pub fn tsc_can_be_set(engine: Engine) -> bool {
    const TSC: u32 = 0x10;
    let mut guest = Guest::new(engine, &[]);
    let wanted = 1 << 50;
    let read = |guest: &mut Guest| guest.vcpu.msr(TSC).unwrap().unwrap_or(0);
    let set = guest.vcpu.set_msr(TSC, wanted).unwrap();
    let (first, start) = (read(&mut guest), tetrarch_engine::host_tsc());
    std::thread::sleep(std::time::Duration::from_millis(20));
    let ticks = tetrarch_engine::host_tsc() - start;
    let moves = read(&mut guest).wrapping_sub(first) > ticks / 2;
    let can = set && (wanted..2 * wanted).contains(&first) && moves;
    assert!(can || engine == Engine::Kvm);
    if !can {
        let why = if set && !moves { "the host's is unstable" } else { "it is refused" };
        eprintln!("left out: this KVM does not let a TSC be set ({why})");
    }
    can
}

/// An eventfd(2) that does not block.
pub struct Event(OwnedFd);

impl Event {
    pub fn new() -> Self {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Self(eventfd(0, flags).expect("a descriptor"))
    }

    pub fn signal(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).expect("an eventfd");
    }

    /// How often it was signalled.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
