"""The way of the guest's output to its console, which is on a thread of its own."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrarch import HostError, Machine, StopReason
from tetrarch.console import MemoryConsole, NullConsole
from tetrarch.machine import console_line
from tetrarch.testing import ScriptedVm, pvh_kernel

Script = Callable[[ScriptedVm], str]
Make = Callable[..., Machine]

THR = 0x3F8


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(script: Script, console: NullConsole | MemoryConsole) -> Machine:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(pvh_kernel(b"\xf4"))
        return Machine(kernel=kernel, vm=ScriptedVm(script), console=console)

    return make


def say(vm: ScriptedVm, text: bytes) -> None:
    for byte in text:
        vm.port_out(THR, byte)


def power_off(vm: ScriptedVm) -> str:
    say(vm, b"last words")
    vm.port_out(0x604, 0x3400, 2)
    return "stopped"


class Gate(MemoryConsole):
    """Takes nothing while it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.open = threading.Event()

    def write(self, data: bytes) -> None:
        self.asked.set()
        self.open.wait()
        super().write(data)


class Broken(NullConsole):
    def write(self, data: bytes) -> None:
        raise ConnectionResetError("nobody reads")


def test_machine_ends_when_a_slow_console_has_the_last_words(make: Make) -> None:
    console = Gate()
    vm = make(power_off, console)
    vm.start()
    console.asked.wait()
    with pytest.raises(TimeoutError):
        vm.wait(0.05)
    console.open.set()
    assert vm.wait().reason is StopReason.POWERED_OFF
    assert console.text == "last words"


def test_console_that_fails_at_the_last_words_is_how_the_machine_ended(make: Make) -> None:
    with pytest.raises(ConnectionResetError, match="nobody reads"):
        make(power_off, Broken()).run()


def test_console_that_fails_ends_a_guest_that_says_no_more(make: Make) -> None:
    def script(vm: ScriptedVm) -> str:
        say(vm, b"hello")
        return vm.wait_for_stop()

    with pytest.raises(ConnectionResetError, match="nobody reads"):
        make(script, Broken()).run(timeout=60)


def test_console_may_stop_its_machine(make: Make) -> None:
    def script(vm: ScriptedVm) -> str:
        say(vm, b"stop me")
        return vm.wait_for_stop()

    class Stopper(NullConsole):
        def write(self, data: bytes) -> None:
            vm.kill()

    vm = make(script, Stopper())
    assert vm.run(timeout=60).reason is StopReason.STOPPED


def test_held_machine_has_said_what_it_said(make: Make) -> None:
    said = threading.Event()

    def script(vm: ScriptedVm) -> str:
        say(vm, b"x" * 100)
        said.set()
        return vm.wait_for_stop()

    console = MemoryConsole()
    with make(script, console) as vm:
        vm.start()
        said.wait()
        with vm.paused():
            assert console.text == "x" * 100


def test_machine_whose_console_hangs_cannot_be_held(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_line, "_FLUSH_PATIENCE_S", 0.05)

    def script(vm: ScriptedVm) -> str:
        say(vm, b"x")
        return vm.wait_for_stop()

    console = Gate()
    with make(script, console) as vm:
        vm.start()
        console.asked.wait()
        with pytest.raises(HostError, match=r"cannot be paused: its console .*; end its write"):
            vm.pause()
        assert vm.running
        console.open.set()
        with vm.paused():
            assert console.text == "x"


def test_console_that_never_takes_the_last_words_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_line, "_END_PATIENCE_S", 0.05)
    console = Gate()
    try:
        with pytest.raises(HostError, match="console does not take what the guest sent"):
            make(power_off, console).run()
    finally:
        console.open.set()
