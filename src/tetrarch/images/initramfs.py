"""A writer for the initramfs format: a cpio archive of kind "newc", gzipped.

The format is that of the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst: per file a header of "070701" and thirteen numbers of eight
hexadecimal digits, the name with its NUL, padding to four bytes, the data,
padding to four bytes; at the end a file named "TRAILER!!!".

The same files give the same bytes: times are zero, owners are root, inode
numbers count up, and the gzip header carries no name and no time.
"""

from __future__ import annotations

import gzip
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Initramfs"]

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
# The header's file size is one 32-bit number.
_FILE_SIZE_MAX = 0xFFFF_FFFF
# Level 6 to 9 differ by one percent in size and by a factor of two in time.
_GZIP_LEVEL = 6


@dataclass(frozen=True)
class _Entry:
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Initramfs:
    """A file tree in memory. Parents of a path are made when they are missing."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, _Entry(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        if len(data) > _FILE_SIZE_MAX:
            raise ValueError(f"{path} is too large for an initramfs (4 GiB or more)")
        self._add(path, _Entry(stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        self._add(path, _Entry(stat.S_IFLNK | 0o777, os.fsencode(target)))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, _Entry(stat.S_IFCHR | mode, device=(major, minor)))

    def tree(self, source: Path) -> None:
        """Adds what lies under a host directory; device nodes and sockets are left out."""
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                self.symlink(name, str(path.readlink()))
            elif stat.S_ISDIR(status.st_mode):
                self.directory(name, mode)
            elif stat.S_ISREG(status.st_mode):
                self.file(name, path.read_bytes(), mode)

    def paths(self) -> list[str]:
        return sorted(self._entries)

    def cpio(self) -> bytes:
        """The archive, not compressed. A directory stands before what is in it."""
        out = bytearray()
        for inode, path in enumerate(self.paths(), start=1):
            _append(out, inode, path, self._entries[path])
        _append(out, 0, _TRAILER, _Entry(0))
        return bytes(out)

    def gzip(self) -> bytes:
        return gzip.compress(self.cpio(), compresslevel=_GZIP_LEVEL, mtime=0)

    def _add(self, path: str, entry: _Entry) -> None:
        clean = PurePosixPath(path.lstrip("/"))
        # A NUL ends a name; the trailer's name ends the archive.
        parts = clean.parts
        if parts == () or ".." in parts or "\0" in path or parts[0] == _TRAILER:
            raise ValueError(f"{path!r} names no file inside an initramfs")
        for parent in reversed(clean.parents[:-1]):
            self._entries.setdefault(str(parent), _Entry(stat.S_IFDIR | 0o755))
        self._entries[str(clean)] = entry


def _append(out: bytearray, inode: int, path: str, entry: _Entry) -> None:
    name = os.fsencode(path) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        0,  # owner
        0,  # group
        links,
        0,  # time of the last change
        len(entry.data),
        0,  # the file system's device, major and minor
        0,
        *entry.device,
        len(name),
        0,  # checksum: only of kind "070702"
    )
    out += _MAGIC + b"".join(b"%08X" % field for field in fields)
    out += name
    _pad(out)
    out += entry.data
    _pad(out)


def _pad(out: bytearray) -> None:
    out += b"\0" * (-len(out) % 4)
