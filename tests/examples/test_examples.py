"""The programs of examples/ that no other test runs: they do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.examples import ROOT

from tetrarch.images import CachedGuest

LIMIT_S = 240


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (
            ["debugger.py"],
            "do_unlinkat(/tmp/one), from __x64_sys_unlink\n"
            "do_unlinkat(/tmp/two), from __x64_sys_unlink\n2 hits\n",
        ),
        (["two_machines.py"], "right answers\npowered-off powered-off\n"),
        (["-m", "pytest", "-q", "test_guest.py"], "1 passed"),
    ],
    ids=["debugger", "two-machines", "pytest"],
)
def test_example(words: list[str], printed: str, tmp_path: Path, debian_guest: CachedGuest) -> None:
    for name in ("debugger.py", "two_machines.py", "test_guest.py"):
        (tmp_path / name).write_text((ROOT / "examples" / name).read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, printed in done.stdout) == (0, True), done.stdout + done.stderr
