"""How a machine is started and ended, on a CPU that is a Python function."""

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tetrarch import (
    BootError,
    ConfigError,
    ExpectTimeout,
    HostError,
    Machine,
    MachineStateError,
    Phase,
    StopReason,
    load_config,
)
from tetrarch._native import EngineError
from tetrarch.console.stdio import StdioConsole
from tetrarch.machine import threads
from tetrarch.testing import ScriptedVm, pvh_kernel

Make = Callable[..., Machine]

PANIC = b"[    1.5] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(script: Callable[[ScriptedVm], str], kind: type[ScriptedVm] = ScriptedVm) -> Machine:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(pvh_kernel(b"\xf4"))
        return Machine(kernel=kernel, vm=kind(script), on_reset="end")

    return make


def say(vm: ScriptedVm, text: bytes) -> None:
    for byte in text:
        vm.port_out(0x3F8, byte)


def power_off(vm: ScriptedVm) -> str:
    say(vm, b"bye\r\n")
    vm.port_out(0x604, 0x3400, 2)
    return "stopped"


def test_power_off_ends_the_run(make: Make) -> None:
    vm = make(power_off)
    status = vm.run()
    assert (status.reason, status.code, status.ok) == (StopReason.POWERED_OFF, 0, True)
    assert vm.console.text == "bye\r\n"


def test_wait_gives_the_same_status_again(make: Make) -> None:
    vm = make(power_off)
    assert vm.run() is vm.wait()


def test_wait_with_timeout_leaves_the_machine_running(make: Make) -> None:
    with make(ScriptedVm.wait_for_stop) as vm:
        vm.start()
        with pytest.raises(TimeoutError):
            vm.wait(0.01)
        assert vm.running


def test_leaving_the_context_stops_the_machine(make: Make) -> None:
    with make(ScriptedVm.wait_for_stop) as vm:
        vm.start()
    assert not vm.running
    assert vm.wait().reason is StopReason.STOPPED


def test_guest_that_does_not_hear_its_power_button_is_ended_after_a_grace(make: Make) -> None:
    with make(ScriptedVm.wait_for_stop) as vm:
        vm.start()
        pressed = vm.events("resume", "powerdown")
        vm.pause()
        assert vm.stop(grace=0.05) is False
        assert [event.name for event in pressed] == ["resume", "powerdown"]
    assert vm.wait().reason is StopReason.STOPPED


