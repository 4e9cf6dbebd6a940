use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tetrarch_engine::{
    Clock, Counters, DebugStop, GuestDebug, GuestFault, Kick, Registers, SystemRegisters, Trap,
    VcpuState,
};
use tetrarch_memory::GuestPhys;

use super::*;
use crate::{
    Access, Answered, Device, DeviceKind, Handler, HoldError, NoHandlers, PortAccess, Sizes,
};

/// A vCPU that makes the exits of a script, then runs until it is kicked.
struct Scripted {
    log: Arc<Log>,
    kick: Arc<Latch>,
}

/// The exits that are still to be made, and the answers to the others.
#[derive(Default)]
struct Log {
    script: Mutex<VecDeque<Result<Exit, EngineError>>>,
    replies: Mutex<Vec<Reply>>,
}

/// A scripted vCPU in its machine, with what it shows of itself.
struct Subject {
    vcpu: Mutex<Box<dyn Vcpu>>,
    log: Arc<Log>,
    control: Arc<VcpuControl>,
}

#[derive(Default)]
struct Latch {
    kicked: Mutex<bool>,
    wake: Condvar,
}

impl Kick for Latch {
    fn kick(&self) {
        *self.kicked.lock() = true;
        self.wake.notify_all();
    }
}

impl Vcpu for Scripted {
    fn run(&mut self) -> Result<Exit, EngineError> {
        let mut kicked = self.kick.kicked.lock();
        if !*kicked && let Some(exit) = self.log.script.lock().pop_front() {
            return exit;
        }
        while !*kicked {
            let wait = self.kick.wake.wait_for(&mut kicked, Duration::from_secs(30));
            assert!(!wait.timed_out(), "nobody kicked the vCPU");
        }
        *kicked = false;
        Ok(Exit::Kicked)
    }

    fn reply(&mut self, reply: Reply) {
        self.log.replies.lock().push(reply);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn registers(&mut self) -> Result<Registers, EngineError> {
        Ok(Registers::default())
    }
    fn set_registers(&mut self, _: &Registers) -> Result<(), EngineError> {
        Ok(())
    }
    fn system_registers(&mut self) -> Result<SystemRegisters, EngineError> {
        Ok(SystemRegisters::default())
    }
    fn set_system_registers(&mut self, _: &SystemRegisters) -> Result<(), EngineError> {
        Ok(())
    }
    fn xsave(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }
    fn set_xsave(&mut self, _: &[u8]) -> Result<(), EngineError> {
        Ok(())
    }
    fn msr(&mut self, _: u32) -> Result<Option<u64>, EngineError> {
        Ok(None)
    }
    fn set_msr(&mut self, _: u32, _: u64) -> Result<bool, EngineError> {
        Ok(false)
    }
    fn peek(&mut self, _: u64, _: &mut [u8]) -> usize {
        0
    }
    fn translate(&mut self, linear: u64) -> Option<GuestPhys> {
        Some(GuestPhys(linear & 0xFFFF))
    }
    fn set_guest_debug(&mut self, _: &GuestDebug) -> Result<(), EngineError> {
        Ok(())
    }
    fn counters(&self) -> Counters {
        Vec::new()
    }
    fn save(&mut self) -> Result<VcpuState, EngineError> {
        Err(EngineError::Refused("a script has no state".into()))
    }
    fn load(&mut self, _: &VcpuState) -> Result<(), EngineError> {
        Err(EngineError::Refused("a script has no state".into()))
    }
}

/// Offset 0 answers, offset 1 fails, offset 2 asks for a stop.
struct Panel {
    control: Arc<RunControl>,
}

#[derive(Debug, thiserror::Error)]
#[error("burnt out")]
struct BurntOut;

impl Device for Panel {
    fn read(&self, offset: u64, _: u8) -> Result<u64, DeviceError> {
        match offset {
            1 => Err(DeviceError::new(BurntOut)),
            2 => {
                self.control.request_stop();
                Ok(2)
            }
            _ => Ok(0x5A),
        }
    }

