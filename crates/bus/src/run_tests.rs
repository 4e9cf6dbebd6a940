use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tetrarch_engine::{Counters, Kick, Registers, SystemRegisters};

use super::*;
use crate::{Device, DeviceKind, NoHandlers, Sizes};

/// A vCPU that makes the exits of a script, then runs until it is kicked.
struct Scripted {
    script: VecDeque<Result<Exit, EngineError>>,
    replies: Vec<Reply>,
    kick: Arc<Latch>,
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

impl Scripted {
    fn new(script: impl IntoIterator<Item = Exit>) -> Self {
        let script = script.into_iter().map(Ok).collect();
        Self { script, replies: Vec::new(), kick: Arc::default() }
    }
}

impl Vcpu for Scripted {
    fn run(&mut self) -> Result<Exit, EngineError> {
        let mut kicked = self.kick.kicked.lock();
        if !*kicked && let Some(exit) = self.script.pop_front() {
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
        self.replies.push(reply);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn registers(&self) -> Registers {
        Registers::default()
    }
    fn set_registers(&mut self, _: &Registers) {}
    fn system_registers(&self) -> SystemRegisters {
        SystemRegisters::default()
    }
    fn set_system_registers(&mut self, _: &SystemRegisters) -> Result<(), EngineError> {
        Ok(())
    }
    fn xsave(&self) -> Vec<u8> {
        Vec::new()
    }
    fn set_xsave(&mut self, _: &[u8]) -> Result<(), EngineError> {
        Ok(())
    }
    fn msr(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn set_msr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn peek(&mut self, _: u64, _: &mut [u8]) -> usize {
        0
    }
    fn counters(&self) -> Counters {
        Vec::new()
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
    control: Arc<RunControl>,
}

impl Fixture {
    fn new() -> Self {
        let (bus, control) = (Bus::new(), Arc::new(RunControl::new()));
        let panel = Arc::new(Panel { control: Arc::clone(&control) });
        bus.attach_ports(0x10, 4, Sizes::ALL, "panel", panel.clone()).unwrap();
        bus.attach_mmio(0xD000_0000, 4, Sizes::ALL, "panel", panel).unwrap();
        Self { bus, control }
    }

    fn seat(&self, vcpu: &Scripted) -> Arc<Seat> {
        self.control.add(vcpu.kicker())
    }

    fn run(&self, vcpu: &mut Scripted, seat: &Arc<Seat>) -> Result<StopReason, RunError> {
        run_vcpu(vcpu, &self.bus, &NoHandlers, &self.control, seat, &mut || Ok(()))
    }
}

const GOOD_IN: Exit = Exit::PortIn { port: 0x10, size: 1 };
const BAD_IN: Exit = Exit::PortIn { port: 0x11, size: 1 };

#[test]
fn each_access_gets_its_reply_until_the_guest_halts() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([
        GOOD_IN,
        Exit::PortOut { port: 0x10, size: 1, data: 1 },
        Exit::MmioRead { address: 0xD000_0000, size: 4 },
        Exit::MmioWrite { address: 0xD000_0000, size: 4, data: 1 },
        Exit::PortIn { port: 0x80, size: 2 },
        Exit::Halt,
    ]);
    let seat = machine.seat(&vcpu);
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Halted);
    let expected =
        [Reply::Value(0x5A), Reply::Done, Reply::Value(0x5A), Reply::Done, Reply::Value(0xFFFF)];
    assert_eq!(vcpu.replies, expected);
}

#[test]
fn exits_and_accesses_are_counted_by_kind() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([
        GOOD_IN,
        GOOD_IN,
        Exit::PortIn { port: 0x80, size: 1 },
        Exit::MmioWrite { address: 0xD000_0000, size: 4, data: 1 },
        Exit::Shutdown,
    ]);
    let seat = machine.seat(&vcpu);
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Shutdown);
    let stats = seat.counters.stats();
    assert_eq!((stats.port_in, stats.mmio_write, stats.shutdown), (3, 1, 1));
    assert_eq!((stats.nobody, stats.native, stats.python), (1, 0, 3));
    assert!(stats.python_ticks > 0 && stats.run_ticks >= stats.python_ticks);
}

#[test]
fn cause_of_a_device_error_comes_out_as_it_was() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([BAD_IN]);
    let seat = machine.seat(&vcpu);
    let Err(RunError::Device(error)) = machine.run(&mut vcpu, &seat) else {
        panic!("the device's error was lost")
    };
    assert!(error.into_cause().is::<BurntOut>());
}

