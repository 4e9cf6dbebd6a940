"""A replay of Linux goes to any count of its recording, and back."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
from tests.machine import guests
from tests.remote.conftest import tetrarch_cli

import tetrarch
from tetrarch import Machine
from tetrarch._native import EngineError
from tetrarch.control import ControlError
from tetrarch.errors import MachineStateError
from tetrarch.images import CachedGuest
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.status import StopReason
from tetrarch.remote import RemoteMachine
from tetrarch.testing import pvh_kernel

LIMIT_S = 120
PROMPT = "root@tetrarch:~# "


@pytest.fixture(scope="module")
def recorded(
    debian_guest: CachedGuest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A recording, and the address of a function in its kernel."""
    recording = tmp_path_factory.mktemp("recorded") / "recording"
    with Machine(engine="bt", record=recording, memory="256M") as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send("grep ' T do_exit$' /proc/kallsyms; for n in 1 2 3; do sh -c :; done\n")
        said = vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
    found = re.search(r"([0-9a-f]{16}) T do_exit", said)
    assert found is not None, said
    return recording, int(found[1], 16)


def is_now(vm: Machine) -> tuple[dict[str, int], str]:
    """Registers and memory."""
    memory = hashlib.sha256(vm.read_memory(0, 640 << 10))
    memory.update(vm.read_memory(1 << 20, 255 << 20))
    return dict(vm.vcpus[0].regs), memory.hexdigest()


def goes_on_to_its_end(vm: Machine) -> None:
    vm.resume()
    status = vm.wait(LIMIT_S)
    assert (status.reason, status.detail) == (StopReason.STOPPED, "the recording ends")
    assert vm.recording is not None
    assert vm.recording.kind == "replayed"


def test_a_replay_goes_to_any_count_and_back(recorded: tuple[Path, int]) -> None:
    recording, _ = recorded
    with Machine(replay=recording) as vm:
        vm.start()
        assert vm.replay.goto((1 << 64) - 1) == "end"
        end = vm.replay.count
        assert end > 1 << 30
        shown = vm.console.text
        assert PROMPT not in shown, "what is said on the way is not shown"
        counts = sorted(random.Random(7).sample(range(end), 5))
        before = {}
        for count in counts:
            assert vm.replay.goto(count) == "here"
            assert vm.replay.count == count
            before[count] = is_now(vm)
        for count in reversed(counts):
            vm.replay.goto(count)
            assert is_now(vm) == before[count]
        vm.replay.goto(0)
        assert vm.replay.count == 0
        goes_on_to_its_end(vm)
        assert PROMPT in vm.console.text


def test_breakpoints_change_nothing_and_are_met_at_the_same_counts(
    recorded: tuple[Path, int],
) -> None:
    recording, function = recorded
    met: list[int] = []
    with Machine(replay=recording) as vm:
        view = vm.replay
        vm.breakpoint(function, lambda hit: met.append(view.count))
        vm.start()
        status = vm.wait(LIMIT_S)
        assert status.detail == "the recording ends"
        assert vm.recording is not None
        assert vm.recording.kind == "replayed"
    assert len(met) > 3
    with Machine(replay=recording) as vm:
        vm.start()
        for count in (met[-1], met[0]):
            assert vm.replay.goto(count) == "here"
            assert vm.vcpus[0].regs.rip == function
        goes_on_to_its_end(vm)
    with Machine(replay=recording) as vm:
        again = vm.breakpoint(function, lambda hit: None)
        vm.start()
        vm.replay.goto(met[-1])
        # With a breakpoint that stays, too, the machine ends where its recording does.
        goes_on_to_its_end(vm)
        assert again.hits >= 1


def test_from_another_process(recorded: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    recording, _ = recorded
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        started = tetrarch_cli("run", "--detach", "--name", "again", "--replay", recording)
        assert started.returncode == 0, started.stderr
        vm = tetrarch.connect("again")
        assert vm.replay.goto(12345) == "here"
        assert vm.phase is Phase.PAUSED
        first = dict(vm.vcpus[0].regs)
        assert vm.replay.goto(1 << 60) == "end"
        told = {"mode": "play", "filename": str(recording), "icount": vm.replay.count}
        assert vm.execute("query-replay") == told
        assert vm.replay.goto(12345) == "here"
        assert dict(vm.vcpus[0].regs) == first
        with pytest.raises(ControlError, match="-5 is no count"):
            vm.execute("replay-seek", {"icount": -5})
        assert asyncio.run(there_and_back(vm)) == ("here", 54321, "here")
        with pytest.raises(EngineError, match="the machine replays"):
            vm.vcpus[0].regs.rax = 1
        # Nothing presses a button that its guest never hears: that would be 90 s.
        begun = time.monotonic()
        stopped = tetrarch_cli("stop", "again")
        assert (stopped.returncode, stopped.stderr) == (0, b"")
        assert time.monotonic() - begun < 60
        assert not vm.alive


async def there_and_back(vm: RemoteMachine) -> tuple[str, int, str]:
    replay = vm.aio.replay
    return await replay.goto(54321), await replay.count(), await replay.goto(12345)


def test_only_a_replay_of_another_process_has_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.ENDLESS_LOOP))
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        options = ("--kernel", kernel, "--engine", "bt", "--memory", "16M")
        started = tetrarch_cli("run", "--detach", "--name", "first", *options)
        assert started.returncode == 0, started.stderr
        vm = tetrarch.connect("first")
        try:
            with pytest.raises(MachineStateError, match="does not replay"):
                _ = vm.replay.count
        finally:
            vm.kill()


def test_only_a_replay_has_a_way(recorded: tuple[Path, int], debian_guest: CachedGuest) -> None:
    with Machine(engine="bt") as vm, pytest.raises(MachineStateError, match="does not replay"):
        _ = vm.replay
    with Machine(replay=recorded[0]) as vm:
        with pytest.raises(MachineStateError, match="has not been started"):
            vm.replay.goto(5)
        vm.start()
        with pytest.raises(ValueError, match="-1 is no count"):
            vm.replay.goto(-1)
        vm.kill()
        with pytest.raises(MachineStateError, match="has ended"):
            vm.replay.goto(5)
