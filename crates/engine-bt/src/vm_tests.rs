//! INIT and SIPI (Intel SDM 3A, 9.1 and 9.4), by messages to the local APICs; and what
//! an error of ours leaves of a VM.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use tetrarch_engine::{Exit, Registers, Reply, RunState};
use tetrarch_memory::{GuestPhys, MemoryObserver};

use super::*;

const INIT: u32 = 0x500;
const SIPI: u32 = 0x600;
const NMI: u32 = 0x400;
/// jmp $
const LOOP: [u8; 2] = [0xEB, 0xFE];

fn vm(vcpus: u32) -> BtVm {
    let memory = Arc::new(GuestMemory::new(2 << 20).unwrap());
    build(
        memory,
        Config { topology: Topology::flat(vcpus), ..Config::default() },
        Room::USUAL,
        None,
    )
    .unwrap()
}

fn send(vm: &BtVm, apic_id: u64, what: u32) {
    vm.msi(0xFEE0_0000 | apic_id << 12, what);
}

/// Runs until the vCPU has seen what was sent, and no further.
fn run_kicked(vcpu: &mut dyn Vcpu) {
    vcpu.kicker().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
}

#[test]
fn an_application_processor_waits_for_its_sipi() {
    let vm = vm(2);
    // out 0x80, al ; jmp $, at the pages 0x10 and 0x20
    for page in [0x10, 0x20] {
        vm.shared.memory.write(GuestPhys(page << 12), &[0xE6, 0x80, 0xEB, 0xFE]).unwrap();
    }
    let mut vcpu = vm.create_vcpu(1).unwrap();
    let reset = vcpu.registers().expect("state");
    run_kicked(&mut *vcpu);
    // A SIPI, too, counts only from an INIT on in the order of the protocol, but
    // the processor waits since RESET. An NMI has to wait with it.
    send(&vm, 1, NMI);
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.registers().expect("state"), reset, "nothing has run");

    send(&vm, 1, INIT);
    send(&vm, 1, SIPI | 0x10);
    // The second one of the protocol comes too late to count.
    send(&vm, 1, SIPI | 0x20);
    assert!(matches!(vcpu.run().unwrap(), Exit::PortOut { port: 0x80, .. }));
    let system = vcpu.system_registers().expect("state");
    assert_eq!((system.cs.selector, system.cs.base), (0x1000, 0x1_0000));
    assert_eq!(vcpu.registers().expect("state").rip & !2, 0);
    vcpu.reply(Reply::Done);

    // It runs now; an INIT makes it wait again.
    send(&vm, 1, INIT);
    run_kicked(&mut *vcpu);
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.registers().expect("state").rip, 0xFFF0);
    send(&vm, 1, SIPI | 0x20);
    assert!(matches!(vcpu.run().unwrap(), Exit::PortOut { port: 0x80, .. }));
    assert_eq!(vcpu.system_registers().expect("state").cs.base, 0x2_0000);
}

#[test]
fn registers_can_be_set_without_starting_a_waiting_processor() {
    let vm = vm(2);
    vm.shared.memory.write(GuestPhys(0x1000), &LOOP).unwrap();
    let mut vcpu = vm.create_vcpu(1).unwrap();
    vcpu.set_registers(&Registers { rip: 0x1000, rflags: 2, ..Registers::default() })
        .expect("registers");
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.registers().expect("state").rip, 0x1000);
    send(&vm, 1, SIPI);
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.registers().expect("state").rip, 0);
}

#[test]
fn init_of_the_bootstrap_processor_keeps_what_the_manual_says() {
    let vm = vm(1);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vm.shared.memory.write(GuestPhys(0x1000), &LOOP).unwrap();
    let mut system = vcpu.system_registers().expect("state");
    system.cs.base = 0;
    system.cr0 = 0x11; // CD and NW clear: they stay so
    system.cr3 = 0x5000;
    system.cr4 = 0x620;
    vcpu.set_system_registers(&system).unwrap();
    let registers = Registers { rip: 0x1000, rflags: 0x202, gpr: [7; 16] };
    vcpu.set_registers(&registers).expect("registers");
    const STAR: u32 = 0xC000_0081;
    assert!(vcpu.set_msr(STAR, 0x1234).unwrap());
    let mut xsave = vcpu.xsave().expect("state");
    xsave[160..176].fill(0x5A); // XMM0
    xsave[512] |= 3;
    vcpu.set_xsave(&xsave).unwrap();
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.registers().expect("state"), registers);

    send(&vm, 0, INIT);
    run_kicked(&mut *vcpu);
    let (after, system) =
        (vcpu.registers().expect("state"), vcpu.system_registers().expect("state"));
    assert_eq!((after.rip, after.rflags, after.gpr[0]), (0xFFF0, 2, 0));
    assert_eq!((system.cs.selector, system.cs.base), (0xF000, 0xFFFF_0000));
    assert_eq!((system.cr0, system.cr3, system.cr4), (0x10, 0, 0));
    assert_eq!(system.idt.limit, 0xFFFF);
    assert_eq!(vcpu.msr(STAR).unwrap(), Some(0x1234));
    assert_eq!(vcpu.xsave().expect("state")[160..176], [0x5A; 16]);
    // It starts instead of waiting, though a SIPI comes.
    send(&vm, 0, SIPI | 0x10);
    run_kicked(&mut *vcpu);
    assert_eq!(vcpu.system_registers().expect("state").cs.base, 0xFFFF_0000);
}

#[test]
fn halt_that_a_kick_has_ended_is_saved_as_none() {
    let vm = vm(1);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = vcpu.save().unwrap();
    state.run = RunState::Halted;
    vcpu.load(&state).unwrap();
    assert_eq!(vcpu.save().unwrap().run, RunState::Halted);
    vm.shared.irqchip.unhalt(0);
    assert_eq!(vcpu.save().unwrap().run, RunState::Runnable);
}

struct Fails;

impl MemoryObserver for Fails {
    fn written(&self, _: GuestPhys, _: u64) {
        panic!("as an error of ours would");
    }
}

#[test]
fn a_vcpu_that_panicked_is_waited_for_by_nobody() {
    const WALL_CLOCK: u64 = 0x4B56_4D00;
    let memory = Arc::new(GuestMemory::new(2 << 20).unwrap());
    let platform = Platform { kvm: true, ..Platform::default() };
    let config = Config { platform, ..Config::default() };
    let vm = build(Arc::clone(&memory), config, Room::USUAL, None).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut system = vcpu.system_registers().expect("state");
    system.cs.base = 0;
    vcpu.set_system_registers(&system).unwrap();
    memory.write(GuestPhys(0x1000), &[0x0F, 0x30]).unwrap(); // wrmsr
    let mut registers = Registers { rip: 0x1000, rflags: 2, ..Registers::default() };
    (registers.gpr[0], registers.gpr[1]) = (0x3000, WALL_CLOCK);
    vcpu.set_registers(&registers).expect("registers");
    // The engine writes the clock's page, inside the run.
    memory.add_observer(Arc::new(Fails));
    assert!(catch_unwind(AssertUnwindSafe(|| vcpu.run())).is_err());

    let (taken, log) = mpsc::channel();
    std::thread::spawn(move || {
        vm.set_dirty_log(true).unwrap();
        taken.send(vm.take_dirty_log().is_ok())
    });
    assert_eq!(log.recv_timeout(Duration::from_secs(60)), Ok(true), "it waits for the vCPU");
}
