"""Recordings of a whole Debian, at its boot and under load, each with its own times, interrupts and
random numbers, live again with the same memory and registers at every checkpoint.

TETRARCH_ROUNDS says how many.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.programs import initrd_with

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.status import StopReason

ROUNDS = int(os.environ.get("TETRARCH_ROUNDS", "20"))
LIMIT_S = 900
PROMPT = "root@tetrarch:~# "
STRESS = (
    "stress-ng --temp-path /tmp --verify --timeout 30 --cpu 1 --vm 1 --vm-bytes 32M --matrix 1 "
    "--fp 1 --vecwide 1 --switch 1 --timer 1 --pipe 1 --fork 1 --lockbus 1 --str 1"
)


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


@pytest.mark.long
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_stress(debian_guest: CachedGuest, tmp_path: Path, number: int) -> None:
    recording = tmp_path / "recording"
    initrd = initrd_with(debian_guest, ["stress-ng"], tmp_path)
    with Machine(engine="bt", initrd=initrd, memory="512M", record=recording) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        vm.console.send(f"{STRESS}; echo ends with $?\n")
        said = vm.console.expect("ends with 0\r\n", LIMIT_S)
        assert "successful run completed" in said
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        said = vm.console.text
    assert live_again(recording) == said
    recording.unlink()
