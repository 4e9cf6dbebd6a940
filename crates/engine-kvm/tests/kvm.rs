//! The engine on a real /dev/kvm. Without one the tests are listed as ignored, with
//! the reason; with REQUIRE_KVM=1 they fail. (The harness is not the standard one
//! because that cannot skip at run time.)

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{Exit, Registers, Reply, Segment, Vcpu, Vm};
use tetrarch_engine_kvm::{
    Config, DEVICE, DirtyTracking, KvmVcpu, KvmVm, available, create_vm, probe,
};
use tetrarch_memory::{GuestMemory, GuestPhys};

const MIB: u64 = 1 << 20;
const CODE: u64 = 0x1000;

struct Machine {
    vm: Arc<KvmVm>,
    vcpu: KvmVcpu,
    memory: Arc<GuestMemory>,
}

/// Each needs a KVM.
const TESTS: &[(&str, fn())] = &[
    ("kick_before_and_during_run_is_not_lost", kick_before_and_during_run_is_not_lost),
    ("memory_comes_and_goes_between_two_runs", memory_comes_and_goes_between_two_runs),
    ("bitmap_names_the_pages_written", bitmap_names_the_pages_written),
    ("ring_names_the_pages_written", ring_names_the_pages_written),
    ("wrong_ring_size_is_refused", wrong_ring_size_is_refused),
    ("xsave_image_goes_there_and_back", xsave_image_goes_there_and_back),
    (
        "halt_with_interrupts_off_ends_the_machine_and_with_them_on_does_not",
        halt_with_interrupts_off_ends_the_machine_and_with_them_on_does_not,
    ),
    ("vcpus_beyond_the_limit_are_refused", vcpus_beyond_the_limit_are_refused),
    ("probe_is_quick_and_says_what_it_saw", probe_is_quick_and_says_what_it_saw),
];

fn main() {
    let arguments = Arguments::from_args();
    let lack = available().err().map(|reason| reason.to_string());
    let required = std::env::var("REQUIRE_KVM").as_deref() == Ok("1");
    if let Some(reason) = lack.as_ref().filter(|_| !required) {
        eprintln!("ignored: all tests here: {reason}");
    }
    let trials = TESTS.iter().map(|&(name, body)| {
        let lack = lack.clone();
        let ignored = lack.is_some() && !required;
        let run = move || match lack {
            Some(reason) => Err(Failed::from(reason)),
            None => {
                body();
                Ok(())
            }
        };
        Trial::test(name, run).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn config() -> Config {
    Config::default()
}

/// A machine in front of real-mode code at 0x1000.
fn machine(config: Config, code: &[u8]) -> Machine {
    let memory = Arc::new(GuestMemory::new(MIB).unwrap());
    memory.write(GuestPhys(CODE), code).unwrap();
    let vm = create_vm(Arc::clone(&memory), config).unwrap();
    let mut vcpu = vm.create_kvm_vcpu(0).unwrap();
    start_at(&mut vcpu, CODE);
    Machine { vm, vcpu, memory }
}

fn start_at(vcpu: &mut dyn Vcpu, rip: u64) {
    let mut system = vcpu.system_registers().expect("state");
    system.cs = Segment { base: 0, limit: 0xFFFF, attributes: 0x9B, selector: 0 };
    vcpu.set_system_registers(&system).unwrap();
    let mut registers = Registers { rip, rflags: 2, ..Registers::default() };
    registers.gpr[4] = 0x800;
    vcpu.set_registers(&registers).expect("registers");
}

fn kick_before_and_during_run_is_not_lost() {
    let mut m = machine(config(), &[0xEB, 0xFE]); // jmp $
    let kicker = m.vcpu.kicker();
    kicker.kick();
    assert_eq!(m.vcpu.run().unwrap(), Exit::Kicked);
    for _ in 0..20 {
        let kicker = Arc::clone(&kicker);
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(500));
            kicker.kick();
        });
        assert_eq!(m.vcpu.run().unwrap(), Exit::Kicked);
        other.join().unwrap();
    }
}

