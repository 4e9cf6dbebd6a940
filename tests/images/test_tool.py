"""Programs that are run end with us."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tetrarch.images import tool


def test_signal_while_a_program_starts_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)
            # It runs, and nobody has it yet.
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.run_tool(["sleep", "1000"], "sleeping")
    (process,) = started
    assert not Path(f"/proc/{process.pid}").exists()
    assert process.returncode == -signal.SIGTERM
