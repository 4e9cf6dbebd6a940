"""Stock gdb at a guest that lives again: it goes back as well as on."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.gdb.debuggee import attempt, build_kernel, gdb_script

from tetrarch import Machine
from tetrarch.gdb.packets import PacketReader, frame
from tetrarch.machine.status import StopReason
from tetrarch.testing import pvh_kernel

LIMIT_S = 120


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The kernel, and a recording of it."""
    folder = tmp_path_factory.mktemp("recorded")
    kernel, recording = build_kernel(folder), folder / "recording"
    options = {"kernel": kernel, "memory": "64M", "engine": "bt", "record": recording}
    with Machine(console="none", **options) as vm:  # type: ignore[arg-type]
        vm.start()
        time.sleep(0.3)
    return kernel, recording


def debugged(recorded: tuple[Path, Path], script: str) -> str:
    """What gdb says; then the replay goes on to its end, and is what was recorded."""
    kernel, recording = recorded
    with Machine(replay=recording, console="none", gdb=0, gdb_wait=True) as vm:
        assert vm.gdb is not None
        vm.start()
        said = gdb_script(script, vm.gdb.address, kernel)
        status = vm.wait(LIMIT_S)
        assert (status.reason, status.detail) == (StopReason.STOPPED, "the recording ends")
    return said


def test_back_from_breakpoint_to_breakpoint(recorded: tuple[Path, Path]) -> None:
    said = debugged(
        recorded,
        """
        break add
        continue
        continue
        continue
        printf "third: %d\\n", counter
        reverse-continue
        printf "second: %d\\n", counter
        reverse-continue
        printf "first: %d\\n", counter
        reverse-continue
        printf "at the start: %d\\n", counter
        continue
        printf "first again: %d\\n", counter
        delete
        detach
        """,
    )
    counts = dict(re.findall(r"^([a-z ]+): (\d+)$", said, re.MULTILINE))
    third = {"third": "2", "second": "1", "first": "0"}
    assert counts == {**third, "at the start": "0", "first again": "0"}
    assert "No more reverse-execution history." in said


def test_steps_back_are_the_steps_before(recorded: tuple[Path, Path]) -> None:
    where = '%#lx %#lx\\n", $rip, $rsp\n'
    on_and_back = [f'printf "on: {where}stepi\n'] * 12
    on_and_back += [f'reverse-stepi\nprintf "back: {where}'] * 12
    script = "break work\ncontinue\ncontinue\ndelete\n" + "".join(on_and_back) + "detach"
    said = debugged(recorded, script)
    on, back = (re.findall(rf"^{way}: (.*)$", said, re.MULTILINE) for way in ("on", "back"))
    assert len(on) == 12
    assert back == on[::-1]


def test_who_wrote_it_last(recorded: tuple[Path, Path]) -> None:
    said = debugged(
        recorded,
        """
        break work if counter == 5
        continue
        delete
        watch counter
        reverse-continue
        printf "before it was written: %d\\n", counter
        reverse-continue
        printf "and before that: %d\\n", counter
        delete
        detach
        """,
    )
    assert re.search(r"Hardware watchpoint 2: counter\s+Old value = 5\s+New value = 4", said), said
    assert "before it was written: 4" in said
    assert "and before that: 3" in said
    assert "in work (" in said or "work (amount=1)" in said


def test_back_by_lines_and_out_of_a_function(recorded: tuple[Path, Path]) -> None:
    said = debugged(
        recorded,
        """
        break add
        continue
        delete
        reverse-finish
        printf "before the call: %d\\n", $rip > (long)&work && $rip < (long)&main
        break work
        reverse-continue
        delete
        next
        set var $after = $rip
        reverse-step
        reverse-step
        printf "into what was called: %d\\n", $rip > (long)&add && $rip < (long)&work
        reverse-finish
        printf "and out, before it: %d\\n", $rip > (long)&work && $rip < $after
        detach
        """,
    )
    assert "before the call: 1" in said, said
    assert "into what was called: 1" in said, said
    assert "and out, before it: 1" in said, said


def test_the_end_stands_and_nothing_is_written(recorded: tuple[Path, Path]) -> None:
    said = debugged(
        recorded,
        f"""
        continue
        printf "at the end: %d\\n", counter > 100
        {attempt("set var counter = 3")}
        {attempt("set var $rax = 3")}
        reverse-stepi
        detach
        """,
    )
    assert "No more reverse-execution history." in said
    assert "at the end: 1" in said
    assert said.count("refused:") == 2, said


