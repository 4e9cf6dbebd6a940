"""vCPUs that come into a machine that runs, and go: what a guest of a few bytes sees of it."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.machine import guests

from tetrarch import ConfigError, Machine, MachineStateError, StateError, StopReason
from tetrarch.boot.layout import ACPI_BASE, ACPI_END
from tetrarch.devices.cpu_hotplug import EJECT, GONE, NEW, THERE, CpuHotplugCore
from tetrarch.machine.config import EngineName
from tetrarch.machine.selection import engines
from tetrarch.testing import pvh_kernel

LIMIT_S = 60
Make = Callable[..., Machine]


@pytest.fixture(params=["bt", "kvm"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    (info,) = (info for info in engines() if info.name == name)
    if not info.available:
        pytest.skip(f"engine {name}: {info.reason}")
    return name


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes machines that end with the test."""
    with ExitStack() as stack:

        def make(code: bytes = b"", **options: Any) -> Machine:
            kernel = tmp_path / "kernel"
            kernel.write_bytes(pvh_kernel(code or guests.watch_cpu_1()))
            chosen = {"engine": "bt", "memory": "16M", "cpus": "1,max=3", **options}
            vm = stack.enter_context(Machine(kernel=kernel, **chosen))
            vm.start()
            return vm

        yield make


def register(vm: Machine) -> int:
    """What the guest reads of CPU 1."""
    vm.console.send("r")
    return ord(vm.console.expect(re.compile("[@-O]"), LIMIT_S)[-1]) & 15


def write(vm: Machine, bits: int) -> int:
    """Has the guest write there, and read what it is then."""
    vm.console.send(str(bits))
    return register(vm)


def numbers(vm: Machine) -> list[int]:
    return [vcpu.number for vcpu in vm.vcpus]


def enabled(vm: Machine) -> list[int]:
    """The flags of each processor that the MADT has now."""
    memory = vm.read_memory(ACPI_BASE, ACPI_END - ACPI_BASE)
    at = memory.index(b"APIC")
    (length,) = struct.unpack_from("<I", memory, at + 4)
    flags, entry, end = [], at + 44, at + length
    while entry < end:
        if memory[entry] == 0:
            flags.append(memory[entry + 4])
        entry += memory[entry + 1]
    return flags


def test_a_cpu_comes_and_waits_to_be_started_and_goes_and_comes_anew(
    make: Make, engine: EngineName
) -> None:
    vm = make(engine=engine)
    assert (register(vm), numbers(vm), enabled(vm)) == (0, [0], [1, 2, 2])
    for _ in range(2):
        assert vm.plug_vcpu() == 1
        assert (register(vm), numbers(vm)) == (THERE | NEW, [0, 1])
        assert write(vm, NEW) == THERE
        assert len(vm.vcpu_threads) == 2
        vm.console.send("s")
        vm.console.expect("1", LIMIT_S)
        vm.pc.vcpus.request_unplug("cpu1")
        assert register(vm) == THERE | GONE
        assert write(vm, GONE) == THERE
        assert write(vm, EJECT) == 0
        assert (numbers(vm), len(vm.vcpu_threads)) == ([0], 1)
    assert vm.plug_vcpu(2) == 2
    vm.console.send("s")
    vm.console.expect("2", LIMIT_S)
    assert register(vm) == 0, "the other has not come"


def test_what_cannot_come_or_go_is_one_line(make: Make) -> None:
    vm = make()
    assert [vm.plug_vcpu(), vm.plug_vcpu()] == [1, 2]
    for action, message in (
        (lambda: vm.plug_vcpu(), "all 3 CPUs that the machine can have are in it; make it with"),
        (lambda: vm.plug_vcpu(3), "the machine can have no CPU 3: they are 0 to 2; make it"),
        (lambda: vm.plug_vcpu(-1), "the machine can have no CPU -1"),
        (lambda: vm.plug_vcpu(1), "CPU 1 is in the machine; name another"),
        (lambda: vm.unplug_vcpu(0), "CPU 0 stays in its machine: the guest started on it; name"),
        (lambda: vm.unplug_vcpu(7), "there is no CPU 7 in the machine; name one of 0, 1, 2"),
    ):
        with pytest.raises(MachineStateError, match=message):
            action()
    with pytest.raises(TimeoutError, match=r"the guest has not given CPU 2 up within 0.1 s"):
        vm.unplug_vcpu(2, timeout=0.1)
    assert numbers(vm) == [0, 1, 2]
    vm.kill()
    with pytest.raises(MachineStateError):
        vm.plug_vcpu()


