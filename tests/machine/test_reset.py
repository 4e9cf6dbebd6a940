"""Machines that start anew where their guest resets them."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine, MachineStateError, StopReason, _native
from tetrarch.images import CachedGuest
from tetrarch.testing import ScriptedVm, pvh_kernel

Make = Callable[..., Machine]

LIMIT_S = 30
BOOT_LIMIT_S = 90
PROMPT = "root@tetrarch:~# "


@pytest.fixture(params=["bt", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = _native.engine_available(name)
    if reason is not None:
        pytest.skip("; ".join(reason))
    return name


@pytest.fixture
def make(tmp_path: Path, engine: str) -> Make:
    def make(code: bytes, **options: object) -> Machine:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(pvh_kernel(code))
        chosen = {"engine": engine, "memory": "16M", "on_reset": "restart", **options}
        return Machine(kernel=kernel, **chosen)  # type: ignore[arg-type]

    return make


class Watch:
    """What the guest writes, and what the process holds at that moment."""

    def __init__(self) -> None:
        self.writes: list[int] = []
        self.holds: list[tuple[int, int]] = []
        self.resets = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append(value)
        self.holds.append((len(os.listdir("/proc/self/fd")), threading.active_count()))

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize(
    "reset",
    [
        guests.CF9_RESET,
        guests.KEYBOARD_RESET,
        guests.PORT_92_RESET,
        guests.TRIPLE_FAULT_ANYWHERE,
    ],
    ids=["cf9", "keyboard", "port-92", "triple-fault"],
)
def test_guest_resets_itself_50_times_and_nothing_is_left_over(
    make: Make, engine: str, reset: bytes
) -> None:
    if engine == "kvm" and reset is guests.TRIPLE_FAULT_ANYWHERE:
        pytest.skip("kvm-amd gives no IDT register after a triple fault: it resets the vCPU first")
    watch = Watch()
    vm = make(guests.reset_until(51, reset, guests.say(b".") + guests.TELL_PORT_500))
    vm.attach_ports(0x500, 1, watch)
    status = vm.run(LIMIT_S)
    assert status.reason is StopReason.POWERED_OFF
    assert (vm.resets, watch.resets) == (50, 50)
    assert watch.writes == list(range(1, 52)), "RAM keeps the count"
    assert vm.console.text == "." * 51
    (files, threads), (files_then, threads_then) = watch.holds[1], watch.holds[-1]
    assert files_then <= files
    assert threads_then <= threads


def test_devices_controllers_and_cpu_are_as_after_power_on(make: Make) -> None:
    watch = Watch()
    vm = make(guests.reset_until(3, guests.CF9_RESET, guests.TELL_STATE))
    vm.attach_ports(0x500, 1, watch)
    assert vm.run(LIMIT_S).reason is StopReason.POWERED_OFF
    first, second, third = watch.writes[:3], watch.writes[3:6], watch.writes[6:]
    assert 0x5A not in first
    assert first == second == third


def test_clock_counters_and_console_go_on(make: Make) -> None:
    vm = make(
        guests.reset_until(3, guests.CF9_RESET, guests.say(b"up\n") + guests.ANSWER_PORT_500[:9])
    )
    clocks: list[int] = []

    class Clock(Watch):
        def write(self, offset: int, size: int, value: int) -> None:
            clocks.append(vm._vm.clock_ns())

    vm.attach_ports(0x500, 1, Clock())
    with vm:
        vm.start()
        for _ in range(3):
            vm.console.expect("up", LIMIT_S)
        assert vm.wait(LIMIT_S).ok
    assert 0 < clocks[0] < clocks[1] < clocks[2]
    # Three lines of three characters, the device, two resets, the power-off's own.
    assert vm.stats()["exits"]["port_out"] >= 3 * 4 + 2 + 1


def test_guest_that_resets_for_ever_is_stopped(make: Make) -> None:
    with make(guests.say(b".") + guests.CF9_RESET) as vm:
        vm.start()
        vm.console.expect("." * 5, LIMIT_S)
        vm.kill()
        assert vm.wait().reason is StopReason.STOPPED


def test_held_machine_is_not_reset(make: Make) -> None:
    # It is held at any moment, in the middle of a reset too, and found whole.
    with make(guests.say(b".") + guests.CF9_RESET) as vm:
        vm.start()
        for _ in range(20):
            vm.console.expect(".", LIMIT_S)
            with vm.paused():
                count, rip = vm.resets, vm.vcpus[0].regs["rip"]
                assert 0x10_0000 <= rip < 0x10_0100
                vm.console.read()
                assert (vm.resets, vm.vcpus[0].regs["rip"]) == (count, rip)
                assert vm.console.read() == ""
        vm.pause()
        vm.kill()
        assert vm.wait().reason is StopReason.STOPPED


def test_saved_machine_never_waits_for_a_reset_that_came_before(make: Make, tmp_path: Path) -> None:
    # It is saved at any moment, also between the write that resets it and the reset: then
    # it is refused, since the guest would wait for ever behind its write.
    with make(guests.say(b".") + guests.CF9_RESET) as vm:
        vm.start()
        for turn in range(60):
            vm.console.expect(".", LIMIT_S)
            with vm.paused():
                # Beyond the write stands the guest's endless loop.
                waits = vm.vcpus[0].regs["rip"] >= 0x10_0000 + len(guests.say(b".")) + 8
                path = tmp_path / f"saved-{turn}"
                if not waits:
                    vm.save(path)
                    continue
                with pytest.raises(MachineStateError, match="resetting it"):
                    vm.save(path)
                assert not path.exists()
                break
        else:
            pytest.skip("the machine was never met behind its write")


def test_kernel_that_is_gone_ends_the_machine(make: Make) -> None:
    with make(guests.ECHO[:10] + guests.CF9_RESET) as vm:
        vm.start()
        assert vm.config.kernel is not None
        vm.config.kernel.unlink()
        vm.console.send("x")
        with pytest.raises(Exception, match="kernel"):
            vm.wait(LIMIT_S)


@pytest.fixture
def scripted(tmp_path: Path) -> Make:
    def make(script: Callable[[ScriptedVm], str], **options: object) -> Machine:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(pvh_kernel(guests.ENDLESS_LOOP))
        return Machine(kernel=kernel, vm=ScriptedVm(script), on_reset="restart", **options)  # type: ignore[arg-type]

    return make


def test_what_the_guest_does_after_its_reset_does_not_count(scripted: Make) -> None:
    lives: list[int] = []

    def reset_then_off(vm: ScriptedVm) -> str:
        lives.append(1)
        if len(lives) > 1:
            return vm.wait_for_stop()
        vm.port_out(0xCF9, 6)
        vm.port_out(0x604, 0x3400, 2)
        return "shutdown"

    with scripted(reset_then_off) as vm:
        vm.start()
        with pytest.raises(TimeoutError):
            vm.wait(0.5)
        assert (vm.resets, len(lives) >= 2) == (1, True)


def test_exception_of_a_device_ends_the_machine_that_was_reset(scripted: Make) -> None:
    def reset_then_fail(vm: ScriptedVm) -> str:
        vm.port_out(0xCF9, 6)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        scripted(reset_then_fail).run(LIMIT_S)


@pytest.mark.parametrize("options", [{}, {"cpus": 2}], ids=["one-cpu", "two-cpus"])
def test_debian_reboots_to_a_prompt(
    debian_guest: CachedGuest, engine: str, options: dict[str, int]
) -> None:
    if engine == "kvm" and not _native.kvm_probe()["hardware"]:
        pytest.skip("KVM interprets the guest here: a boot takes hours")
    with Machine(engine=engine, on_reset="restart", **options) as vm:  # type: ignore[arg-type]
        vm.start()
        vm.console.expect(PROMPT, BOOT_LIMIT_S)
        offset = _wall_less_host(vm)
        for count in (1, 2):
            vm.console.send("reboot -f\n")
            vm.console.expect(PROMPT, BOOT_LIMIT_S)
            assert vm.resets == count
        assert abs(_wall_less_host(vm) - offset) < 30, "the clock of the guest goes on"
        vm.console.send("poweroff\n")
        assert vm.wait(BOOT_LIMIT_S).reason is StopReason.POWERED_OFF


def _wall_less_host(vm: Machine) -> float:
    vm.console.send("date +now=%s.\n")
    shown = vm.console.expect(re.compile(r"now=[0-9]+\."), BOOT_LIMIT_S)
    vm.console.expect(PROMPT, BOOT_LIMIT_S)
    return int(shown.rpartition("=")[2].rstrip(".")) - time.time()
