"""A small CD-ROM image: a few files in its root, by their own names.

The volume is that of ECMA-119 with a supplementary descriptor as the Joliet specification has it,
whose names are Unicode; the primary one has the same files under names of capitals.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

__all__ = ["iso_image"]

_SECTOR = 2048
#: ECMA-119, 6.2.1: the system area is before the descriptors.
_FIRST = 16
#: Two descriptors and their terminator, then two path tables each, then a directory each.
_TABLES = _FIRST + 3
_DIRECTORIES = _TABLES + 4
_DATA = _DIRECTORIES + 2
_DIRECTORY_FLAG = 2
#: Joliet: UCS-2, level 3.
_ESCAPE = b"%/E"
_NO_TIME = b"0" * 16 + b"\0"
#: The first of January 1980: a record has a time always.
_TIME = bytes([80, 1, 1, 0, 0, 0, 0])


def iso_image(files: Mapping[str, bytes], label: str) -> bytes:
    """An image with these files, named ``label`` (capitals, up to 16).

    The same files give the same bytes. Raises ValueError where they are too many for it.
    """
    extents: dict[str, tuple[int, int]] = {}
    at = _DATA
    for name, data in files.items():
        extents[name] = (at, len(data))
        at += -(-len(data) // _SECTOR)
    plain = {_plain(name): extent for name, extent in extents.items()}
    unicode = {f"{name};1".encode("utf-16-be"): extent for name, extent in extents.items()}
    out = bytearray(_FIRST * _SECTOR)
    out += _descriptor(1, label.encode("ascii"), b" ", _TABLES, _DIRECTORIES, at)
    out += _descriptor(
        2, label.encode("utf-16-be"), b"\0 ", _TABLES + 2, _DIRECTORIES + 1, at, _ESCAPE
    )
    out += _padded(b"\xffCD001\x01")
    for directory in (_DIRECTORIES, _DIRECTORIES + 1):
        for order in "<>":
            out += _padded(struct.pack(f"{order}BBIHBx", 1, 0, directory, 1, 0))
    for directory, names in ((_DIRECTORIES, plain), (_DIRECTORIES + 1, unicode)):
        out += _directory(directory, names)
    for data in files.values():
        out += _padded(data)
    return bytes(out)


def _plain(name: str) -> bytes:
    """ECMA-119, 7.5.1: capitals, digits and underscores, with one dot and a version."""
    return (re.sub(r"[^A-Z0-9_]", "_", name.upper()) + ".;1").encode("ascii")


def _descriptor(
    kind: int,
    label: bytes,
    space: bytes,
    tables: int,
    directory: int,
    size: int,
    escape: bytes = b"",
) -> bytes:
    """ECMA-119, 8.4 and 8.5."""

    def text(value: bytes, length: int) -> bytes:
        return value + (space * length)[: length - len(value)]

    out = struct.pack("B5sBB", kind, b"CD001", 1, 0)
    out += text(b"", 32) + text(label, 32) + bytes(8) + _both32(size)
    out += escape.ljust(32, b"\0") + _both16(1) + _both16(1) + _both16(_SECTOR)
    out += _both32(10)  # bytes of a path table
    out += struct.pack("<II", tables, 0) + struct.pack(">II", tables + 1, 0)
    out += _record(b"\0", (directory, _SECTOR), _DIRECTORY_FLAG)
    for length in (128, 128, 128, 128, 37, 37, 37):
        out += text(b"", length)
    out += _NO_TIME * 4 + b"\x01"
    return _padded(out)


def _directory(at: int, names: Mapping[bytes, tuple[int, int]]) -> bytes:
    own = (at, _SECTOR)
    out = _record(b"\0", own, _DIRECTORY_FLAG) + _record(b"\1", own, _DIRECTORY_FLAG)
    for name, extent in sorted(names.items()):
        out += _record(name, extent)
    if len(out) > _SECTOR:
        raise ValueError("too many files for one sector of a directory")
    return _padded(out)


def _record(name: bytes, extent: tuple[int, int], flags: int = 0) -> bytes:
    """ECMA-119, 9.1."""
    first, length = extent
    body = b"\0" + _both32(first) + _both32(length) + _TIME
    body += bytes([flags, 0, 0]) + _both16(1) + bytes([len(name)]) + name
    body += b"\0" * (len(name) % 2 == 0)
    return bytes([len(body) + 1]) + body


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _both32(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _SECTOR)
