"""A Linux guest in the background, started and stopped by the program."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tetrarch
from tetrarch.images import CachedGuest
from tetrarch.registry import machines
from tetrarch.remote import RemoteMachine

LIMIT_S = 120


def tetrarch_cli(*words: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "tetrarch", *map(str, words)],
        input=data,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="package")
def images_allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a disk for the guest may be."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="package")
def guest(debian_guest: CachedGuest, images_allowed: Path) -> Iterator[RemoteMachine]:
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as place,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_RUNTIME_DIR", place)
        files: list[str | Path] = ["--kernel", debian_guest.kernel]
        files += ["--initrd", debian_guest.initrd, "--allow", images_allowed]
        started = tetrarch_cli("run", "--detach", "--name", "web", "--engine", "bt", *files)
        assert started.returncode == 0, started.stderr
        vm = tetrarch.connect("web")
        yield vm
        # The last that it does: it switches itself off, asked by its power button.
        stopped = tetrarch_cli("stop", "--grace", str(LIMIT_S), "web")
        assert (stopped.returncode, stopped.stderr) == (0, b"")
        assert machines() == []
        assert b"the guest powered off" in tetrarch_cli("logs", "web").stdout