#: Writes to WRITTEN once in ROUND instructions:
#: mov $WRITTEN, %ebx ; 1: incl (%ebx) ; mov $0x400000, %ecx ; 2: dec %ecx ; jnz 2b ; jmp 1b
WRITTEN, ROUND = 0x200000, (1 << 23) + 3
SELDOM = bytes.fromhex("bb00002000 ff03 b900004000 49 75fd ebf4")
#: Its INC; code is at 1 MiB.
AT_WRITE = 0x100005


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 100 writes and more."""
    folder = tmp_path_factory.mktemp("seldom")
    kernel, recording = folder / "kernel", folder / "recording"
    kernel.write_bytes(pvh_kernel(SELDOM))
    with Machine(kernel=kernel, memory="16M", engine="bt", console="none", record=recording) as vm:
        vm.start()
        deadline = time.monotonic() + LIMIT_S
        while int.from_bytes(vm.memory[WRITTEN : WRITTEN + 4], "little") < 100:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return recording


class Gdb:
    """At a machine that replays and stands at a count."""

    def __init__(self, vm: Machine, stream: socket.socket) -> None:
        self.vm = vm
        self._stream = stream
        self._reader = PacketReader()

    def ask(self, packet: str) -> str:
        self._stream.sendall(frame(packet.encode()))
        while True:
            for found in self._reader.feed(self._stream.recv(4096)):
                assert isinstance(found, bytes)
                self._stream.sendall(b"+")
                return found.decode()


@contextmanager
def gdb_at(recording: Path, count: int) -> Iterator[Gdb]:
    with Machine(replay=recording, console="none") as vm:
        vm.start()
        vm.replay.goto(count)
        host, port = vm.serve_gdb().address.split(":")
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as stream:
            gdb = Gdb(vm, stream)
            assert gdb.ask("?").startswith("T05")
            vm.resume()  # gdb alone holds it
            yield gdb


def write_number(number: int) -> int:
    """The count before it."""
    return 1 + number * ROUND


def test_the_way_to_a_count_is_translated_whatever_interrupts_it(seldom: Path) -> None:
    for _ in range(20):
        with Machine(replay=seldom, console="none") as vm:
            vm.start()
            assert vm.replay.goto(write_number(3)) == "here"
            assert vm.replay.count == write_number(3)
            assert vm.stats()["bt"]["interpreted"] < 10_000


def test_a_write_near_by_is_found_without_interpreting_all_that_was_before(seldom: Path) -> None:
    with gdb_at(seldom, write_number(60) + 1000) as gdb:
        assert gdb.ask(f"Z2,{WRITTEN:x},4") == "OK"
        before = gdb.vm.stats()["bt"]["interpreted"]
        for number in (60, 59):
            assert gdb.ask("bc") == f"T05thread:01;watch:{WRITTEN:x};"
            assert gdb.vm.replay.count == write_number(number)
        interpreted = gdb.vm.stats()["bt"]["interpreted"] - before
        # The image before it is the recording's start, which is 60 rounds away.
        assert ROUND < interpreted < 5 * ROUND, interpreted
        before += interpreted
        assert gdb.ask("bs").startswith("T05")
        assert gdb.vm.replay.count == write_number(59) - 1
        assert gdb.vm.stats()["bt"]["interpreted"] - before < ROUND


@pytest.mark.parametrize("before", [1, 1 << 22, (1 << 22) - 1, (1 << 22) + 1])
def test_a_breakpoint_is_met_wherever_a_watchpoint_is_looked_for(seldom: Path, before: int) -> None:
    with gdb_at(seldom, write_number(60) + before) as gdb:
        assert gdb.ask("Z2,300000,4") == "OK"
        assert gdb.ask(f"Z0,{AT_WRITE:x},1") == "OK"
        assert gdb.ask("bc").startswith("T05thread:01;")
        assert gdb.vm.replay.count == write_number(60)


def test_back_to_the_start_where_a_watchpoint_is_not_met(seldom: Path) -> None:
    with gdb_at(seldom, write_number(2)) as gdb:
        assert gdb.ask("Z2,300000,4") == "OK"
        assert gdb.ask("bc") == "T05thread:01;replaylog:begin;"
        assert gdb.vm.replay.count == 0
