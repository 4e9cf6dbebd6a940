"""The default guest at its prompt, and file systems on disks of it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tetrarch import Machine, block

PROMPT = "root@tetrarch:~# "
LIMIT_S = 120
SIZE = 96 << 20

needs_ext4 = pytest.mark.skipif(
    shutil.which("mkfs.ext4") is None or shutil.which("debugfs") is None,
    reason="no mkfs.ext4 and debugfs: apt-get install e2fsprogs",
)


class Linux:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)

    def ask(self, command: str) -> str:
        """What a command says, which is to succeed."""
        self.machine.console.send(command + "; echo status $?\n")
        said = self.machine.console.expect(PROMPT, LIMIT_S)
        assert "status 0" in said, said
        return said

    def sha256(self, path: str) -> str:
        """Of a file as its disk has it."""
        said = self.ask(f"echo 3 > /proc/sys/vm/drop_caches; sha256sum < {path}")
        found = re.search(r"\b[0-9a-f]{64}\b", said)
        assert found, said
        return found[0]


def fill_and_trim(linux: Linux, device: str, path: Path) -> str:
    """Writes a file to a disk, and gives back what another took; gives the file's checksum."""
    linux.ask(f"mount -t ext4 /dev/{device} /mnt")
    linux.ask("dd if=/dev/urandom of=/mnt/data bs=64k count=300 && sync")
    written = linux.sha256("/mnt/data")
    linux.ask("cp /mnt/data /mnt/more && sync && rm /mnt/more && sync")
    allocated = block.info(path)["allocated"]
    linux.ask("fstrim -v /mnt && umount /mnt")
    assert block.info(path)["allocated"] < allocated - (10 << 20)
    return written


def save_busy(linux: Linux, device: str, saved: Path) -> None:
    """Saves a machine that writes to a disk, and leaves it paused: the disk is not to change."""
    machine = linux.machine
    linux.ask(f"mount -t ext4 /dev/{device} /mnt")
    machine.console.send("while :; do dd if=/dev/zero of=/mnt/x bs=64k count=50; sync; done &\n")
    machine.console.expect("records out", 60)
    for _ in range(10):
        with machine.paused():
            pass
    machine.pause()
    machine.save(saved)


def go_on_and_unmount(restored: Machine) -> None:
    """What ``save_busy`` has saved writes on, and then lets go of its disk."""
    restored.start()
    restored.console.send("kill %1; wait; echo kept > /mnt/y; umount /mnt; echo do''ne $?\n")
    restored.console.expect("done 0", 120)


def ext4(path: Path) -> Path:
    """A raw disk with a file system."""
    block.create(path, SIZE, image_format="raw")
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, timeout=60)
    return path


def check(path: Path) -> None:
    """Nothing is wrong with the file system, which was unmounted."""
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True, timeout=60)


def sha256_in(path: Path, name: str) -> str:
    """Of a file in the file system of an image."""
    found = subprocess.run(
        ["debugfs", "-R", f"cat {name}", path], check=True, capture_output=True, timeout=60
    )
    return hashlib.sha256(found.stdout).hexdigest()
