"""A Debian disk on the engine kvm, on a KVM that works: in QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host

from tetrarch.images.store import DiskStore

# An emulated CPU that has guests is slow: systemd starts in about five minutes on two idle CPUs.
BOOT_LIMIT_S = 3600
COMMAND_LIMIT_S = 1500

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_system_runs_and_commands_end_with_their_code(debian_disk: Path, tmp_path: Path) -> None:
    disk = DiskStore(debian_disk / "tetrarch/disks").find("web")
    assert disk is not None
    run = f"timeout {COMMAND_LIMIT_S} python3 -m tetrarch run web --engine kvm --"
    commands = (
        f"{run} systemctl is-system-running --wait",
        "echo outer: running $?",
        f"{run} sh -c 'cat /sys/block/vda/serial; ls /dev/kvm 2>&1; exit 7'",
        "echo outer: exit $?",
    )
    console = nested_host(tmp_path).boot("\n".join(commands), BOOT_LIMIT_S, disk=disk)
    assert "running\nouter: running 0\n" in console, console
    assert "outer: exit 7\n" in console, console