def test_all_who_wait_learn_the_end(make: Make) -> None:
    vm = make(ScriptedVm.wait_for_stop)
    vm.start()
    seen: list[StopReason] = []
    waiters = [threading.Thread(target=lambda: seen.append(vm.wait().reason)) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    vm.request_stop()
    for waiter in waiters:
        waiter.join(10)
    assert seen == [StopReason.STOPPED] * len(waiters)


def test_triple_fault_is_a_crash_with_a_dump(make: Make) -> None:
    status = make(lambda vm: "shutdown").run()
    assert (status.reason, status.code) == (StopReason.CRASHED, 3)
    assert "RIP" in status.dump


def test_triple_fault_with_an_empty_idt_is_a_reset(make: Make) -> None:
    def reboot(vm: ScriptedVm) -> str:
        vm.registers["idtr_limit"] = 0
        return "shutdown"

    assert make(reboot).run().reason is StopReason.RESET


def test_device_exception_comes_out_of_wait_each_time(make: Make) -> None:
    def fail(vm: ScriptedVm) -> str:
        raise ZeroDivisionError("in a device")

    vm = make(fail)
    vm.start()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in a device"):
            vm.wait()


def test_first_reason_wins(make: Make) -> None:
    def off_then_reset(vm: ScriptedVm) -> str:
        vm.port_out(0x604, 0x3400, 2)
        vm.port_out(0xCF9, 6)
        return "stopped"

    assert make(off_then_reset).run().reason is StopReason.POWERED_OFF


def test_panic_with_reboot_off_is_a_crash(make: Make) -> None:
    def panic(vm: ScriptedVm) -> str:
        say(vm, PANIC)
        return vm.spin_until_stop()

    status = make(panic).run(30)
    assert (status.reason, status.code) == (StopReason.CRASHED, 3)
    assert "Unable to mount root fs" in status.detail


def test_look_that_came_too_late_does_not_lose_the_vcpu(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The panic watch holds the machine to look at the registers, and gives up while a
    # device computes for longer.
    monkeypatch.setattr(threads, "_LOOK_PATIENCE_S", 0.1)
    gave_up = threading.Event()

    class Impatient(ScriptedVm):
        def hold(self, timeout: float = 5.0) -> None:
            try:
                super().hold(timeout)
            except EngineError:
                gave_up.set()
                raise

    def compute_then_power_off(vm: ScriptedVm) -> str:
        say(vm, PANIC)
        while not gave_up.is_set():  # busy, as a device that computes
            pass
        return power_off(vm)

    assert make(compute_then_power_off, Impatient).run(30).reason is StopReason.POWERED_OFF


def test_stop_that_nobody_decided_ends_nothing(make: Make) -> None:
    # A vCPU that has met its end stops the others before it says so.
    runs: list[int] = []

    def stopped_then_power_off(vm: ScriptedVm) -> str:
        runs.append(1)
        return "stopped" if len(runs) < 3 else power_off(vm)

    assert make(stopped_then_power_off).run(30).reason is StopReason.POWERED_OFF
    assert len(runs) == 3


def test_held_machine_stands_and_shows_its_registers(make: Make) -> None:
    steps: list[int] = []

    def count(vm: ScriptedVm) -> str:
        while not vm._stop:
            vm.port_out(0x80, 0)
            steps.append(1)
        return "stopped"

    with make(count) as vm:
        vm.start()
        with vm.paused():
            assert (vm.phase, vm.running) == (Phase.PAUSED, False)
            stood, uptime = len(steps), vm.uptime
            vm.vcpus[0].set_regs(rax=7)
            assert vm.vcpus[0].regs["rax"] == 7
            assert (len(steps), vm.uptime) == (stood, uptime)
            with pytest.raises(MachineStateError, match="is paused; call resume"):
                vm.pause()
        assert (vm.phase, vm.running) == (Phase.RUNNING, True)
        while len(steps) == stood:
            time.sleep(0.001)


def test_held_machine_can_be_stopped(make: Make) -> None:
    with make(ScriptedVm.spin_until_stop) as vm:
        vm.start()
        with vm.paused():
            vm.kill()
    assert vm.wait().reason is StopReason.STOPPED


def test_machine_that_was_not_started_cannot_be_resumed(make: Make) -> None:
    vm = make(power_off)
    with pytest.raises(MachineStateError, match="not been started"):
        vm.resume()
    assert vm.phase is Phase.MADE
    assert vm.run(30).reason is StopReason.POWERED_OFF


def test_resume_that_meets_a_hold_is_not_lost(make: Make) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(ScriptedVm):
        def hold(self, timeout: float = 5.0) -> None:
            super().hold(timeout)
            begun.set()
            go_on.wait()

    with make(ScriptedVm.spin_until_stop, Slow) as vm:
        vm.start()
        hold, resume = threading.Thread(target=vm.pause), threading.Thread(target=vm.resume)
        hold.start()
        begun.wait()
        resume.start()
        go_on.set()
        hold.join()
        resume.join()
        assert vm.running


def test_device_cannot_hold_its_own_machine(make: Make) -> None:
    def hold(scripted: ScriptedVm) -> str:
        vm.pause()
        return "stopped"

    vm = make(hold)
    with pytest.raises(MachineStateError, match="its own machine"):
        vm.run(30)


def test_device_that_does_not_return_cannot_be_held(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def hang(vm: ScriptedVm) -> str:
        done.wait()
        return power_off(vm)

    monkeypatch.setattr(ScriptedVm.hold, "__defaults__", (0.05,))
    with make(hang) as vm:
        vm.start()
        with pytest.raises(HostError, match=r"cannot be paused: .*; end the device's access"):
            vm.pause()
        assert vm.running
        done.set()
        assert vm.wait(30).ok


def test_end_is_noticed_with_nobody_in_wait(make: Make) -> None:
    vm = make(power_off)
    vm.start()
    vm.console.expect("bye\r\n")
    with pytest.raises(ExpectTimeout, match=r"the machine ended \(the guest powered off\)"):
        vm.console.expect("login:")
    assert not vm.running
    assert vm.status is not None
    assert vm.status.reason is StopReason.POWERED_OFF
    assert vm.uptime == vm.uptime


def test_panic_is_noticed_with_nobody_in_wait(make: Make) -> None:
    def panic(vm: ScriptedVm) -> str:
        say(vm, PANIC)
        return vm.spin_until_stop()

    vm = make(panic)
    vm.start()
    with pytest.raises(ExpectTimeout, match="the guest crashed: Kernel panic"):
        vm.console.expect("login:")
    assert not vm.running


def test_stop_from_another_thread_ends_what_expect_waits_for(make: Make) -> None:
    vm = make(ScriptedVm.wait_for_stop)
    vm.start()
    stopper = threading.Thread(target=vm.request_stop)
    stopper.start()
    with pytest.raises(ExpectTimeout, match="the guest was stopped"):
        vm.console.expect("login:")
    stopper.join()
    assert not vm.running


def test_exception_of_a_device_is_the_cause_of_what_expect_raises(make: Make) -> None:
    def fail(vm: ScriptedVm) -> str:
        raise ZeroDivisionError("in a device")

    vm = make(fail)
    vm.start()
    with pytest.raises(ExpectTimeout, match="ZeroDivisionError: in a device") as raised:
        vm.console.expect("login:")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert not vm.running


def test_expect_before_the_start_is_refused(make: Make) -> None:
    with make(power_off) as vm, pytest.raises(MachineStateError, match="not been started"):
        vm.console.expect("login:")


def test_forgotten_machine_ends_with_a_warning(make: Make) -> None:
    ended = threading.Event()

    def idle(vm: ScriptedVm) -> str:
        why = vm.wait_for_stop()
        ended.set()
        return why

    vm = make(idle)
    vm.start()
    with pytest.warns(ResourceWarning, match="'tetrarch' on ScriptedVm, running.* was forgotten"):
        del vm
    assert ended.wait(10)


def test_forgotten_machine_that_never_ran_gives_its_descriptors_back(make: Make) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    vm = make(power_off)
    del vm
    gc.collect()
    before = open_files()
    for _ in range(3):
        vm = Machine(memory="4M", engine="bt", console=StdioConsole(os.open(os.devnull, 0)))
        os.close(vm._backend._in)  # type: ignore[attr-defined]
        del vm
    gc.collect()
    assert open_files() == before


def test_options_of_a_file_can_be_changed(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text('name = "one"\nmemory = "32M"\nconsole = "none"\n')
    with Machine(load_config(file), name="two", vm=ScriptedVm(power_off)) as vm:
        assert (vm.config.name, vm.config.memory) == ("two", 32 << 20)
        assert repr(vm) == "<Machine 'two' on ScriptedVm, made>"


@pytest.mark.parametrize("console", ["tape", 7, object()])
def test_what_is_no_console_is_refused_in_a_sentence(console: Any) -> None:
    with pytest.raises(ConfigError, match="is no console"):
        Machine(console=console, vm=ScriptedVm(power_off))


def test_console_as_the_configuration_writes_it(tmp_path: Path, make: Make) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    log = tmp_path / "log"
    Machine(kernel=kernel, console=f"file={log}", vm=ScriptedVm(power_off)).run()
    assert log.read_bytes() == b"bye\r\n"


def test_reason_is_the_text_that_it_shows(make: Make) -> None:
    assert make(power_off).run().reason == "powered-off"


def test_typed_input_reaches_the_guest_in_order(make: Make) -> None:
    typed = "0123456789" * 10

    def echo(vm: ScriptedVm) -> str:
        for _ in typed:
            while not vm.port_in(0x3FD) & 1:
                time.sleep(0.001)
            vm.port_out(0x3F8, vm.port_in(0x3F8))
        return power_off(vm)

    vm = make(echo)
    vm.console.send(typed)
    vm.run(30)
    assert vm.console.read() == typed + "bye\r\n"


def test_expect_fails_at_once_when_the_machine_has_ended(make: Make) -> None:
    vm = make(power_off)
    vm.run()
    with pytest.raises(ExpectTimeout, match=r"the machine ended.*bye"):
        vm.console.expect("login:", timeout=60)


def test_machine_runs_once(make: Make) -> None:
    vm = make(power_off)
    vm.run()
    again: list[tuple[str, Callable[[], object]]] = [
        ("start", vm.start),
        ("run", vm.run),
        ("load", vm.load),
        ("attach_ports", lambda: vm.attach_ports(0x500, 1, vm._pc.uart)),
    ]
    for name, call in again:
        with pytest.raises(MachineStateError, match=rf"^{name}\(\) cannot be: .* has ended"):
            call()


def test_second_start_of_a_running_machine_is_refused(make: Make) -> None:
    with make(ScriptedVm.wait_for_stop) as vm:
        vm.start()
        with pytest.raises(MachineStateError, match="already started"):
            vm.start()


def test_wait_before_start_is_refused(make: Make) -> None:
    with pytest.raises(MachineStateError, match="not been started"):
        make(power_off).wait()


def test_missing_kernel_is_said_when_the_machine_is_made(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="kernel nosuch: no such file"):
        Machine(kernel="nosuch", vm=ScriptedVm(power_off))


def test_timeout_that_is_no_number_is_refused(make: Make) -> None:
    nan = float("nan")
    with make(power_off) as vm:
        vm.start()
        with pytest.raises(ValueError, match="nan is no number"):
            vm.console.expect("never", nan)
        with pytest.raises(ValueError, match="nan is no number"):
            vm.wait(nan)
    with make(power_off) as vm, pytest.raises(ValueError, match="nan is no number"):
        vm.run(nan)


def test_infinite_timeout_is_none(make: Make) -> None:
    with make(power_off) as vm:
        vm.start()
        assert vm.console.expect("bye", float("inf")) == "bye"
        assert vm.wait(float("inf")).ok
