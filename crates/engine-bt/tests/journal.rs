//! A machine that is recorded, and lives again: by the translator as it was, and by the
//! interpreter, which so counts as translated code does.

mod support;

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use support::guest::{BASE, FREE, Guest, KERNEL_CODE, P, RAM, W};
use tetrarch_engine::{Exit, RecordingEnd, Registers, Reply, Vcpu, VcpuState, Vm, VmState};
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

/// A guest that sees clocks, random numbers, ports, interrupts and memory of a device.
fn program() -> (Vec<u8>, u64, u64) {
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
    (done.inner.code_buffer.clone(), at(timer), at(device))
}

/// The guest before its first instruction.
fn start() -> Start {
    let mut guest = Guest::new(true);
    let (code, timer, device) = program();
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
#[derive(Debug, PartialEq, Eq)]
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
        let mut number = 7;
        loop {
            match machine.vcpu.run().unwrap() {
                Exit::PortIn { port: 0x60, .. } => {
                    number = number * 5 + 1;
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

fn replay(file: &File, translate: bool) -> (Left, Option<RecordingEnd>) {
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    let reader = Reader::new(file).unwrap();
    let mut machine = machine(Recording::Replay(reader), translate);
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
