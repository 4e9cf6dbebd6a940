"""A system on a disk that the default guest's kernel and initramfs boot (root=)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.errors import ImageError
from tetrarch.images import CachedGuest
from tetrarch.images.partition import make_disk, partition_uuid
from tetrarch.images.tool import find_tool
from tetrarch.images.tree import Tree

LIMIT_S = 120
MIB = 1 << 20
INIT = b"""#!/bin/busybox sh
/bin/busybox echo "pid $$, $(/bin/busybox cat /etc/motto)"
/bin/busybox grep -o '^isofs ' /proc/modules
/bin/busybox grep ' / ' /proc/mounts
/bin/busybox ls /dev/vdb1
/bin/busybox poweroff -f
"""


@pytest.fixture
def disk(debian_guest: CachedGuest, tmp_path: Path) -> Path:
    """Its init tells what it finds. The first disk has no system."""
    for program in ("mke2fs", "debugfs", "sfdisk"):
        try:
            find_tool(program, program)
        except ImageError:
            pytest.skip(f"needs {program} (Debian: e2fsprogs, fdisk)")
    (tmp_path / "files").mkdir()
    tree = Tree(tmp_path / "files")
    tree.add_file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    tree.add_file("sbin/init", INIT, 0o755)
    tree.add_file("etc/motto", b"on a disk")
    for folder in ("proc", "sys", "dev", "run"):
        tree.add_directory(folder)
    make_disk(tree, tmp_path / "disk.raw", 64 * MIB, "web", 1_700_000_000)
    return tmp_path / "disk.raw"


@pytest.mark.parametrize(
    "root", ["auto", "/dev/vdb1", "LABEL=root", f"UUID={partition_uuid('web', 'root')}"]
)
def test_system_on_a_disk_is_found_and_goes_on(
    debian_guest: CachedGuest, disk: Path, tmp_path: Path, root: str
) -> None:
    (tmp_path / "empty").write_bytes(bytes(MIB))
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=[tmp_path / "empty", disk],
        append_extra=f"root={root} ro",
    ) as vm:
        vm.start()
        vm.console.expect(re.compile(r"pid 1, on a disk\s+isofs"), timeout=LIMIT_S)
        vm.console.expect(re.compile(r"/dev/(root|vdb1) / ext4 ro"), timeout=LIMIT_S)
        assert vm.wait(LIMIT_S).code == 0


def test_disk_without_a_system_is_told_and_a_shell_follows(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_bytes(bytes(MIB))
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=tmp_path / "empty",
        append_extra="root=auto",
    ) as vm:
        vm.start()
        vm.console.expect(
            re.compile(r"root=auto: no disk has a system with /sbin/init"), timeout=LIMIT_S
        )
        vm.console.expect("# ", timeout=LIMIT_S)
