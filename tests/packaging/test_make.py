"""What make builds anew, and what it adds to the program's own end."""

import os
import shutil
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


def test_what_changed_is_built_anew_whatever_its_time(tmp_path: Path) -> None:
    """As in a copied tree, where a source may be older than what an older one became."""
    (tmp_path / "tools").mkdir()
    script = shutil.copy2(ROOT / "tools" / "touch-changed", tmp_path / "tools")
    names = ["same.rs", "changed.rs", "new file.rs"]
    old = 1_600_000_000

    def touched(names: list[str]) -> list[str]:
        for name in names:
            os.utime(tmp_path / name, (old, old))
        subprocess.run([script, *names], check=True, cwd=tmp_path.parent, timeout=60)
        return [name for name in names if (tmp_path / name).stat().st_mtime > old]

    for name in names:
        (tmp_path / name).write_text(f"// {name}\n")
    assert touched(names[:2]) == names[:2]  # nobody knows what they were
    assert touched(names[:2]) == []
    (tmp_path / "changed.rs").write_text("// another\n")
    assert touched(names) == names[1:]
    assert touched(names) == []