fn memory_comes_and_goes_between_two_runs() {
    const REGION: GuestPhys = GuestPhys(0xE000_0000);
    // mov [0x10], al ; out 0x80, al
    let mut m = machine(config(), &[0xA2, 0x10, 0, 0xE6, 0x80]);
    m.vm.set_dirty_log(true).unwrap();
    let mut first_exit = || {
        start_at(&mut m.vcpu, CODE);
        let mut system = m.vcpu.system_registers().expect("state");
        system.ds = Segment { base: REGION.0, limit: 0xFFFF, attributes: 0x93, selector: 0 };
        m.vcpu.set_system_registers(&system).unwrap();
        let exit = m.vcpu.run().unwrap();
        m.vcpu.reply(Reply::Done);
        exit
    };
    for _ in 0..2 {
        assert!(matches!(first_exit(), Exit::MmioWrite { address: 0xE000_0010, .. }));
        m.memory.add_region(REGION, 0x10_000).unwrap();
        m.memory.write(REGION.offset(0x10), &[0xAA]).unwrap();
        assert!(matches!(first_exit(), Exit::PortOut { port: 0x80, .. }));
        let mut written = [0xFF];
        m.memory.read(REGION.offset(0x10), &mut written).unwrap();
        assert_eq!(written, [0]);
        // What is new is logged as the rest is.
        let dirty = m.vm.take_dirty_log().unwrap();
        assert!(dirty.iter().any(|pages| pages.start == REGION && pages.count() == 1));
        drop(m.memory.remove_region(REGION).unwrap());
        assert_eq!(m.vm.take_dirty_log().unwrap().len(), 1);
    }
}

fn written_pages(config: Config) {
    // mov [0x5000], al ; mov [0x7000], al ; out 0x80, al
    let code = [0xA2, 0, 0x50, 0xA2, 0, 0x70, 0xE6, 0x80];
    let mut m = machine(config, &code);
    m.vm.set_dirty_log(true).unwrap();
    m.vcpu.run().unwrap();
    m.memory.write(GuestPhys(0x9FFF), &[1, 2]).unwrap();
    let dirty = m.vm.take_dirty_log().unwrap();
    for (page, written) in
        [(0x5000, true), (0x6000, false), (0x7000, true), (0x9000, true), (0xA000, true)]
    {
        assert_eq!(dirty[0].contains(GuestPhys(page)), written, "{page:#x}");
    }
    assert!(!m.vm.take_dirty_log().unwrap()[0].contains(GuestPhys(0x5000)));
    m.vm.set_dirty_log(false).unwrap();
    m.memory.write(GuestPhys(0), &[1]).unwrap();
    assert_eq!(m.vm.take_dirty_log().unwrap()[0].count(), 0);
}

fn bitmap_names_the_pages_written() {
    written_pages(config());
}

fn ring_names_the_pages_written() {
    let capabilities = tetrarch_engine_kvm::capabilities(DEVICE).unwrap();
    if capabilities.iter().any(|c| c.name == "KVM_CAP_DIRTY_LOG_RING" && c.present()) {
        written_pages(Config { dirty: DirtyTracking::Ring { entries: 1024 }, ..config() });
    } else {
        eprintln!("skipped: this host's KVM has no dirty rings");
    }
}

fn wrong_ring_size_is_refused() {
    let memory = Arc::new(GuestMemory::new(MIB).unwrap());
    let dirty = DirtyTracking::Ring { entries: 1000 };
    assert!(create_vm(memory, Config { dirty, ..config() }).is_err());
}

fn xsave_image_goes_there_and_back() {
    let mut m = machine(config(), &[0xF4]);
    let mut image = m.vcpu.xsave().expect("state");
    image[160] = 0x5A; // XMM0
    image[512] |= 3; // x87 and SSE state are there
    m.vcpu.set_xsave(&image).unwrap();
    assert_eq!(m.vcpu.xsave().expect("state")[160], 0x5A);
    assert!(m.vcpu.set_xsave(&image[..100]).is_err());
}

fn halt_with_interrupts_off_ends_the_machine_and_with_them_on_does_not() {
    let mut m = machine(config(), &[0xFA, 0xF4]); // cli ; hlt
    assert_eq!(m.vcpu.run().unwrap(), Exit::Halt);
    m.memory.write(GuestPhys(CODE), &[0xFB, 0xF4]).unwrap(); // sti ; hlt
    start_at(&mut m.vcpu, CODE);
    let kicker = m.vcpu.kicker();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        kicker.kick();
    });
    assert_eq!(m.vcpu.run().unwrap(), Exit::Kicked);
    other.join().unwrap();
}

fn vcpus_beyond_the_limit_are_refused() {
    let memory = Arc::new(GuestMemory::new(MIB).unwrap());
    let error =
        create_vm(memory, Config { topology: Topology::flat(100_000), ..config() }).err().unwrap();
    assert!(error.to_string().contains("CPUs"), "{error}");
    let m = machine(config(), &[]);
    assert!(m.vm.create_kvm_vcpu(0).is_err() && m.vm.create_kvm_vcpu(1).is_err());
}

fn probe_is_quick_and_says_what_it_saw() {
    let seen = probe(DEVICE);
    println!("{seen:?}");
    assert!(seen.runs, "{seen:?}");
    assert!(seen.guest_rate > 0.0 && seen.host_rate > 1e6);
}