    fn write(&self, offset: u64, size: u8, _: u64) -> Result<(), DeviceError> {
        self.read(offset, size).map(|_| ())
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Python
    }
}

/// A machine with a [`Panel`] at port 0x10 and at address 0xD0000000.
struct Fixture {
    bus: Bus,
    clock: Arc<Clock>,
    control: Arc<RunControl>,
}

impl Fixture {
    fn new() -> Self {
        let clock = Arc::new(Clock::new());
        let (bus, control) = (Bus::new(), Arc::new(RunControl::new(Arc::clone(&clock))));
        let panel = Arc::new(Panel { control: Arc::clone(&control) });
        bus.attach_ports(0x10, 4, Sizes::ALL, "panel", panel.clone()).unwrap();
        bus.attach_mmio(0xD000_0000, 4, Sizes::ALL, "panel", panel).unwrap();
        Self { bus, clock, control }
    }

    fn vcpu(&self, script: impl IntoIterator<Item = Exit>) -> Subject {
        self.broken_vcpu(script.into_iter().map(Ok))
    }

    fn broken_vcpu(&self, script: impl IntoIterator<Item = Result<Exit, EngineError>>) -> Subject {
        let script = Mutex::new(script.into_iter().collect());
        let log = Arc::new(Log { script, ..Default::default() });
        let vcpu = Scripted { log: Arc::clone(&log), kick: Arc::default() };
        let control = self.control.add(vcpu.kicker());
        Subject { vcpu: Mutex::new(Box::new(vcpu)), log, control }
    }

    fn run(&self, subject: &Subject) -> Result<RunEnd, RunError> {
        let Subject { vcpu, control, .. } = subject;
        run_vcpu(vcpu, &self.bus, &NoHandlers, &self.control, control, &mut || Ok(()))
    }
}

const GOOD_IN: Exit = Exit::PortIn { port: 0x10, size: 1 };
const BAD_IN: Exit = Exit::PortIn { port: 0x11, size: 1 };

#[test]
fn each_access_gets_its_reply_until_the_guest_halts() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([
        GOOD_IN,
        Exit::PortOut { port: 0x10, size: 1, data: 1 },
        Exit::MmioRead { address: 0xD000_0000, size: 4 },
        Exit::MmioWrite { address: 0xD000_0000, size: 4, data: 1 },
        Exit::PortIn { port: 0x80, size: 2 },
        Exit::Halt,
    ]);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Halted);
    let expected =
        [Reply::Value(0x5A), Reply::Done, Reply::Value(0x5A), Reply::Done, Reply::Value(0xFFFF)];
    assert_eq!(*vcpu.log.replies.lock(), expected);
}

#[test]
fn exits_and_accesses_are_counted_by_kind() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([
        GOOD_IN,
        GOOD_IN,
        Exit::PortIn { port: 0x80, size: 1 },
        Exit::MmioWrite { address: 0xD000_0000, size: 4, data: 1 },
        Exit::Shutdown,
    ]);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Shutdown);
    let stats = vcpu.control.counters.stats();
    assert_eq!((stats.port_in, stats.mmio_write, stats.shutdown), (3, 1, 1));
    assert_eq!((stats.nobody, stats.native, stats.python), (1, 0, 3));
    assert!(stats.python_ticks > 0 && stats.run_ticks >= stats.python_ticks);
}

const FAULT: GuestFault = GuestFault { vector: 14, error: Some(4), address: 0x1000 };
const OF_A_PLATFORM: [Exit; 8] = [
    Exit::Hypercall { cpl: 0 },
    Exit::MsrRead { index: 1 },
    Exit::MsrWrite { index: 1, value: 2 },
    Exit::PortWithRegisters { port: 3, size: 4, input: true, string: false },
    Exit::PortWithRegisters { port: 3, size: 4, input: false, string: true },
    Exit::Trap(Trap::Exception(FAULT)),
    Exit::Trap(Trap::Syscall { next: 4 }),
    Exit::Halt,
];

#[test]
fn exits_of_a_platform_that_nobody_answers_are_those_of_a_bare_cpu() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu(OF_A_PLATFORM);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Halted);
    let expected = [
        Reply::Fault(GuestFault::UD),
        Reply::Fault(GuestFault::GP),
        Reply::Fault(GuestFault::GP),
        Reply::Value(u64::MAX),
        Reply::Done,
        Reply::Fault(FAULT),
        Reply::Fault(GuestFault::UD),
    ];
    assert_eq!(*vcpu.log.replies.lock(), expected);
    assert_eq!(vcpu.control.counters.stats().nobody, 7);
}

