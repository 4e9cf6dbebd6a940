"""Confinement on the engine kvm, on a KVM that works: in QEMU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host

from tetrarch.images import CachedGuest

# About a minute on two idle CPUs.
BOOT_LIMIT_S = 1800

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_confined_guest_uses_all_that_it_has(debian_guest: CachedGuest, tmp_path: Path) -> None:
    host = nested_host(tmp_path)
    programs = {
        "vmlinuz": debian_guest.kernel,
        "initrd": debian_guest.initrd,
        "jail_on_kvm.py": Path(__file__).with_name("jail_on_kvm.py"),
    }
    commands = f"timeout {BOOT_LIMIT_S - 600} python3 /suite/jail_on_kvm.py"
    console = host.boot(commands, BOOT_LIMIT_S, programs)
    for line in (
        "the disks have what was written",
        "a disk came and went",
        "and it was reset",
        "tetrarch: the guest powered off",
    ):
        assert line in console, console
    threads = re.findall(r"^thread (\S+) has seccomp (\d)$", console, re.MULTILINE)
    # Threads of Python, vCPUs' among them, have no name of their own before Python 3.14.
    assert {"tetrarch-io", "tetrarch-disk"} <= {name for name, _ in threads}, console
    assert len(threads) > 8, console
    assert {seccomp for _, seccomp in threads} == {"2"}, console
    assert "not jailed" not in console, console
