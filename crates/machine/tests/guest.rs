//! A machine as a program uses it: real-mode guests of a few bytes on engine bt.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use tetrarch_bus::{
    Device, DeviceDoorbell, DeviceError, HoldError, NoHandlers, RunEnd, RunError, Sizes,
};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{CpuModel, Doorbell, DoorbellAddress, EngineError, Platform, Vcpu};
use tetrarch_machine::{Machine, MachineError, Processors, State, collect, dump, engine_available};
use tetrarch_memory::GuestPhys;

const START: u64 = 0x1000;

/// Keeps the last write, and reads as it.
#[derive(Default)]
struct Register(AtomicU64);

impl Device for Register {
    fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
        Ok(self.0.load(Ordering::SeqCst))
    }

    fn write(&self, _: u64, _: u8, value: u64) -> Result<(), DeviceError> {
        self.0.store(value, Ordering::SeqCst);
        Ok(())
    }
}

/// A machine with `code` at [`START`], to be run in real mode.
fn machine(code: &[u8]) -> Machine {
    let machine = Machine::new(
        "bt",
        1 << 20,
        Processors::default(),
        Platform::default(),
        CpuModel::default(),
        None,
    )
    .expect("engine bt");
    machine.memory.write(GuestPhys(START), code).expect("RAM");
    set(
        &machine,
        &[("rip", START), ("rflags", 2), ("rsp", 0x800), ("cs_selector", 0), ("cs_base", 0)],
    )
    .expect("registers of real mode");
    machine
}

fn set(machine: &Machine, values: &[(&str, u64)]) -> Result<(), String> {
    let values = values.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let set = |vcpu: &mut dyn Vcpu| {
        let old = State::of(vcpu).map_err(|error| error.to_string())?;
        let mut new = old;
        new.set(values).map_err(|error| error.to_string())?;
        new.store(&old, vcpu).map_err(|error| error.to_string())
    };
    machine.with_vcpu(&machine.vcpus[0], set).map_err(|failed| failed.error.to_string())?
}

fn registers(machine: &Machine) -> BTreeMap<String, u64> {
    machine
        .with_vcpu(&machine.vcpus[0], |vcpu| State::of(vcpu))
        .expect("between two")
        .expect("registers")
        .values()
}

fn run(machine: &Machine) -> Result<RunEnd, RunError> {
    machine.vcpus[0].run(machine, &NoHandlers, &mut || Ok(()))
}

#[test]
fn guest_runs_to_its_halt_and_reaches_a_device() {
    // mov al, 0x5a ; out 0x80, al ; in al, 0x80 ; inc ax ; cli ; hlt
    let machine = machine(b"\xb0\x5a\xe6\x80\xe4\x80\x40\xfa\xf4");
    let register = Arc::new(Register::default());
    machine.bus.attach_ports(0x80, 1, Sizes::ALL, "register", register.clone()).expect("free");
    assert_eq!(run(&machine).expect("no error"), RunEnd::Halted);
    assert_eq!(register.0.load(Ordering::SeqCst), 0x5A);
    let registers = registers(&machine);
    assert_eq!((registers["rax"] & 0xFF, registers["rip"]), (0x5B, START + 9));
    let stats = collect(&machine);
    assert_eq!((stats["exits"]["port_out"], stats["exits"]["port_in"]), (1, 1));
    assert_eq!((stats["exits"]["halt"], stats["accesses"]["rust"]), (1, 2));
}

/// Counts writes; those of its byte 1 only signal an event.
struct Notified {
    writes: AtomicU64,
    event: Arc<OwnedFd>,
}

impl Notified {
    fn new() -> Arc<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = Arc::new(eventfd(0, flags).expect("a descriptor"));
        Arc::new(Self { writes: AtomicU64::new(0), event })
    }

    /// Signals and writes since the last call.
    fn seen(&self) -> (u64, u64) {
        let mut count = [0; 8];
        let signals = rustix::io::read(&self.event, &mut count).map_or(0, |_| 1);
        (signals * u64::from_ne_bytes(count), self.writes.swap(0, Ordering::SeqCst))
    }
}

