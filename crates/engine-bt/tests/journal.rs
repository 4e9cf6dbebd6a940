//! A machine that is recorded, and lives again: by the translator as it was, and by the
//! interpreter, which so counts as translated code does.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Seek as _;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use support::guest::{BASE, FREE, Guest, KERNEL_CODE, P, RAM, W};
use tetrarch_engine::{
    DebugStop, Exit, GuestDebug, HardwareBreakpoint, Met, Passed, RecordingEnd, Registers,
    ReplayStop, Reply, Seek, Vcpu, VcpuState, Vm, VmState, Watched,
};
use tetrarch_engine_bt::{Config, Recording, create_recorded_vm};
use tetrarch_journal::{Reader, Writer};
use tetrarch_memory::{GuestMemory, GuestPhys};

const APIC: u64 = 0x40_0000;
/// Where a device writes, and what the guest makes of all that it saw.
const DMA: u64 = FREE + 0x1_0000;
const SEEN: u64 = FREE + 0x2_0000;
const TIMER: u8 = 0x31;
const DEVICE: u8 = 0x32;
const ROUNDS: u32 = 3000;

struct Start {
    vm: VmState,
    vcpu: VcpuState,
    memory: Vec<u8>,
}

/// Mixes rax into the sum in r14. As its own function, so that there are calls; with
/// flags that the manuals leave undefined, which interrupts push.
fn mix(a: &mut CodeAssembler, label: &mut CodeLabel) -> Result<(), IcedError> {
    a.set_label(label)?;
    a.xor(r14, rax)?;
    a.imul_3(r14, r14, 0x1F35)?;
    a.bt(r14, 5)?;
    a.rol(r14, 13)?;
    a.ret()
}

fn handler(a: &mut CodeAssembler, counter: u64) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rdx)?;
    a.mov(rdx, BASE + SEEN)?;
    a.add(qword_ptr(rdx + counter as i32), 1)?;
    a.rol(r13, 7)?;
    a.add(r13, r14)?;
    a.mov(rdx, APIC)?;
    a.mov(dword_ptr(rdx + 0xB0), 0)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.iretq()
}

struct Program {
    code: Vec<u8>,
    /// Linear addresses: the handlers, and a function that is called all the time.
    timer: u64,
    device: u64,
    mixer: u64,
}

/// A guest that sees clocks, random numbers, ports, interrupts and memory of a device.
fn program() -> Program {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut mixer = a.create_label();
    let (mut round, mut no_port, mut no_halt) =
        (a.create_label(), a.create_label(), a.create_label());
    let mut write = || -> Result<(CodeLabel, CodeLabel), IcedError> {
        a.mov(rdx, APIC)?;
        a.mov(dword_ptr(rdx + 0xF0), 0x1FF)?;
        a.mov(dword_ptr(rdx + 0x3E0), 0b1011)?;
        a.mov(dword_ptr(rdx + 0x320), 0x2_0000 | i32::from(TIMER))?;
        a.mov(dword_ptr(rdx + 0x380), 40_000)?;
        a.mov(ebx, ROUNDS)?;
        a.sti()?;
        a.set_label(&mut round)?;
        a.rdtsc()?;
        a.call(mixer)?;
        a.rdrand(rax)?;
        a.call(mixer)?;
        a.mov(rdx, BASE + DMA)?;
        a.mov(rax, qword_ptr(rdx))?;
        a.call(mixer)?;
        a.mov(rdi, BASE + SEEN + 0x100)?;
        a.mov(ecx, 40)?;
        a.rep().stosb()?;
        a.mov(rax, r14)?;
        a.xor(edx, edx)?;
        a.cmp(rax, rbx)?;
        // Its check may change the flags, where nothing needs them any more.
        a.mov(rcx, qword_ptr(rdi))?;
        a.div(rbx)?;
        a.call(mixer)?;
        a.test(ebx, 15)?;
        a.jne(no_port)?;
        a.in_(al, 0x60)?;
        a.call(mixer)?;
        a.set_label(&mut no_port)?;
        a.test(ebx, 255)?;
        a.jne(no_halt)?;
        a.hlt()?;
        a.set_label(&mut no_halt)?;
        a.add(r12, r13)?;
        a.dec(ebx)?;
        a.jne(round)?;
        a.cli()?;
        a.mov(rdx, BASE + SEEN)?;
        a.mov(qword_ptr(rdx + 0x40), r14)?;
        a.mov(qword_ptr(rdx + 0x48), r12)?;
        a.out(0x99, al)?;
        a.hlt()?;
        mix(&mut a, &mut mixer)?;
        let mut timer = a.create_label();
        a.set_label(&mut timer)?;
        handler(&mut a, 0)?;
        let mut device = a.create_label();
        a.set_label(&mut device)?;
        handler(&mut a, 8)?;
        Ok((timer, device))
    };
    let (timer, device) = write().unwrap();
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let done = a.assemble_options(BASE + KERNEL_CODE, options).unwrap();
    let at = |label: CodeLabel| done.label_ip(&label).unwrap();
    let (timer, device, mixer) = (at(timer), at(device), at(mixer));
    Program { code: done.inner.code_buffer, timer, device, mixer }
}

