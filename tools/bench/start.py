"""From the program's start to a guest's first words, and to the answer of one from a file.

What is measured is what a user waits for at a terminal: Python's start and imports are in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pexpect
from tools.bench.report import BenchError, describe_host, table, write_section

from tetrarch import Machine
from tetrarch.testing import pvh_kernel

HELP = "from the program's start to the guest's first byte, and to a restored shell's answer"

_PROMPT = "root@tetrarch:~# "
#: mov edx, 0x3f8 ; mov al, 'R' ; out dx, al ; jmp $
_FIRST_BYTE = bytes.fromhex("baf8030000 b052 ee ebfe")

#: What a row is called, and the seconds that are promised.
ROWS = {
    "run": ("`tetrarch run` to the guest's first byte", 0.15),
    "restore": ("`tetrarch run --restore`, 512 MiB, to a shell's answer", 0.3),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="of each; medians [15]")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for an answer [120]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        kernel, saved = Path(scratch, "kernel"), Path(scratch, "saved")
        kernel.write_bytes(pvh_kernel(_FIRST_BYTE))
        with Machine(engine="bt", memory="512M") as vm:
            vm.start()
            vm.console.expect(_PROMPT, arguments.timeout)
            vm.save(saved)
        for _ in range(arguments.rounds):
            found["run"].append(_first_byte(kernel, arguments.timeout))
            found["restore"].append(_answer(saved, arguments.timeout))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        text = _report(medians, found, arguments.rounds)
        print(text)
        write_section("start", text)
    return 0 if all(medians[name] <= most for name, (_, most) in ROWS.items()) else 1


def _first_byte(kernel: Path, timeout: float) -> float:
    command = ["run", "--engine", "bt", "--memory", "512M", "--kernel", str(kernel)]
    return _until(command, "R", timeout)


def _answer(saved: Path, timeout: float) -> float:
    # What is typed before the machine runs waits in the terminal.
    return _until(["run", "--restore", str(saved)], "42", timeout, typed="echo $((6 * 7))\n")


def _until(command: list[str], words: str, timeout: float, typed: str = "") -> float:
    begun = time.monotonic()
    child = pexpect.spawn(
        sys.executable, ["-m", "tetrarch", *command], timeout=timeout, encoding="utf-8", echo=False
    )
    try:
        child.expect_exact("leaves")
        if typed:
            child.send(typed)
        child.expect_exact(words)
        return time.monotonic() - begun
    except (pexpect.TIMEOUT, pexpect.EOF) as error:
        raise BenchError(f"tetrarch {' '.join(command)} did not go on: {child.before}") from error
    finally:
        child.close(force=True)


def _report(medians: dict[str, float], found: dict[str, list[float]], rounds: int) -> str:
    rows = [
        [what, f"{medians[name]:.3f}", f"{min(found[name]):.3f}", f"{most:g}"]
        for name, (what, most) in ROWS.items()
    ]
    return "\n".join(
        [
            "## Start",
            "",
            f"`python -m tools.bench start`: from the start of the program, in a terminal;"
            f" {rounds} rounds in turns.",
            "",
            table(["s", "median", "best", "promised"], rows),
            "",
            table(["", ""], [list(pair) for pair in describe_host()]),
        ]
    )
