"""Small initramfs archives around the host's static busybox."""

import shutil
from pathlib import Path

from tetrarch.images import Initramfs


def busybox() -> bytes:
    found = shutil.which("busybox")
    assert found is not None, "install busybox-static; make packages does it"
    return Path(found).read_bytes()


def shell_tree(script: str, program: bytes | None = None) -> Initramfs:
    """The first program is ``script``, with /proc, /sys and all of busybox's commands: of the
    host's busybox, or of another."""
    tree = Initramfs()
    for directory in ("dev", "proc", "sys", "tmp"):
        tree.directory(directory)
    tree.character_device("dev/console", 5, 1)
    tree.character_device("dev/null", 1, 3, 0o666)
    tree.file("bin/busybox", busybox() if program is None else program, 0o755)
    tree.symlink("bin/sh", "busybox")
    start = "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n"
    mounts = "mount -t proc proc /proc\nmount -t sysfs sys /sys\n"
    tree.file("init", f"{start}{mounts}{script}\n".encode(), 0o755)
    return tree