/// The guest before its first instruction.
fn start() -> Start {
    let mut guest = Guest::new(true);
    let Program { code, timer, device, .. } = program();
    guest.write(KERNEL_CODE, &code);
    guest.map(APIC, 0xFEE0_0000, P | W);
    guest.gate(TIMER, timer, 0, 0);
    guest.gate(DEVICE, device, 0, 0);
    let mut gpr = [0; 16];
    gpr[4] = BASE + FREE + 0x8000;
    guest.start(true, BASE + KERNEL_CODE, gpr, 2);
    let mut memory = vec![0; RAM as usize];
    guest.memory.read(GuestPhys(0), &mut memory).unwrap();
    Start { vm: guest.vm.save().unwrap(), vcpu: guest.vcpu.save().unwrap(), memory }
}

struct Machine {
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

fn machine(recording: Recording, translate: bool) -> Machine {
    let memory = Arc::new(GuestMemory::new(RAM).unwrap());
    let config = Config { translate, ..Config::default() };
    let vm = create_recorded_vm(Arc::clone(&memory), config, recording).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Machine { memory, vm, vcpu }
}

/// What is left of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Left {
    registers: Registers,
    memory: Vec<u8>,
}

fn left(machine: &mut Machine) -> Left {
    let mut memory = vec![0; RAM as usize];
    machine.memory.read(GuestPhys(0), &mut memory).unwrap();
    // What the device wrote after the guest's last instruction nobody has seen.
    memory[DMA as usize..][..8].fill(0);
    Left { registers: machine.vcpu.registers().unwrap(), memory }
}

fn file() -> File {
    const O_TMPFILE: i32 = 0o20200000;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(O_TMPFILE);
    options.open(std::env::temp_dir()).unwrap()
}

/// Runs the guest with a device that works beside it.
fn record(start: &Start, checkpoint_every: u64) -> (File, Left) {
    let file = file();
    let writer = Writer::new(file.try_clone().unwrap(), "{}").unwrap();
    let mut machine = machine(Recording::Record { writer, checkpoint_every }, true);
    machine.memory.write(GuestPhys(0), &start.memory).unwrap();
    machine.vm.load(&start.vm).unwrap();
    machine.vcpu.load(&start.vcpu).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 1u64;
            while !ended.load(Ordering::SeqCst) {
                machine.vm.stop_for_device();
                number = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                machine.memory.write(GuestPhys(DMA), &number.to_le_bytes()).unwrap();
                machine.vm.msi(0xFEE0_0000, DEVICE.into());
                machine.vm.go_on();
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let mut number = 7u64;
        loop {
            match machine.vcpu.run().unwrap() {
                Exit::PortIn { port: 0x60, .. } => {
                    number = number.wrapping_mul(5).wrapping_add(1);
                    machine.vcpu.reply(Reply::Value(number & 0xFF));
                }
                Exit::PortOut { port: 0x99, .. } => break,
                exit => panic!("{exit:?}"),
            }
        }
        ended.store(true, Ordering::SeqCst);
    });
    let end = machine.vm.end_recording().unwrap();
    assert!(matches!(end, Some(RecordingEnd::Recorded { count, .. }) if count > 50_000), "{end:?}");
    let left = left(&mut machine);
    (file, left)
}

fn replaying(file: &File, translate: bool) -> Machine {
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    machine(Recording::Replay(Reader::new(file).unwrap()), translate)
}