impl Device for Notified {
    fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn doorbells(&self) -> Vec<DeviceDoorbell> {
        let event = Arc::clone(&self.event) as _;
        vec![DeviceDoorbell { offset: 1, size: None, value: None, event }]
    }
}

/// A machine that writes a byte to each of these ports and halts, as often as it is asked.
fn writer(ports: &[u8]) -> (Machine, impl Fn(&Machine)) {
    let mut code: Vec<u8> = ports.iter().flat_map(|&port| [0xE6, port]).collect();
    code.extend([0xFA, 0xF4]);
    let once = |machine: &Machine| {
        set(machine, &[("rip", START)]).expect("a register");
        assert_eq!(run(machine).expect("no error"), RunEnd::Halted);
    };
    (machine(&code), once)
}

#[test]
fn doorbell_of_a_device_goes_with_its_region() {
    let (machine, write) = writer(&[0x90, 0x91, 0x95]);
    let device = Notified::new();
    let region =
        machine.bus.attach_ports(0x90, 4, Sizes::ALL, "device", device.clone()).expect("free");
    let exits = || collect(&machine)["exits"]["port_out"];
    write(&machine);
    assert_eq!((device.seen(), exits()), ((1, 1), 2));
    region.move_to(0x94).expect("there");
    write(&machine);
    assert_eq!((device.seen(), exits()), ((1, 0), 4));
    region.unmap().expect("there");
    write(&machine);
    assert_eq!((device.seen(), exits()), ((0, 0), 7));
    region.map().expect("there");
    write(&machine);
    assert_eq!((device.seen(), exits()), ((1, 0), 9));
    region.detach();
    write(&machine);
    assert_eq!((device.seen(), exits()), ((0, 0), 12));
}

#[test]
fn doorbell_is_silent_where_another_region_answers() {
    let (machine, write) = writer(&[0x91]);
    let (first, second) = (Arc::new(Register::default()), Notified::new());
    let bus = &machine.bus;
    let first = bus.attach_ports(0x91, 1, Sizes::ALL, "first", first).expect("free");
    let region = bus.attach_ports(0xB0, 4, Sizes::ALL, "second", second.clone()).expect("free");
    region.move_to(0x90).expect("there");
    write(&machine);
    assert_eq!(second.seen(), (0, 0));
    first.unmap().expect("there");
    write(&machine);
    assert_eq!(second.seen(), (1, 0));
}

#[test]
fn doorbell_that_the_engine_does_not_take_is_a_write() {
    let (machine, write) = writer(&[0x91]);
    let taken = Notified::new();
    let doorbell = Doorbell::at(DoorbellAddress::Port(0x91));
    machine.engine.add_doorbell(doorbell, taken.event.as_fd()).expect("free");
    let device = Notified::new();
    let region =
        machine.bus.attach_ports(0x90, 4, Sizes::ALL, "device", device.clone()).expect("free");
    write(&machine);
    assert_eq!((taken.seen(), device.seen()), ((1, 0), (0, 0)));
    machine.engine.remove_doorbell(&doorbell).expect("there");
    write(&machine);
    assert_eq!(device.seen(), (0, 1));
    // The next change finds the place free.
    region.move_to(0x90).expect("there");
    write(&machine);
    assert_eq!(device.seen(), (1, 0));
}

#[test]
fn engines_own_ports_memory_and_ram_are_taken() {
    let machine = machine(b"\xf4");
    let attach =
        |base| machine.bus.attach_mmio(base, 0x1000, Sizes::ALL, "x", Arc::<Register>::default());
    for (base, owner) in [(0, "RAM"), (0xFEC0_0000, "I/O APIC"), (0xFEE0_0000, "local APICs")] {
        let error = attach(base).err().expect("taken").to_string();
        assert!(error.contains(owner), "{error}");
    }
    let error = machine.bus.attach_ports(0x43, 1, Sizes::ALL, "x", Arc::<Register>::default());
    assert!(error.err().expect("taken").to_string().contains("interval timer"));
}

