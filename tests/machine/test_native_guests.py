"""Whole machines on the real engine, with guests of a few bytes."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine, StopReason, _native
from tetrarch.machine import snapshot
from tetrarch.machine.config import EngineName
from tetrarch.testing import pvh_kernel

Make = Callable[..., Machine]

# Each guest needs well under a second; a slow host may need more.
LIMIT_S = 30


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
        chosen = {"engine": engine, "memory": "16M", "on_reset": "end", **options}
        return Machine(kernel=kernel, **chosen)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (guests.POWER_OFF, StopReason.POWERED_OFF, 0),
        (guests.KEYBOARD_RESET, StopReason.RESET, 0),
        (guests.CF9_RESET, StopReason.RESET, 0),
        (guests.PORT_92_RESET, StopReason.RESET, 0),
        (guests.TRIPLE_FAULT, StopReason.CRASHED, 3),
        (guests.JUMP_TO_NOWHERE, StopReason.CRASHED, 3),
        (guests.HALT_FOREVER, StopReason.CRASHED, 3),
    ],
    ids=["acpi", "keyboard", "cf9", "port-92", "ud2", "nowhere", "halt"],
)
def test_each_end_has_its_reason_and_code(
    make: Make, code: bytes, reason: StopReason, exit_code: int
) -> None:
    status = make(code).run(LIMIT_S)
    assert (status.reason, status.code) == (reason, exit_code)
    assert bool(status.dump) == (reason is StopReason.CRASHED)


def test_triple_fault_with_an_empty_idt_is_a_reset(make: Make, engine: str) -> None:
    if engine == "kvm":
        pytest.skip("kvm-amd gives no IDT register after a triple fault: it resets the vCPU first")
    status = make(guests.TRIPLE_FAULT_ON_PURPOSE).run(LIMIT_S)
    assert (status.reason, status.code, status.dump) == (StopReason.RESET, 0, "")


def test_debug_exit_gives_the_value_as_qemu_does(make: Make) -> None:
    status = make(guests.DEBUG_EXIT_16, debug_exit=True).run(LIMIT_S)
    assert (status.reason, status.value, status.code) == (StopReason.DEBUG_EXIT, 16, 33)


def test_endless_loop_is_stopped_at_the_timeout(make: Make) -> None:
    status = make(guests.ENDLESS_LOOP).run(0.2)
    assert (status.reason, status.code) == (StopReason.TIMEOUT, 124)


def test_endless_loop_is_stopped_from_outside(make: Make) -> None:
    with make(guests.ENDLESS_LOOP) as vm:
        vm.start()
        vm.kill()
        assert vm.wait().reason is StopReason.STOPPED


def test_console_shows_what_the_guest_prints(make: Make) -> None:
    with make(guests.say(b"login: ") + guests.POWER_OFF) as vm:
        vm.start()
        assert vm.console.expect("login:", timeout=LIMIT_S) == "login:"


def test_console_types_into_the_guest(make: Make) -> None:
    with make(guests.ECHO) as vm:
        vm.start()
        vm.console.send("a line longer than the FIFO of the UART\n")
        vm.console.expect("FIFO of the UART\n", timeout=LIMIT_S)


class Recorder:
    """Reads as 0x41 and keeps what is written."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x41

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_own_device_answers_on_ports(make: Make) -> None:
    device = Recorder()
    vm = make(guests.ANSWER_PORT_500)
    vm.attach_ports(0x500, 8, device)
    assert vm.run(LIMIT_S).ok
    assert device.writes == [(0, 1, 0x42)]


def test_own_device_answers_on_mmio(make: Make) -> None:
    device = Recorder()
    vm = make(guests.ANSWER_MMIO)
    vm.attach_mmio(0xD000_0000, 0x1000, device)
    assert vm.run(LIMIT_S).ok
    assert device.writes == [(4, 1, 0x42)]


class Broken(Recorder):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def read(self, offset: int, size: int) -> int:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_exception_in_a_device_comes_out_of_run(make: Make, error: BaseException) -> None:
    vm = make(guests.ANSWER_PORT_500)
    vm.attach_ports(0x500, 8, Broken(error))
    with pytest.raises(type(error)) as raised:
        vm.run(LIMIT_S)
    assert raised.value is error


def test_stats_count_exits(make: Make) -> None:
    vm = make(guests.POWER_OFF)
    vm.run(LIMIT_S)
    assert vm.stats()["exits"]["port_out"] >= 1


def test_stats_tell_of_a_guest_while_it_runs(make: Make, engine: str) -> None:
    if engine == "kvm":
        pytest.skip("engine kvm has no counters of its own")
    vm = make(guests.CPUID_LOOP)
    vm.start()
    end = time.monotonic() + LIMIT_S
    while vm.stats()["bt"]["interpreted"] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    first = vm.stats()["bt"]["interpreted"]
    assert first > 0
    while vm.stats()["bt"]["interpreted"] == first and time.monotonic() < end:
        time.sleep(0.01)
    assert vm.stats()["bt"]["interpreted"] > first
    vm.kill()


