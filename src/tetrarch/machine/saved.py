"""A saved machine: one file of sections, each with name, version, length and CRC.

    8 bytes  MAGIC, in which the last is the version of this form
    section  u8 length of the name, the name, u16 version, u64 length of the body,
             u32 CRC-32 (zlib's) of the body and then of all that precedes it; the body

Numbers are little-endian. A section of a device or of the machine is JSON; those
of the engine are its own; "ram" is sparse: runs of u64 address, u64 length and
that many bytes, up to a run of length 0. What is not in it is zero.

The file may be damaged or made by somebody else: every length is checked, and
nothing in it is more than data.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tetrarch._native import GuestMemoryError
from tetrarch.errors import HostError, StateError
from tetrarch.machine.new_file import new_file
from tetrarch.machine.ram import runs

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = [
    "MAGIC",
    "SavedReader",
    "SavedWriter",
    "SectionReader",
    "SectionWriter",
    "open_saved",
    "read_ram",
    "write_ram",
    "writing_saved",
]

MAGIC = b"TETRASV\x01"
_TAIL = struct.Struct("<HQI")
_RUN = struct.Struct("<QQ")
# The state of a device or a vCPU is a few KiB; a RAM section is read in pieces.
_BODY_BYTES_MAX = 16 << 20
_CHUNK = 1 << 20


class SavedWriter:
    """Writes sections to a file, in the order of the calls."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write(MAGIC)

    def section(self, name: str, version: int, body: bytes) -> None:
        with self.stream(name, version) as stream:
            stream.write(body)

    def json(self, name: str, version: int, value: object) -> None:
        self.section(name, version, json.dumps(value, separators=(",", ":")).encode())

    @contextmanager
    def stream(self, name: str, version: int) -> Iterator[SectionWriter]:
        """A section whose length is known when it ends."""
        label = name.encode()
        head = bytes([len(label)]) + label
        self._file.write(head)
        at = self._file.tell()
        self._file.write(_TAIL.pack(0, 0, 0))
        stream = SectionWriter(self._file)
        yield stream
        end = self._file.tell()
        head += struct.pack("<HQ", version, stream.length)
        self._file.seek(at)
        self._file.write(_TAIL.pack(version, stream.length, zlib.crc32(head, stream.crc)))
        self._file.seek(end)


class SectionWriter:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length = 0
        self.crc = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.length += len(data)
        self.crc = zlib.crc32(data, self.crc)


class SavedReader:
    """Reads sections, in the order in which they were written."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = os.fstat(file.fileno()).st_size
        if self._take(len(MAGIC)) != MAGIC:
            raise self.damaged("is no saved machine of this version", "name a file of save()")

    def json(self, name: str, version: int) -> Any:
        try:
            return json.loads(self.section(name, version))
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"has a section {name!r} that is no JSON") from error

    def section(self, name: str, version: int) -> bytes:
        with self.stream(name, version) as stream:
            if stream.left > _BODY_BYTES_MAX:
                raise self.damaged(f"has a section {name!r} of absurd size")
            return stream.read(stream.left)

    @contextmanager
    def stream(self, name: str, version: int) -> Iterator[SectionReader]:
        """A section of any length. Its checksum is looked at when it has been read."""
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
        if length > self._left:
            raise self.damaged("is cut short")
        stream = SectionReader(self, length)
        yield stream
        head = bytes([len(label)]) + label + tail[: -struct.calcsize("<I")]
        if stream.left or zlib.crc32(head, stream.crc) != crc:
            raise self.damaged(f"has a section {name!r} with a wrong checksum")

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
        return StateError(f"{self._path} {cause}", mend=mend)


class SectionReader:
    def __init__(self, reader: SavedReader, length: int) -> None:
        self._reader = reader
        self.left = length
        self.crc = 0

    def read(self, length: int) -> bytes:
        if length > self.left:
            raise self._reader.damaged("has a section that ends too early")
        data = self._reader._take(length)
        self.left -= length
        self.crc = zlib.crc32(data, self.crc)
        return data


@contextmanager
def writing_saved(path: Path) -> Iterator[SavedWriter]:
    """A saved machine that is at ``path`` when it is whole, and not before."""
    with new_file(path, "save the machine") as file:
        yield SavedWriter(file)


@contextmanager
def open_saved(path: Path) -> Iterator[SavedReader]:
    try:
        with path.open("rb", buffering=_CHUNK) as file:
            yield SavedReader(file, path)
    except OSError as error:
        raise HostError(
            f"cannot read {path}: {error.strerror or error}", mend="name a file of save()"
        ) from error


def write_ram(vm: EngineVm, writer: SavedWriter) -> None:
    with writer.stream("ram", 1) as stream:
        for base, length in vm.ram:
            for address, data in runs(vm, base, length):
                stream.write(_RUN.pack(address, len(data)))
                stream.write(data)
        stream.write(_RUN.pack(0, 0))


def read_ram(vm: EngineVm, reader: SavedReader) -> None:
    """Into RAM that is all zero, as that of a new machine."""
    with reader.stream("ram", 1) as stream:
        while True:
            address, length = _RUN.unpack(stream.read(_RUN.size))
            if not length:
                break
            if length > _CHUNK:
                raise reader.damaged("has a run of RAM of absurd size")
            try:
                vm.write_memory(address, stream.read(length))
            except GuestMemoryError as error:
                raise reader.damaged("has RAM where the machine has none") from error
