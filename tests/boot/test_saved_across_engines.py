"""What engine bt saved goes on on engine kvm, and back, on a KVM that works: in QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host

from tetrarch import images

# The translator and its code are emulated as well.
BOOT_LIMIT_S = 2700

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_every_device_goes_on_on_the_other_engine(tmp_path: Path) -> None:
    # Debian's kernel for machines has drivers of all of them.
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    programs = {
        "vmlinuz": guest.kernel,
        "initrd": guest.initrd,
        "saved_devices.py": Path(__file__).with_name("saved_devices.py"),
    }
    command = f"timeout {BOOT_LIMIT_S - 300} python3 /suite/saved_devices.py"
    console = nested_host(tmp_path).boot(command, BOOT_LIMIT_S, programs)
    for line in ("saved on bt", "goes on on kvm, and saved there", "goes on on bt"):
        assert f"outer: {line}\n" in console, console
