"""The program in a process of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tetrarch
from tetrarch.registry import machines

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry of the test's own, in which nothing is left in the end."""
    # Paths of sockets fit there, as in a user's.
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        yield Path(place) / "tetrarch"
        for about in machines():
            tetrarch.connect(about.name).kill()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tetrarch", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "XDG_DATA_HOME": str(tmp_path / "data"),
                **environment,
            },
        )

    return run
