"""Recordings of a whole Debian, each with its own times, interrupts and random numbers, live again
with the same memory and registers at every checkpoint.

TETRARCH_ROUNDS says how many.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.status import StopReason

ROUNDS = int(os.environ.get("TETRARCH_ROUNDS", "20"))
LIMIT_S = 900
PROMPT = "root@tetrarch:~# "


def live_again(recording: Path) -> str:
    """What the guest says, having met all checkpoints."""
    with Machine(replay=recording) as vm:
        status = vm.run(LIMIT_S)
        assert (status.reason, status.detail) == (StopReason.STOPPED, "the recording ends")
        end, text = vm.recording, vm.console.text
    assert end is not None
    assert end.kind == "replayed"
    assert end.count > 0
    return text


@pytest.mark.long
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_boot(debian_guest: CachedGuest, tmp_path: Path, number: int) -> None:
    recording = tmp_path / "recording"
    with Machine(engine="bt", record=recording) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        said = vm.console.text
    assert live_again(recording) == said
    recording.unlink()
