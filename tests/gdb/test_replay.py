"""Stock gdb at a guest that lives again: it goes back as well as on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from tests.gdb.debuggee import attempt, build_kernel, gdb_script

from tetrarch import Machine
from tetrarch.machine.status import StopReason

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