fn replay(file: &File, translate: bool) -> (Left, Option<RecordingEnd>) {
    let mut machine = replaying(file, translate);
    assert_eq!(machine.vcpu.run().unwrap(), Exit::Halt);
    let left = left(&mut machine);
    (left, machine.vm.end_recording().unwrap())
}

fn same(recorded: &Left, replayed: &Left) {
    assert_eq!(recorded.registers, replayed.registers);
    let differ = recorded.memory.iter().zip(&replayed.memory).position(|(a, b)| a != b);
    assert_eq!(differ.map(|at| format!("{at:#x}")), None, "memory differs");
}

#[test]
fn a_guest_lives_again() {
    let start = start();
    for checkpoint_every in [5_000, u64::MAX] {
        let (file, recorded) = record(&start, checkpoint_every);
        let counted = |at: u64| recorded.memory[(SEEN + at) as usize];
        assert!(counted(0) > 0 && counted(8) > 0, "it has seen its timer and its device");
        for round in 0..3 {
            let (replayed, end) = replay(&file, true);
            same(&recorded, &replayed);
            let expected = if checkpoint_every == u64::MAX { 0..1 } else { 10..1000 };
            let Some(RecordingEnd::Replayed { checkpoints, whole: true }) = end else {
                panic!("{end:?}")
            };
            assert!(expected.contains(&checkpoints), "round {round}: {checkpoints}");
        }
    }
}

#[test]
fn interpreter_and_translator_count_alike() {
    let (file, recorded) = record(&start(), 5_000);
    let (replayed, _) = replay(&file, false);
    same(&recorded, &replayed);
}

/// Lets a replay run until it stands.
fn stand(machine: &mut Machine) -> ReplayStop {
    let exit = machine.vcpu.run().unwrap();
    machine.vcpu.reply(Reply::Done);
    let Exit::Debug(DebugStop::Replay(why)) = exit else { panic!("{exit:?}") };
    why
}

fn count(machine: &Machine) -> u64 {
    machine.vm.replay().unwrap().count()
}

fn seek(machine: &mut Machine, seek: Seek) -> Passed {
    machine.vm.replay().unwrap().seek(seek);
    stand(machine);
    machine.vm.replay().unwrap().passed()
}

fn go(machine: &mut Machine, to: u64) {
    seek(machine, Seek { count: to, from: u64::MAX, noted_before: 0 });
    assert_eq!(count(machine), to);
}

/// Numbers below `below`, of which each run of the test has the same.
fn numbers(mut seed: u64, below: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        seed = seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        Some((seed >> 33) % below)
    })
}

#[test]
fn a_replay_goes_to_any_count_and_back() {
    let (file, recorded) = record(&start(), 5_000);
    let mut machine = replaying(&file, true);
    machine.vm.replay().unwrap().stay(true);
    assert_eq!(stand(&mut machine), ReplayStop::End);
    let end = count(&machine);
    assert_eq!(stand(&mut machine), ReplayStop::End, "it stands there");
    let mut known = BTreeMap::new();
    let mut steps = 0;
    // Some near each other, so that one is within a block of another.
    for place in numbers(1, end - 3).take(40).flat_map(|near| [near, near + 2, near + 1]) {
        go(&mut machine, place);
        let now = left(&mut machine);
        let first = known.entry(place).or_insert_with(|| now.clone());
        same(first, &now);
        steps += 1;
    }
    for (place, first) in known.iter().rev() {
        go(&mut machine, *place);
        same(first, &left(&mut machine));
    }
    assert_eq!(steps, 120);
    // One step on is the next count.
    for (place, next) in known.keys().zip(known.keys().skip(1)).filter(|(a, b)| *a + 1 == **b) {
        go(&mut machine, *place);
        machine.vcpu.set_guest_debug(&GuestDebug { step: true, ..GuestDebug::default() }).unwrap();
        assert_eq!(machine.vcpu.run().unwrap(), Exit::Debug(DebugStop::Step));
        machine.vcpu.reply(Reply::Done);
        machine.vcpu.set_guest_debug(&GuestDebug::default()).unwrap();
        assert_eq!(count(&machine), *next);
        same(&known[next], &left(&mut machine));
    }
    seek(&mut machine, Seek { count: u64::MAX, from: 0, noted_before: 0 });
    assert_eq!(count(&machine), end);
    machine.vm.replay().unwrap().stay(false);
    go_on_to_the_end(&mut machine);
    same(&recorded, &left(&mut machine));
}

