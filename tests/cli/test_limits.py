"""Where a limit of the process is too low for a machine, one line names the limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch.testing import pvh_kernel

MIB = 1 << 20


def run(kernel: Path, limit: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *("prlimit", limit, sys.executable, "-m", "tetrarch"),
            *("run", "--engine", "bt", "--kernel", kernel),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TETRARCH_DEBUG": "0"},
    )


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(pvh_kernel(guests.say(b"hello") + guests.POWER_OFF))
    return path


@pytest.mark.parametrize(
    ("limit", "mend"),
    [
        *((f"--as={size * MIB}", "ulimit -v") for size in (400, 600, 700, 800, 900, 1000)),
        *((f"--data={size * MIB}", "ulimit -d") for size in (40, 48, 64)),
        ("--sigpending=0", "ulimit -i"),
        ("--fsize=0", "ulimit -f"),
    ],
)
def test_limit_that_is_too_low_is_named(kernel: Path, limit: str, mend: str) -> None:
    done = run(kernel, limit)
    assert done.returncode == 1, done.stderr
    *start, line = done.stderr.splitlines()
    assert all("tetrarch: engine bt" in said for said in start)
    assert line.startswith("tetrarch: ")
    assert mend in line


# How many files Python and the core hold open is theirs: from the first number that is enough for
# Python itself to one that is enough for all.
@pytest.mark.parametrize("number", range(5, 12))
def test_limit_of_open_files_is_named_or_enough(kernel: Path, number: int) -> None:
    done = run(kernel, f"--nofile={number}")
    if done.returncode == 0:
        assert done.stdout == "hello"
        return
    assert done.returncode == 1
    assert "ulimit -n" in done.stderr.splitlines()[-1]
