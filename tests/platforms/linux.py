"""A Linux on a platform: what its shell says, and that it lives again."""

from __future__ import annotations

from pathlib import Path

from tetrarch import Machine
from tetrarch.platforms.named import PlatformName

__all__ = ["PATIENCE", "PROMPT", "lives_again", "said"]

PROMPT = "root@tetrarch"
PATIENCE = 120.0


def said(vm: Machine, command: str) -> str:
    """What a command prints, between two marks that its echo does not have."""
    vm.console.send(f"echo BEG''IN; {command}; echo EN''D\n")
    vm.console.expect("BEGIN", PATIENCE)
    return vm.console.expect("END", PATIENCE).rpartition("END")[0].strip()


def lives_again(platform: PlatformName, recording: Path) -> bool:
    """Whether the default guest, recorded until it switches itself off, is replayed to its end."""
    with Machine(engine="bt", platform=platform, rng=False, balloon=False, record=recording) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        vm.console.send("sleep 1; poweroff\n")
        vm.wait(PATIENCE)
    with Machine(replay=recording) as vm:
        vm.start()
        vm.wait(PATIENCE)
        return vm.recording is not None and vm.recording.kind == "replayed"