#[test]
fn exits_of_a_platform_reach_their_handlers_and_are_counted() {
    /// Answers with what it was asked.
    struct Echo;
    impl PlatformHandlers for Echo {
        fn hypercall(&self, _: &mut dyn Vcpu, cpl: u8) -> Answered {
            Ok((Reply::Value(u64::from(cpl) + 10), Handler::Python))
        }
        fn msr_read(&self, _: &mut dyn Vcpu, index: u32) -> Answered {
            Ok((Reply::Value(u64::from(index)), Handler::Native))
        }
        fn msr_write(&self, _: &mut dyn Vcpu, index: u32, value: u64) -> Answered {
            Ok((Reply::Value(u64::from(index) << 32 | value), Handler::Native))
        }
        fn port(&self, vcpu: &mut dyn Vcpu, access: PortAccess) -> Answered {
            let registers = Registers {
                rip: access.port.into(),
                ..vcpu.registers().map_err(DeviceError::new)?
            };
            Ok((Reply::Registers(Box::new(registers)), Handler::Native))
        }
        fn trap(&self, _: &mut dyn Vcpu, _: Trap) -> Answered {
            Err(DeviceError::new(BurntOut))
        }
    }
    let machine = Fixture::new();
    let Subject { vcpu, log, control } = machine.vcpu(OF_A_PLATFORM);
    let error = run_vcpu(&vcpu, &machine.bus, &Echo, &machine.control, &control, &mut || Ok(()))
        .unwrap_err();
    let RunError::Device(error) = error else { panic!("{error}") };
    assert!(error.into_cause().is::<BurntOut>());
    let registers = Reply::Registers(Box::new(Registers { rip: 3, ..Registers::default() }));
    let answers = [Reply::Value(10), Reply::Value(1), Reply::Value(1 << 32 | 2)];
    let replies = log.replies.lock().clone();
    assert_eq!(replies[..3], answers);
    // The last is of the trap whose handler failed.
    assert_eq!(replies[3..], [registers.clone(), registers, Reply::Done]);
    let stats = control.counters.stats();
    let counts = [stats.hypercall, stats.msr_read, stats.msr_write, stats.trap];
    assert_eq!((counts, stats.port_with_registers), ([1; 4], 2));
    assert_eq!((stats.python, stats.native), (1, 4));
}

#[test]
fn cause_of_a_device_error_comes_out_as_it_was() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([BAD_IN]);
    let Err(RunError::Device(error)) = machine.run(&vcpu) else {
        panic!("the device's error was lost")
    };
    assert!(error.into_cause().is::<BurntOut>());
}

#[test]
fn vcpu_can_run_on_after_a_device_error() {
    let machine = Fixture::new();
    let out = Exit::MmioWrite { address: 0xD000_0001, size: 1, data: 0 };
    let vcpu = machine.vcpu([BAD_IN, out, Exit::Halt]);
    assert!(machine.run(&vcpu).is_err());
    assert!(machine.run(&vcpu).is_err());
    assert_eq!(*vcpu.log.replies.lock(), [Reply::Value(u64::MAX), Reply::Done]);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Halted);
}

#[test]
fn stop_asked_for_before_run_is_not_lost_and_taken_once() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([Exit::Halt]);
    machine.control.request_stop();
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Stopped);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Halted);
}

#[test]
fn stop_from_within_a_device_ends_the_loop_after_the_reply() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([Exit::PortIn { port: 0x12, size: 1 }, GOOD_IN]);
    assert_eq!(machine.run(&vcpu).unwrap(), RunEnd::Stopped);
    assert_eq!(*vcpu.log.replies.lock(), [Reply::Value(2)]);
    assert_eq!(vcpu.log.script.lock().len(), 1);
}

#[test]
fn stop_from_another_thread_ends_a_guest_that_makes_no_exits() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([]);
    let reason = std::thread::scope(|scope| {
        let run = scope.spawn(|| machine.run(&vcpu));
        std::thread::sleep(Duration::from_millis(5));
        machine.control.request_stop();
        run.join().unwrap()
    });
    assert_eq!(reason.unwrap(), RunEnd::Stopped);
}