#[test]
fn vcpu_can_run_on_after_a_device_error() {
    let machine = Fixture::new();
    let out = Exit::MmioWrite { address: 0xD000_0001, size: 1, data: 0 };
    let mut vcpu = Scripted::new([BAD_IN, out, Exit::Halt]);
    let seat = machine.seat(&vcpu);
    assert!(machine.run(&mut vcpu, &seat).is_err());
    assert!(machine.run(&mut vcpu, &seat).is_err());
    assert_eq!(vcpu.replies, [Reply::Value(u64::MAX), Reply::Done]);
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Halted);
}

#[test]
fn stop_asked_for_before_run_is_not_lost_and_taken_once() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([Exit::Halt]);
    let seat = machine.seat(&vcpu);
    machine.control.request_stop();
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Stopped);
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Halted);
}

#[test]
fn stop_from_within_a_device_ends_the_loop_after_the_reply() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([Exit::PortIn { port: 0x12, size: 1 }, GOOD_IN]);
    let seat = machine.seat(&vcpu);
    assert_eq!(machine.run(&mut vcpu, &seat).unwrap(), StopReason::Stopped);
    assert_eq!(vcpu.replies, [Reply::Value(2)]);
    assert_eq!(vcpu.script.len(), 1);
}

#[test]
fn stop_from_another_thread_ends_a_guest_that_makes_no_exits() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([]);
    let seat = machine.seat(&vcpu);
    let reason = std::thread::scope(|scope| {
        let run = scope.spawn(|| machine.run(&mut vcpu, &seat));
        std::thread::sleep(Duration::from_millis(5));
        machine.control.request_stop();
        run.join().unwrap()
    });
    assert_eq!(reason.unwrap(), StopReason::Stopped);
}

#[test]
fn end_of_one_vcpu_stops_the_others() {
    let broken = || Scripted {
        script: [Err(EngineError::Internal("x".into()))].into(),
        ..Scripted::new([])
    };
    let ends = [
        Scripted::new([Exit::Halt]),
        Scripted::new([Exit::Shutdown]),
        Scripted::new([BAD_IN]),
        broken(),
    ];
    for mut ending in ends {
        let machine = Fixture::new();
        let mut endless = Scripted::new([]);
        let (first, second) = (machine.seat(&endless), machine.seat(&ending));
        let reason = std::thread::scope(|scope| {
            let run = scope.spawn(|| machine.run(&mut endless, &first));
            let _ = machine.run(&mut ending, &second);
            run.join().unwrap()
        });
        assert_eq!(reason.unwrap(), StopReason::Stopped);
        assert!(!second.take_stop(), "a vCPU must not stop itself a second time");
    }
}

#[test]
fn kick_without_a_request_calls_the_thread_and_goes_on() {
    let machine = Fixture::new();
    let mut vcpu = Scripted::new([Exit::Halt]);
    let seat = machine.seat(&vcpu);
    seat.kick();
    let called = AtomicBool::new(false);
    let reason =
        run_vcpu(&mut vcpu, &machine.bus, &NoHandlers, &machine.control, &seat, &mut || {
            called.store(true, Ordering::Relaxed);
            Ok(())
        });
    assert_eq!(reason.unwrap(), StopReason::Halted);
    assert!(called.into_inner());
}