#[test]
fn interrupt_line_reaches_the_guest() {
    // The PIC's IRR shows a line by level: mov al, 0x20 ; mov dx, 0x4d0 ;
    // out dx, al ; mov al, 0x0a ; out 0x20, al ; in al, 0x20 ; cli ; hlt
    let machine = machine(b"\xb0\x20\xba\xd0\x04\xee\xb0\x0a\xe6\x20\xe4\x20\xfa\xf4");
    let (first, second) =
        (machine.irq.source(5).expect("line"), machine.irq.source(5).expect("line"));
    first.set(true);
    second.set(true);
    second.set(false);
    run(&machine).expect("no error");
    assert_eq!(registers(&machine)["rax"] & 0x20, 0x20);
    drop(first);
    set(&machine, &[("rip", START)]).expect("rip");
    run(&machine).expect("no error");
    assert_eq!(registers(&machine)["rax"] & 0x20, 0);
}

#[test]
fn registers_that_cannot_be_are_named_and_none_is_set() {
    let machine = machine(b"\xf4");
    let error = set(&machine, &[("rax", 1), ("eax", 2), ("cs_selector", 0x1_0000)]).unwrap_err();
    assert!(error.contains("'eax'") && error.contains("cs_selector"), "{error}");
    assert_eq!(registers(&machine)["rax"], 0);
}

#[test]
fn dump_shows_registers_and_the_code_around_rip() {
    let machine = machine(b"\x90\xfa\xf4\x12\x34");
    set(&machine, &[("rbx", 0xDEAD)]).expect("rbx");
    run(&machine).expect("no error");
    let text = machine.with_vcpu(&machine.vcpus[0], dump).expect("between two").expect("registers");
    assert!(text.contains("RBX=000000000000dead"), "{text}");
    assert!(text.contains("90 fa f4 <12> 34"), "{text}");
}

#[test]
fn vcpu_that_runs_is_refused_to_its_own_devices() {
    struct Again(std::sync::Weak<Machine>);
    impl Device for Again {
        fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
            let machine = self.0.upgrade().expect("it calls us");
            let failed = machine.with_vcpu(&machine.vcpus[0], |_| ()).unwrap_err();
            assert!(matches!(failed.error, HoldError::OwnThread { vcpu: 0 }));
            assert!(failed.mend().contains("another thread"));
            assert!(matches!(run(&machine), Err(RunError::Engine(EngineError::Refused(_)))));
            Ok(7)
        }
        fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    // in al, 0x80 ; cli ; hlt
    let machine = Arc::new(machine(b"\xe4\x80\xfa\xf4"));
    let again = Arc::new(Again(Arc::downgrade(&machine)));
    machine.bus.attach_ports(0x80, 1, Sizes::ALL, "again", again).expect("free");
    run(&machine).expect("no error");
    assert_eq!(registers(&machine)["rax"] & 0xFF, 7);
}

#[test]
fn engines_and_sizes_that_cannot_be_are_refused() {
    let none = Processors { topology: Topology::flat(0), ..Processors::default() };
    assert!(engine_available("tcg").unwrap_err().mend.contains("bt, kvm"));
    assert!(matches!(
        Machine::new(
            "tcg",
            1 << 20,
            Processors::default(),
            Platform::default(),
            CpuModel::default(),
            None
        ),
        Err(MachineError::Engine(_))
    ));
    assert!(matches!(
        Machine::new("bt", 1 << 20, none, Platform::default(), CpuModel::default(), None),
        Err(MachineError::Engine(_))
    ));
    assert!(matches!(
        Machine::new(
            "bt",
            1,
            Processors::default(),
            Platform::default(),
            CpuModel::default(),
            None
        ),
        Err(MachineError::Memory(_))
    ));
}
