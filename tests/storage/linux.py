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
