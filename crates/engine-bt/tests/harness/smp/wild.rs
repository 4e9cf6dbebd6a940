//! Hostile guests of any mode on several vCPUs at once, in one memory: nothing is to hold but
//! the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{Exit, Platform, Reply, RunState, Vcpu, Vm};
use tetrarch_engine_bt::{Config, create_vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

use super::super::guest::Guest;
use super::super::tables;
use super::parallel::join;
use crate::harness::{Input, Random};

const TIME: Duration = Duration::from_millis(3);
const HANG: Duration = Duration::from_secs(40);
const MAX_EXITS: usize = 256;
/// After a kick: XRSTOR from a device takes a hundred.
const MAX_EXITS_OF_ONE_INSTRUCTION: usize = 1024;

fn live(vcpu: &mut dyn Vcpu, over: &AtomicBool, mut random: Random) {
    let mut exits = 0;
    let mut after_kick = 0;
    loop {
        let exit = vcpu.run().unwrap_or_else(|error| panic!("the engine gave up: {error}"));
        if over.load(Ordering::SeqCst) {
            after_kick += 1;
            assert!(after_kick < MAX_EXITS_OF_ONE_INSTRUCTION, "the guest goes on after a kick");
        }
        match exit {
            Exit::Halt | Exit::Shutdown => return,
            Exit::Kicked if over.load(Ordering::SeqCst) => return,
            Exit::Kicked => continue,
            _ => vcpu.reply(Reply::Value(random.next())),
        }
        exits += 1;
        if exits > MAX_EXITS && !over.load(Ordering::SeqCst) {
            vcpu.kicker().kick();
            while !matches!(vcpu.run(), Ok(Exit::Kicked | Exit::Halt | Exit::Shutdown)) {
                after_kick += 1;
                assert!(after_kick < MAX_EXITS_OF_ONE_INSTRUCTION, "the guest goes on");
                vcpu.reply(Reply::Value(0));
            }
            return;
        }
    }
}

/// One thing that a host does meanwhile.
fn disturb(vm: &dyn Vm, memory: &GuestMemory, input: &mut Input) {
    match input.u8() % 12 {
        0 | 1 => vm.irq_line(u32::from(input.u8()), input.bool()),
        2 => vm.msi(0xFEE0_0000 | u64::from(input.u32()), input.u32()),
        3 => vm.msi(0xFEE0_0000 | u64::from(input.u8() & 3) << 12, u32::from(input.u16())),
        4 | 5 => {
            let at = tables::CODE + u64::from(input.u16() & 0x1FFF);
            let length = usize::from(input.u8() % 16);
            let _ = memory.write(GuestPhys(at), input.bytes(length));
        }
        6 => {
            let at = u64::from(input.u32());
            let _ = memory.write(GuestPhys(at % tables::RAM), input.bytes(8));
        }
        7 => vm.set_dirty_log(input.bool()).expect("a log"),
        8 => drop(vm.take_dirty_log().expect("a log")),
        _ => std::thread::sleep(Duration::from_micros(input.u8().into())),
    }
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (options, seed) = (input.u8(), input.u8());
    let count = 2 + usize::from(options) % 3;
    let mut events = Input::new(input.bytes(data.len() / 8));
    let share = data.len() * 7 / 8 / count;
    let memory = Arc::new(GuestMemory::new(tables::RAM).expect("1 MiB of memory"));
    let config = Config {
        topology: Topology::flat(count as u32),
        translate: options < 0xF0,
        platform: Platform { kvm: true, ..Platform::default() },
        chaos: (options & 0x40 != 0).then_some(seed.into()),
        ..Config::default()
    };
    let vm = create_vm(Arc::clone(&memory), config).expect("the engine runs on this host");
    let mut vcpus = Vec::new();
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(id as u32).expect("the VM has it");
        let mut state = vcpu.save().expect("a new vCPU can be saved");
        state.run = RunState::Runnable;
        vcpu.load(&state).expect("a running vCPU");
        let guest = Guest::read(&mut Input::new(input.bytes(share)), false);
        if guest.load(&memory, &mut *vcpu) {
            vcpus.push(vcpu);
        }
    }
    let kickers: Vec<_> = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
    let over = AtomicBool::new(false);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (id, vcpu) in (0u64..).zip(&mut vcpus) {
            let over = &over;
            let random = Random(u64::from(seed) << 8 | id);
            threads.push(scope.spawn(move || live(&mut **vcpu, over, random)));
        }
        let run = |threads: &[ScopedJoinHandle<()>]| threads.iter().any(|t| !t.is_finished());
        while run(&threads) && start.elapsed() < TIME {
            if events.is_empty() {
                std::thread::sleep(Duration::from_micros(200));
            } else {
                disturb(&*vm, &memory, &mut events);
            }
        }
        over.store(true, Ordering::SeqCst);
        kickers.iter().for_each(|kicker| kicker.kick());
        while run(&threads) {
            std::thread::sleep(Duration::from_micros(100));
            if start.elapsed() > HANG {
                eprintln!("a vCPU does not answer a kick: it hangs");
                std::process::abort();
            }
        }
        join(threads);
    });
}
