"""An ISO 9660 image with one file (ECMA-119), made without a program for it."""

from __future__ import annotations

import struct
from pathlib import Path

BLOCK = 2048
ROOT_AT, FILE_AT = 20, 21


def _both(size: str, value: int) -> bytes:
    """A number in both orders of bytes (7.2.3, 7.3.3)."""
    return struct.pack(f"<{size}", value) + struct.pack(f">{size}", value)


def _record(name: bytes, at: int, length: int, *, folder: bool) -> bytes:
    """Directory record (9.1)."""
    body = b"\0" + _both("I", at) + _both("I", length) + bytes(7)
    body += bytes([2 if folder else 0, 0, 0]) + _both("H", 1) + bytes([len(name)]) + name
    body += b"" if len(name) % 2 else b"\0"
    return bytes([len(body) + 1]) + body


def make_iso(path: Path, name: str, data: bytes) -> Path:
    """``name`` is of capitals, as NAME.TXT."""
    root = _record(b"\0", ROOT_AT, BLOCK, folder=True)
    root += _record(b"\1", ROOT_AT, BLOCK, folder=True)
    root += _record(f"{name};1".encode(), FILE_AT, len(data), folder=False)
    blocks = FILE_AT + -(-len(data) // BLOCK)
    # Primary volume descriptor (8.4).
    volume = b"\1CD001\1\0" + b" " * 32 + b"TETRARCH".ljust(32) + bytes(8) + _both("I", blocks)
    volume += bytes(32) + _both("H", 1) + _both("H", 1) + _both("H", BLOCK)
    table = bytes([1, 0]) + struct.pack("<I", ROOT_AT) + struct.pack("<H", 1) + b"\0\0"
    table_big = bytes([1, 0]) + struct.pack(">I", ROOT_AT) + struct.pack(">H", 1) + b"\0\0"
    volume += _both("I", len(table)) + struct.pack("<II", 18, 0) + struct.pack(">II", 19, 0)
    volume += _record(b"\0", ROOT_AT, BLOCK, folder=True)
    volume = volume.ljust(881, b" ") + b"\1"
    image = bytearray(BLOCK * blocks)
    for at, content in (
        (16, volume),
        (17, b"\xffCD001\1"),
        (18, table),
        (19, table_big),
        (ROOT_AT, root),
        (FILE_AT, data),
    ):
        image[BLOCK * at : BLOCK * at + len(content)] = content
    path.write_bytes(image)
    return path
