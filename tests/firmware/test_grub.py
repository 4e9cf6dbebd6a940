"""GRUB on a disc and on a disk, which loads Debian's kernel: the way of a PC."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tetrarch import Machine, StopReason
from tetrarch.images import CachedGuest
from tetrarch.machine.config import MachineOptions

# GRUB copies the kernel byte by byte, in code that engine bt interprets: a minute on an idle host.
LIMIT_S = 600
PROGRAMS = ("grub-mkrescue", "xorriso", "mformat")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2 * LIMIT_S),
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)) or not Path("/usr/lib/grub/i386-pc").exists(),
        reason="apt-get install grub-common grub-pc-bin xorriso mtools",
    ),
]

MENU = """
set timeout=0
linux /boot/vmlinuz console=ttyS0 quiet
initrd /boot/initrd.gz
boot
"""


@pytest.mark.parametrize("drive", ["cdrom", "disk"])
def test_grub_starts_linux(debian_guest: CachedGuest, tmp_path: Path, drive: str) -> None:
    boot = tmp_path / "tree" / "boot"
    (boot / "grub").mkdir(parents=True)
    shutil.copy(debian_guest.kernel, boot / "vmlinuz")
    shutil.copy(debian_guest.initrd, boot / "initrd.gz")
    (boot / "grub" / "grub.cfg").write_text(MENU)
    # It boots from a disc by El Torito, from a disk by its first sector.
    image = tmp_path / "grub.iso"
    subprocess.run(
        ["grub-mkrescue", "-o", image, tmp_path / "tree"], check=True, capture_output=True
    )
    options: MachineOptions = {"engine": "bt", "firmware": "seabios", "memory": "256M"}
    if drive == "cdrom":
        options["cdrom"] = image
    else:
        options["disk"] = f"{image},format=raw"
    with Machine(**options) as vm:
        vm.start()
        # SeaBIOS's console moves its cursor in the middle of words.
        assert "GRUB" in vm.console.expect("root@tetrarch:~# ", LIMIT_S)
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