#[test]
fn end_of_one_vcpu_stops_the_others() {
    let broken = || Err(EngineError::Internal("x".into()));
    for ending in [Ok(Exit::Halt), Ok(Exit::Shutdown), Ok(BAD_IN), broken()] {
        let machine = Fixture::new();
        let (endless, ending) = (machine.vcpu([]), machine.broken_vcpu([ending]));
        let reason = std::thread::scope(|scope| {
            let run = scope.spawn(|| machine.run(&endless));
            let _ = machine.run(&ending);
            run.join().unwrap()
        });
        assert_eq!(reason.unwrap(), RunEnd::Stopped);
        assert!(!ending.control.take_stop(), "a vCPU must not stop itself a second time");
    }
}

#[test]
fn kick_without_a_request_calls_the_thread_and_goes_on() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([Exit::Halt]);
    vcpu.control.kick();
    let called = AtomicBool::new(false);
    let reason = run_vcpu(
        &vcpu.vcpu,
        &machine.bus,
        &NoHandlers,
        &machine.control,
        &vcpu.control,
        &mut || {
            called.store(true, Ordering::Relaxed);
            Ok(())
        },
    );
    assert_eq!(reason.unwrap(), RunEnd::Halted);
    assert!(called.into_inner());
}

const LONG: Duration = Duration::from_secs(30);

/// Runs `body` beside the vCPUs, then stops them; each must have been stopped.
fn beside(machine: &Fixture, vcpus: &[Subject], body: impl FnOnce()) {
    std::thread::scope(|scope| {
        let runs: Vec<_> = vcpus.iter().map(|vcpu| scope.spawn(|| machine.run(vcpu))).collect();
        body();
        machine.control.request_stop();
        for run in runs {
            assert_eq!(run.join().unwrap().unwrap(), RunEnd::Stopped);
        }
    });
}

#[test]
fn held_vcpus_are_free_to_look_at_and_make_no_exits_until_all_holds_end() {
    let machine = Fixture::new();
    let vcpus = [machine.vcpu([]), machine.vcpu([])];
    beside(&machine, &vcpus, || {
        machine.control.hold(LONG).unwrap();
        machine.control.hold(LONG).unwrap();
        for vcpu in &vcpus {
            let mut locked = vcpu.vcpu.lock();
            assert_eq!(locked.msr(0).unwrap(), None);
            vcpu.log.script.lock().push_back(Ok(GOOD_IN));
        }
        let stands = machine.clock.now_ns();
        machine.control.resume().unwrap();
        assert!(machine.control.is_held());
        std::thread::sleep(Duration::from_millis(5));
        assert!(vcpus.iter().all(|vcpu| vcpu.log.script.lock().len() == 1));
        assert_eq!(machine.clock.now_ns(), stands);
        machine.control.resume().unwrap();
        assert!(!machine.clock.stands());
        // A kick makes the vCPU of the script look at it anew.
        for vcpu in &vcpus {
            vcpu.control.kick();
            while vcpu.log.replies.lock().is_empty() {
                std::thread::yield_now();
            }
        }
    });
    assert!(matches!(machine.control.resume(), Err(HoldError::NotHeld)));
}

#[test]
fn vcpu_that_starts_while_the_machine_is_held_waits() {
    let machine = Fixture::new();
    machine.control.hold(LONG).unwrap();
    let vcpu = [machine.vcpu([GOOD_IN])];
    beside(&machine, &vcpu, || {
        std::thread::sleep(Duration::from_millis(5));
        machine.control.hold(LONG).unwrap();
        assert!(vcpu[0].log.replies.lock().is_empty());
        machine.control.resume().unwrap();
        machine.control.resume().unwrap();
        while vcpu[0].log.replies.lock().is_empty() {
            std::thread::yield_now();
        }
    });
}

#[test]
fn held_vcpu_can_be_stopped_and_its_thread_called() {
    let machine = Fixture::new();
    let vcpu = machine.vcpu([]);
    let called = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            run_vcpu(
                &vcpu.vcpu,
                &machine.bus,
                &NoHandlers,
                &machine.control,
                &vcpu.control,
                &mut || {
                    called.store(machine.control.is_held(), Ordering::SeqCst);
                    Ok(())
                },
            )
        });
        machine.control.hold(LONG).unwrap();
        vcpu.control.kick();
        while !called.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        machine.control.request_stop();
        assert_eq!(run.join().unwrap().unwrap(), RunEnd::Stopped);
        assert!(machine.control.is_held());
    });
}

