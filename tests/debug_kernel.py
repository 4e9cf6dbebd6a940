"""Debian's debug symbols of the default guest's kernel, and the kernel's own scripts for gdb."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import pytest

from tetrarch.images import Cache, CachedGuest
from tetrarch.images.archive import Archive

_UNPACK_LIMIT_S: Final = 300


@dataclass(frozen=True)
class DebugKernel:
    """In the cache of the tests: 0.6 GB of 0.4 GB that are fetched once."""

    vmlinux: Path
    scripts: Path
    """Linux's scripts/gdb; what of them needs no constants of a built tree works."""


def debug_kernel(guest: CachedGuest) -> DebugKernel:
    """That of the guest's kernel. Skips where the archive has another version by now."""
    cache = Cache()
    release, version = guest.manifest.release, guest.manifest.version
    base = cache.root / "tests" / f"debug-{release}-{version}"
    found = DebugKernel(base / "vmlinux", base / "scripts")
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.vmlinux.exists():
            symbols = _fetch(cache, base, f"linux-image-{release}-dbg", version)
            _extract(symbols, f"./usr/lib/debug/boot/vmlinux-{release}", base / "vmlinux.new")
            symbols.unlink()
            (base / "vmlinux.new").rename(found.vmlinux)
        if not found.scripts.exists():
            series = ".".join(version.split(".")[:2])
            source = _fetch(cache, base, f"linux-source-{series}", version)
            archive = base / "source.tar.xz"
            _extract(source, f"./usr/src/linux-source-{series}.tar.xz", archive)
            source.unlink()
            inside = f"linux-source-{series}/scripts/gdb"
            _run("tar", "-C", str(base), "-xJf", str(archive), inside)
            archive.unlink()
            (base / inside).rename(found.scripts)
            shutil.rmtree(base / f"linux-source-{series}")
    return found


def _fetch(cache: Cache, directory: Path, name: str, version: str) -> Path:
    archive = Archive(cache.apt)
    package = archive.resolve(name)
    if package.version != version:
        pytest.skip(f"the archive has {name} {package.version}, the cached kernel is {version}")
    return archive.download(package, directory, lambda so_far, size: None)


def _extract(package: Path, member: str, target: Path) -> None:
    """One file of a Debian package."""
    with target.open("wb") as file:
        command = 'dpkg-deb --fsys-tarfile "$1" | tar -xO -f - "$2"'
        _run("sh", "-c", command, "sh", str(package), member, output=file)


def _run(*command: str, output: IO[bytes] | None = None) -> None:
    subprocess.run(command, check=True, timeout=_UNPACK_LIMIT_S, stdout=output)
