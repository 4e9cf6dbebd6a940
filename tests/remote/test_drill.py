"""Machines whose processes are killed at any point of their life, and many at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.machine import guests

import tetrarch
from tetrarch.registry import machines
from tetrarch.testing import pvh_kernel

LIMIT_S = 60
#: What a start takes here, twice over: kills fall on each part of it, and on what comes after.
LIFE_S = 2.0
MANY = 100
#: sti ; hlt ; jmp to it: nothing wakes it, and the host has its CPU for others.
SLEEP = bytes.fromhex("fb f4 ebfd")


@pytest.fixture
def place() -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setenv("TMPDIR", str(Path(folder) / "tmp"))
        (Path(folder) / "tmp").mkdir()
        yield Path(folder)
        for about in machines():
            tetrarch.connect(about.name).kill()


def start(place: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    kernel = place / "kernel"
    if not kernel.exists():  # others read it
        kernel.write_bytes(pvh_kernel(guests.say(b"ready") + SLEEP))
    command = [sys.executable, "-m", "tetrarch", "run", "--detach", "--name", name]
    return subprocess.Popen(
        [*command, "--engine", "bt", "--memory", "16M", "--kernel", str(kernel), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processes(place: Path) -> dict[int, str]:
    """Those with our directory in their environment, this one aside: machines, their children."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if str(place).encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text()
    return found


def kill_all(place: Path) -> None:
    """Until there is none, and none of them is on its way out."""
    deadline = time.monotonic() + LIMIT_S
    killed: set[int] = set()
    while (left := processes(place)) or any(map(lives, killed)):
        assert time.monotonic() < deadline, left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.005)


def lives(pid: int) -> bool:
    """A process that ends loses its memory, with it its environment, before its files, which its
    last thread has: the first may be a zombie by then."""
    states = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return any(state not in "ZX" for state in states)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.long)])
def test_process_killed_at_any_point_leaves_nothing(place: Path, rounds: int) -> None:
    moments = random.Random(rounds)
    control = place / "mine"
    for _ in range(rounds):
        starter = start(place, "web", "--control", str(control))
        time.sleep(moments.uniform(0, LIFE_S))
        kill_all(place)
        starter.wait(LIMIT_S)
        assert machines() == []
        assert list((place / "tetrarch").glob("machines/*")) == []
        assert not control.exists()
    # The name and the socket are free for one that lives.
    assert start(place, "web", "--control", str(control)).wait(LIMIT_S) == 0
    assert tetrarch.connect("web").phase == "running"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_machines_start_at_once_and_are_stopped(place: Path) -> None:
    starters = [start(place, f"vm{number}") for number in range(MANY)]
    assert [starter.wait(600) for starter in starters] == [0] * MANY
    found = machines()
    assert {about.name for about in found} == {f"vm{number}" for number in range(MANY)}
    assert len({about.pid for about in found}) == MANY
    names = [about.name for about in found]
    # They sleep for ever and do not hear the button.
    done = subprocess.run(
        [sys.executable, "-m", "tetrarch", "stop", "--grace", "1", *names],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0
    assert machines() == []
    assert list((place / "tetrarch" / "machines").iterdir()) == []
    assert processes(place) == {}
