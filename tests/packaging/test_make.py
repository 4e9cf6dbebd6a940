"""What make adds to the program's own end."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("code", "made"), [(0, 0), (3, 2), (124, 2)])
def test_make_run_says_the_exit_code_that_it_cannot_hand_on(
    tmp_path: Path, code: int, made: int
) -> None:
    program = tmp_path / "tetrarch"
    program.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["make", "--silent", "--assume-old=setup", "run", f"BIN={tmp_path}", "ARGS=--memory 1G"],
        cwd=ROOT,
        # Not the outer make's jobs and variables.
        env={name: v for name, v in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (made, "run --engine bt --memory 1G\n")
    assert (f"exit code {code}" in done.stderr) == (code != 0)
