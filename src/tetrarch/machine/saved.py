"""A saved machine: RAM, then sections, each with name, version, length and CRC.

    header   a page: MAGIC, in which the last is the version of this form; u64 where the
             sections begin; u32 CRC-32 (zlib's) of the page, with zeros in its place
    RAM      whole pages, so that they can be mapped; the section "ram" says which they are
    section  u8 length of the name, the name, u16 version, u64 length of the body,
             u32 CRC-32 of the body and then of all that precedes it; the body

Numbers are little-endian. A section of a device or of the machine is JSON; those
of the engine are its own; "ram" is a table of runs of pages, each with its CRC
(crates/memory/src/image.rs). What is not in it is zero.

The file may be damaged or made by somebody else: every length is checked, and
nothing in it is more than data.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tetrarch._files import open_regular
from tetrarch._native import EngineError
from tetrarch.errors import HostError, StateError
from tetrarch.machine.engine_errors import engine_cause

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "SavedReader",
    "SavedWriter",
    "header",
    "open_saved",
    "read_ram",
]

MAGIC = b"TETRASV\x02"
HEADER_BYTES = 4096
_HEADER = struct.Struct("<8sQI")
_TAIL = struct.Struct("<HQI")
# The state of a device or a vCPU is a few KiB.
_BODY_BYTES_MAX = 16 << 20
_BUFFER = 1 << 16


def header(sections: int) -> bytes:
    """Of a file whose sections begin there."""
    page = _HEADER.pack(MAGIC, sections, 0).ljust(HEADER_BYTES, b"\0")
    return _HEADER.pack(MAGIC, sections, zlib.crc32(page)).ljust(HEADER_BYTES, b"\0")


class SavedWriter:
    """Writes RAM and then sections to a file, in the order of the calls."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises HostError for a file that is not empty, and for what is none."""
        found = os.fstat(file.fileno())
        # The header comes last, to the file's start.
        appends = fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_APPEND
        if not stat.S_ISREG(found.st_mode) or found.st_size or appends:
            raise HostError(
                "cannot save the machine: what was opened for it is no empty file that can be"
                " written anywhere",
                mend="open a new file, and not to append",
            )
        self._file = file
        self._sections = HEADER_BYTES
        file.write(bytes(HEADER_BYTES))

    def ram(self, vm: EngineVm, *, written: bool) -> bytes:
        """Writes the pages, before any section, or only those that were ``written`` since
        ``log_writes()``; gives their table."""
        self._file.flush()
        table, self._sections = vm.save_ram(self._file.fileno(), HEADER_BYTES, written=written)
        self._file.seek(self._sections)
        return table

    def end(self) -> None:
        """All is written: now the file is one."""
        self._file.seek(0)
        self._file.write(header(self._sections))
        self._file.flush()

    def section(self, name: str, version: int, body: bytes) -> None:
        label = name.encode()
        head = bytes([len(label)]) + label + struct.pack("<HQ", version, len(body))
        self._file.write(head + struct.pack("<I", zlib.crc32(head, zlib.crc32(body))))
        self._file.write(body)

    def json(self, name: str, version: int, value: object) -> None:
        self.section(name, version, json.dumps(value, separators=(",", ":")).encode())


class SavedReader:
    """Reads sections, in the order in which they were written."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self._file = file
        size = os.fstat(file.fileno()).st_size
        page = file.read(HEADER_BYTES)
        if page[: len(MAGIC)] != MAGIC:
            if page[: len(MAGIC) - 1] == MAGIC[:-1] and len(page) >= len(MAGIC):
                raise self.damaged(
                    f"is a saved machine of version {page[len(MAGIC) - 1]},"
                    f" this program reads {MAGIC[-1]}",
                    "restore it with the release that saved it",
                )
            raise self.damaged("is no saved machine", "name a file of snapshot or save()")
        if len(page) < HEADER_BYTES:
            raise self.damaged("is cut short")
        sections = _HEADER.unpack_from(page)[1]
        if page != header(sections):
            raise self.damaged("has a wrong checksum")
        if not HEADER_BYTES <= sections <= size:
            raise self.damaged("is cut short")
        file.seek(sections)
        self._left = size - sections

    @property
    def descriptor(self) -> int:
        return self._file.fileno()

    def json(self, name: str, version: int) -> Any:
        try:
            return json.loads(self.section(name, version))
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"has a section {name!r} that is no JSON") from error

    def section(self, name: str, version: int, limit: int = _BODY_BYTES_MAX) -> bytes:
        """The body of one, of so many bytes at most."""
        label = self._take(self._take(1)[0])
        if label != name.encode():
            raise self.damaged(f"has a section {label!r} where {name!r} is due")
        tail = self._take(_TAIL.size)
        found, length, crc = _TAIL.unpack(tail)
        if found != version:
            raise self.damaged(
                f"has version {found} of the section {name!r}, this program reads {version}",
                "restore it with the release that saved it",
            )
        if length > min(limit, self._left):
            raise self.damaged(
                "is cut short" if length > self._left else f"has a section {name!r} of absurd size"
            )
        body = self._take(length)
        head = bytes([len(label)]) + label + tail[: -struct.calcsize("<I")]
        if zlib.crc32(head, zlib.crc32(body)) != crc:
            raise self.damaged(f"has a section {name!r} with a wrong checksum")
        return body

    def end(self) -> None:
        if self._left:
            raise self.damaged("has more behind its end")

    def _take(self, length: int) -> bytes:
        data = self._file.read(length) if length <= self._left else b""
        if len(data) != length:
            raise self.damaged("is cut short")
        self._left -= length
        return data

    def damaged(self, cause: str, mend: str = "save the machine again") -> StateError:
        return StateError(f"{self.path} {cause}", mend=mend)


@contextmanager
def open_saved(path: Path) -> Iterator[SavedReader]:
    try:
        with os.fdopen(open_regular(path), "rb", buffering=_BUFFER) as file:
            yield SavedReader(file, path)
    except OSError as error:
        raise HostError(
            f"cannot read {path}: {error.strerror or error}", mend="name a file of save()"
        ) from error


def read_ram(vm: EngineVm, layers: Sequence[tuple[SavedReader, bytes]]) -> None:
    """Into RAM that is all zero, as that of a new machine: files and their tables, the first
    undermost. All checksums are right, or nothing is changed.

    Raises StateError.
    """
    try:
        vm.load_ram([(str(file.path), file.descriptor, table) for file, table in layers])
    except EngineError as error:
        raise StateError(engine_cause(error), mend="save the machine again") from error