/// Answers when it is told to; and tries to hold its own machine.
struct Slow {
    control: Arc<RunControl>,
    entered: AtomicBool,
    go: AtomicBool,
    own: Mutex<Option<HoldError>>,
}

impl Device for Slow {
    fn read(&self, _: u64, _: u8) -> Result<u64, DeviceError> {
        *self.own.lock() = self.control.hold(LONG).err();
        self.entered.store(true, Ordering::SeqCst);
        while !self.go.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Ok(0)
    }

    fn write(&self, _: u64, _: u8, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn device_that_does_not_return_is_named_and_the_machine_goes_on() {
    let machine = Fixture::new();
    let slow = Arc::new(Slow {
        control: Arc::clone(&machine.control),
        entered: AtomicBool::new(false),
        go: AtomicBool::new(false),
        own: Mutex::default(),
    });
    machine.bus.attach_mmio(0xE000_0000, 4, Sizes::ALL, "Slow", slow.clone()).unwrap();
    let access = Access::Memory(0xE000_0002);
    let vcpus =
        [machine.vcpu([]), machine.vcpu([Exit::MmioRead { address: 0xE000_0002, size: 1 }])];
    beside(&machine, &vcpus, || {
        while !slow.entered.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let error = machine.control.hold(Duration::from_millis(10)).unwrap_err();
        assert!(
            matches!(error, HoldError::Device { vcpu: 1, access: at, .. } if at == access),
            "{error}"
        );
        assert_eq!(machine.bus.owner(access).as_deref(), Some("Slow"));
        assert!(!machine.control.is_held() && !machine.clock.stands());
        assert!(matches!(*slow.own.lock(), Some(HoldError::OwnThread { vcpu: 1 })));
        slow.go.store(true, Ordering::SeqCst);
        machine.control.hold(LONG).unwrap();
        machine.control.resume().unwrap();
    });
}

#[test]
fn holds_from_many_threads_end_and_leave_nothing_held() {
    let machine = Fixture::new();
    let vcpus = [machine.vcpu([]), machine.vcpu([])];
    beside(&machine, &vcpus, || {
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        machine.control.hold(LONG).unwrap();
                        assert!(machine.clock.stands());
                        drop(vcpus.iter().map(|vcpu| vcpu.vcpu.lock()).collect::<Vec<_>>());
                        machine.control.resume().unwrap();
                    }
                });
            }
        });
    });
    assert!(!machine.control.is_held() && !machine.clock.stands());
}

#[test]
fn vcpu_that_stopped_for_the_debugger_stays_until_it_is_thawed() {
    let machine = Fixture::new();
    let planted = DebugStop::Software { linear: 0x7000_1000 };
    let own = DebugStop::Software { linear: 0x1001 };
    let vcpu = machine.vcpu([Exit::Debug(own), Exit::Debug(planted), GOOD_IN, Exit::Halt]);
    let debugger = &machine.control.debugger;
    debugger.set_planted([GuestPhys(0x1000)].into());
    let (told, stopped) = std::sync::mpsc::channel();
    debugger.set_alert(Some(Arc::new(move || told.send(()).unwrap())));
    std::thread::scope(|scope| {
        let run = scope.spawn(|| machine.run(&vcpu).unwrap());
        stopped.recv_timeout(Duration::from_secs(30)).unwrap();
        machine.control.hold(Duration::from_secs(30)).unwrap();
        assert_eq!(debugger.take_stops(), [(0, planted)]);
        assert_eq!(debugger.take_stops(), []);
        machine.control.resume().unwrap();
        // It may be locked, so it is parked, and has made no further exit.
        drop(vcpu.vcpu.lock());
        assert_eq!(vcpu.log.script.lock().len(), 2);
        machine.control.hold(Duration::from_secs(30)).unwrap();
        machine.control.set_frozen(&vcpu.control, false);
        machine.control.resume().unwrap();
        assert_eq!(run.join().unwrap(), RunEnd::Halted);
    });
    let breakpoint = Reply::Fault(GuestFault { vector: 3, error: None, address: 0 });
    assert_eq!(*vcpu.log.replies.lock(), [breakpoint, Reply::Done, Reply::Value(90)]);
    assert_eq!(vcpu.control.counters.stats().debug, 2);
}