def test_a_machine_that_was_made_for_no_more_says_so(make: Make) -> None:
    vm = make(cpus=2)
    for action in (vm.plug_vcpu, lambda: vm.unplug_vcpu(1)):
        with pytest.raises(MachineStateError, match=r"has 2 CPUs, and can have no others; .*max=M"):
            action()
    assert enabled(vm) == [1, 1]
    # Its guest finds nothing there.
    vm.console.send("r")
    assert vm.console.expect(re.compile(r"[^r]"), LIMIT_S)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_device_does_not_wait_for_its_own_guest(tmp_path: Path) -> None:
    class Asking:
        said = ""

        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            try:
                vm.plug_vcpu()
            except MachineStateError as error:
                self.said = error.cause

    asking, kernel = Asking(), tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.ANSWER_PORT_500))
    with Machine(kernel=kernel, engine="bt", memory="16M", cpus="1,max=2") as vm:
        vm.attach_ports(0x500, 1, asking)
        vm.run(LIMIT_S)
    assert asking.said == "a device cannot wait for its own guest"


def test_a_cpu_comes_while_the_machine_is_paused(make: Make) -> None:
    vm = make()
    with vm.paused():
        vm.plug_vcpu()
        assert numbers(vm) == [0, 1]
        assert vm.vcpus[1].regs.rip is not None
    assert register(vm) == THERE | NEW
    vm.console.send("s")
    vm.console.expect("1", LIMIT_S)


def test_those_that_are_there_are_saved(make: Make, tmp_path: Path) -> None:
    vm = make()
    assert vm.plug_vcpu(2) == 2
    vm.console.send("s")
    vm.console.expect("2", LIMIT_S)
    vm.plug_vcpu()
    vm.save(tmp_path / "saved")
    vm.kill()
    with Machine.restore(tmp_path / "saved") as again:
        again.start()
        assert numbers(again) == [0, 1, 2]
        assert register(again) == THERE | NEW, "the guest is still to be told"
        again.pc.vcpus.request_unplug("cpu2")
        assert write(again, EJECT) == 0
        assert numbers(again) == [0, 2]
        again.console.send("s")
        again.console.expect("2", LIMIT_S)
        assert again.plug_vcpu() == 1
        again.console.send("s")
        assert sorted(again.console.expect(re.compile("(12|21)"), LIMIT_S)[-2:]) == ["1", "2"]


def test_a_file_with_cpus_that_cannot_be_is_refused(make: Make, tmp_path: Path) -> None:
    vm = make()
    for names in ({}, {1: "cpu1"}, {0: "a", 1: "a"}, {0: "cpu0", 3: "cpu3"}):
        with pytest.raises(StateError, match="the saved machine's CPUs cannot be"):
            vm.pc.vcpus.load(names)


def test_a_reset_keeps_them_and_its_guest_finds_them(make: Make) -> None:
    vm = make(on_reset="restart")
    vm.plug_vcpu(2)
    vm.plug_vcpu(1)
    vm.pc.vcpus.request_unplug("cpu1")
    assert register(vm) == THERE | NEW | GONE
    was_reset = threading.Event()
    vm.on("reset", lambda event: was_reset.set())
    vm.reset()
    assert was_reset.wait(LIMIT_S)
    # Of what it was asked to give up the reset is an answer.
    assert (register(vm), numbers(vm), enabled(vm)) == (0, [0, 2], [1, 2, 1])
    vm.console.send("s")
    vm.console.expect("2", LIMIT_S)


def test_a_machine_whose_cpus_halt_for_good_has_ended_without_those_that_are_not_there(
    make: Make, engine: EngineName
) -> None:
    vm = make(guests.HALT_FOREVER, engine=engine)
    status = vm.wait(LIMIT_S)
    assert (status.reason, status.detail) == (
        StopReason.CRASHED,
        "halted forever with interrupts off",
    )


def test_a_name_is_one_cpus(make: Make) -> None:
    vm = make()
    vm.pc.vcpus.plug(None, "one")
    with pytest.raises(ConfigError, match="there is a CPU 'one' already"):
        vm.pc.vcpus.plug(None, "one")
    with pytest.raises(LookupError, match="'two' not found"):
        vm.pc.vcpus.request_unplug("two")


def test_a_guest_reaches_the_registers_of_its_cpus_alone() -> None:
    core = CpuHotplugCore(3)
    core.there = 0b001
    core.announce(2)
    core.request(2)
    assert [core.read(cpu, 1) for cpu in range(4)] == [THERE, 0, NEW | GONE, 0xFF]
    for offset, size, value in ((3, 1, 0xFF), (-1, 1, 0xFF), (1, 2, 0xFFFF), (1, 4, 0xFFFF_FFFF)):
        core.write(offset, size, value)
    assert core.take_ejected() == []
    assert core.read(2, 2) == 0xFFFF
    core.write(2, 1, 0xFF)
    core.write(0, 1, EJECT)
    assert (core.read(2, 1), core.irq, core.take_ejected()) == (0, False, [0, 2])


def test_the_first_cpu_and_one_that_is_not_there_are_not_ejected(make: Make) -> None:
    vm = make()
    assert vm.pc.vcpus.hotplug is not None
    for cpu in (0, 1, 2, 3, 255):
        vm.pc.vcpus.hotplug.write(cpu, 1, EJECT)
    assert numbers(vm) == [0]
    assert register(vm) == 0