fn go_on_to_the_end(machine: &mut Machine) {
    assert_eq!(machine.vcpu.run().unwrap(), Exit::Halt);
}

/// Where a replay stops by itself, from its start to its end.
fn all_stops(machine: &mut Machine) -> Vec<u64> {
    let mut counts = Vec::new();
    loop {
        let exit = machine.vcpu.run().unwrap();
        machine.vcpu.reply(Reply::Done);
        match exit {
            Exit::Debug(DebugStop::Replay(ReplayStop::End)) => return counts,
            Exit::Debug(_) => counts.push(count(machine)),
            exit => panic!("{exit:?}"),
        }
    }
}

#[test]
fn breakpoints_of_a_replay_change_nothing() {
    let Program { timer, device, mixer, .. } = program();
    let (file, recorded) = record(&start(), 5_000);
    let handled: u64 = [0, 8]
        .map(|at| (SEEN + at) as usize)
        .map(|at| u64::from_le_bytes(recorded.memory[at..at + 8].try_into().unwrap()))
        .iter()
        .sum();
    let mut before = None;
    for translate in [true, false] {
        let mut machine = replaying(&file, translate);
        let replay = |machine: &Machine, linear: &[u64]| {
            let replay = machine.vm.replay().unwrap();
            replay.stay(true);
            replay.set_breakpoints(linear);
        };
        replay(&machine, &[timer, device]);
        let handlers = all_stops(&mut machine);
        assert_eq!(handlers.len() as u64, handled);
        assert!(handlers.is_sorted());
        same(&recorded, &left(&mut machine));
        go(&mut machine, 0);
        replay(&machine, &[mixer]);
        let calls = all_stops(&mut machine);
        assert!(calls.len() > 4 * ROUNDS as usize, "{}", calls.len());
        same(&recorded, &left(&mut machine));
        go(&mut machine, 0);
        replay(&machine, &[timer, device, mixer]);
        let all = all_stops(&mut machine);
        let mut both: Vec<_> = handlers.iter().chain(&calls).copied().collect();
        both.sort_unstable();
        assert_eq!(all, both);
        assert_eq!(before.get_or_insert(all.clone()), &all, "by the interpreter");
        // Back from one to the one before it.
        for at in numbers(2, all.len() as u64 - 1).take(20).map(|at| at as usize) {
            let now = all[at + 1];
            let met = seek(&mut machine, Seek { count: now, from: now - 1, noted_before: now });
            let found = met.last_met.or_else(|| {
                let from = met.began.saturating_sub(1);
                seek(&mut machine, Seek { count: met.began, from, noted_before: now }).last_met
            });
            assert_eq!(found, Some(Met { count: all[at], hits: 0 }), "before {now}");
        }
        replay(&machine, &[]);
        seek(&mut machine, Seek { count: u64::MAX, from: u64::MAX, noted_before: 0 });
        same(&recorded, &left(&mut machine));
    }
}

#[test]
fn a_watchpoint_is_found_on_the_way_back() {
    let (file, recorded) = record(&start(), 5_000);
    let mut machine = replaying(&file, true);
    machine.vm.replay().unwrap().stay(true);
    let watched = HardwareBreakpoint::new(Watched::Write, BASE + SEEN, 8);
    let debug = GuestDebug { hardware: [watched, None, None, None], ..GuestDebug::default() };
    machine.vcpu.set_guest_debug(&debug).unwrap();
    let writes = all_stops(&mut machine);
    let timers = &recorded.memory[SEEN as usize..][..8];
    assert_eq!(writes.len() as u64, u64::from_le_bytes(timers.try_into().unwrap()));
    same(&recorded, &left(&mut machine));
    // They stop behind the instruction that writes; on the way back it is the one before which
    // the value is the old one.
    let last = writes.last().unwrap() - 1;
    let whole = Seek { count: u64::MAX, from: 0, noted_before: last };
    let met = Met { count: writes[writes.len() - 2] - 1, hits: 1 };
    assert_eq!(seek(&mut machine, whole).last_met, Some(met));
}
