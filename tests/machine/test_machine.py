"""How a machine is started and ended, on a CPU that is a Python function."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrarch import ExpectTimeout, Machine, MachineStateError, StopReason, TetrarchError
from tetrarch.machine import machine as machine_module
from tetrarch.testing import ScriptedVm, pvh_kernel

Make = Callable[[Callable[[ScriptedVm], str]], Machine]

PANIC = b"[    1.5] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(script: Callable[[ScriptedVm], str]) -> Machine:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(pvh_kernel(b"\xf4"))
        monkeypatch.setattr(machine_module, "_create_vm", lambda *_: ScriptedVm(script))
        return Machine(kernel=kernel)

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
        if not vm.registers.get("said"):
            vm.registers["said"] = 1
            say(vm, PANIC)
        return vm.spin_until_stop()

    status = make(panic).run(30)
    assert (status.reason, status.code) == (StopReason.CRASHED, 3)
    assert "Unable to mount root fs" in status.detail


def test_program_that_prints_a_panic_line_runs_on(make: Make) -> None:
    def cat_old_log(vm: ScriptedVm) -> str:
        if not vm.registers.get("said"):
            vm.registers["said"] = 1
            say(vm, PANIC)
        vm.registers["cs_selector"] = 0x33  # user code
        return vm.spin_until_stop()

    assert make(cat_old_log).run(2).reason is StopReason.TIMEOUT


def test_idle_shell_after_a_panic_line_runs_on(make: Make) -> None:
    def idle(vm: ScriptedVm) -> str:
        say(vm, PANIC)
        return vm.wait_for_stop()

    assert make(idle).run(2).reason is StopReason.TIMEOUT


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
    for again in (vm.start, vm.load, lambda: vm.attach_ports(0x500, 1, vm._pc.uart)):
        with pytest.raises(MachineStateError, match="already started"):
            again()


def test_wait_before_start_is_refused(make: Make) -> None:
    with pytest.raises(MachineStateError, match="not been started"):
        make(power_off).wait()


def test_missing_kernel_is_a_tetrarch_error(tmp_path: Path, make: Make) -> None:
    vm = make(power_off)
    assert vm.config.kernel is not None
    vm.config.kernel.unlink()
    with pytest.raises(TetrarchError, match="kernel"):
        vm.run()
