"""The default guest with programs of this host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tetrarch.images import CachedGuest, Initramfs

_COMPILE_S = 120


def initrd_with(
    guest: CachedGuest,
    programs: Sequence[str],
    folder: Path,
    scripts: Mapping[str, str] | None = None,
    static: Sequence[Path] = (),
) -> Path:
    """The guest's initramfs, and behind it one of the programs with the libraries that they load,
    of scripts by name, and of programs that need none.

    The kernel unpacks archives that follow each other into one tree (Documentation/
    driver-api/early-userspace/buffer-format.rst).
    """
    tree = Initramfs()
    for name in programs:
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"no {name} on this host: tools/test-packages long")
        tree.file(f"bin/{name}", Path(program).read_bytes(), 0o755)
        for library in _libraries(program):
            tree.file(library, Path(library).read_bytes(), 0o755)
    for name, text in (scripts or {}).items():
        tree.file(f"bin/{name}", text.encode(), 0o755)
    for path in static:
        tree.file(f"bin/{path.name}", path.read_bytes(), 0o755)
    both = folder / "initrd-with-programs.gz"
    both.write_bytes(guest.initrd.read_bytes() + tree.gzip())
    return both


def _libraries(program: str) -> list[str]:
    """Those that ldd(1) finds, the loader among them."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+) \(0x", said)


def compiled(source: Path, folder: Path) -> Path:
    """A program of one file in C, which needs no libraries."""
    program = folder / source.stem
    subprocess.run(["gcc", "-static", "-O2", "-o", program, source], check=True, timeout=_COMPILE_S)
    return program