def test_pci_scan_finds_a_host_bridge_and_resets_nothing(make: Make) -> None:
    # Function 4 of device 4: the second byte of its address is what a reset looks like.
    device = Recorder()
    vm = make(guests.PCI_SCAN, rng=False, balloon=False)
    vm.attach_ports(0x500, 4, device)
    assert vm.run(LIMIT_S).reason is StopReason.POWERED_OFF
    assert device.writes == [(0, 4, 0x0008_1B36), (0, 4, 0xFFFF_FFFF)]


def test_ports_beside_the_pci_address_are_free(make: Make) -> None:
    with make(guests.POWER_OFF) as vm:
        vm.attach_ports(0xCFA, 2, Recorder())
        with pytest.raises(_native.EngineError, match="overlaps"):
            vm.attach_ports(0xCF9, 1, Recorder())


def test_registers_of_a_running_machine(make: Make) -> None:
    with make(guests.ENDLESS_LOOP) as vm:
        vm.start()
        assert vm.vcpus[0].regs["rip"] == 0x10_0000
        with vm.paused():
            before = vm._vm.clock_ns()
            assert vm._vm.clock_ns() == before
            vm.write_memory(0x10_0000, guests.POWER_OFF)
        assert vm.wait(LIMIT_S).ok


def test_saved_machine_goes_on_in_another_process(make: Make, tmp_path: Path, engine: str) -> None:
    saved = tmp_path / "saved"
    with make(guests.COUNTING_ECHO) as vm:
        vm.start()
        vm.console.send("ab")
        vm.console.expect("a1b2", timeout=LIMIT_S)
        with vm.paused():
            clock = vm._vm.clock_ns()
            vm.console.send("c")
            vm.save(saved)
    program = f"""
from tetrarch import Machine
with Machine.restore({str(saved)!r}) as vm:
    assert vm.engine == {engine!r}
    clock = vm._vm.clock_ns()
    vm.start()
    print(clock, vm.console.expect("c3", timeout={LIMIT_S}))
    vm.console.send("d")
    print(vm.console.expect("d4", timeout={LIMIT_S}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{clock} c3\nd4\n"


def test_machine_goes_on_on_the_other_engine_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This guest looks for no feature of its CPU, and a KVM without hardware behind it has few.
    if not _native.kvm_probe()["hardware"]:
        monkeypatch.setattr(snapshot, "_require_cpu", lambda parts, had: None)
    reason = _native.engine_available("kvm")
    if reason is not None:
        pytest.skip("; ".join(reason))
    kernel, saved = tmp_path / "kernel", tmp_path / "saved"
    kernel.write_bytes(pvh_kernel(guests.COUNTING_ECHO))
    engines: tuple[EngineName, ...] = ("kvm", "bt", "kvm", "bt")
    with ExitStack() as machines:
        vm = machines.enter_context(Machine(kernel=kernel, engine="bt", memory="16M"))
        vm.start()
        for number, engine in enumerate(engines):
            vm.console.send("a")
            vm.console.expect(f"a{2 * number + 1}", timeout=LIMIT_S)
            with vm.paused():
                # Typed and not read: it is in the UART when the machine is saved.
                vm.console.send("b")
                vm.save(saved)
            vm.kill()
            vm = machines.enter_context(Machine.restore(saved, engine=engine))
            assert vm.engine == engine
            vm.start()
            vm.console.expect(f"b{2 * number + 2}", timeout=LIMIT_S)


def test_guest_sees_no_jump_of_its_tsc(make: Make, tmp_path: Path, engine: str) -> None:
    if engine == "kvm":
        pytest.skip("a KVM without hardware behind it has no TSC of the guest's own to move")
    # It says the upper halves of its TSC's differences between two typed bytes, which are
    # zero where less than 2**32 ticks, about a second, have passed.
    saved = tmp_path / "saved"
    with make(guests.TICKS_BETWEEN) as vm:
        vm.start()
        vm.console.send("x")
        vm.console.expect("?", timeout=LIMIT_S)
        first = vm.uptime
        vm.save(saved)
    time.sleep(4)  # of the host's time, which the guest must not see
    with Machine.restore(saved) as vm:
        vm.start()
        vm.console.send("x")
        long = vm.console.expect(re.compile("[01]"), timeout=LIMIT_S) == "1"
        # No TSC takes less than half a second for 2**32 ticks.
        assert not long or vm.uptime - first > 0.5


def test_machines_of_the_past_hold_no_memory(tmp_path: Path, engine: EngineName) -> None:
    """Though Python's collector, which would free them, does not come by itself."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.POWER_OFF))
    memory = 1 << 30
    script = f"""
import gc
from pathlib import Path
from tetrarch import Machine

gc.disable()
for _ in range(6):
    assert Machine(kernel={str(kernel)!r}, engine={engine!r}, memory="1G").run({LIMIT_S}).ok
    held = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "tetrarch-ram" in line:
            first, last = line.split()[0].split("-")
            held += int(last, 16) - int(first, 16)
    print(held)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    held = [int(line) for line in done.stdout.split()]
    assert held[0] > 0, "the test does not find a guest's memory"
    assert max(held) <= 3 * memory, held
