"""The fuzz target of recordings: a real one with other bytes, under checksums that fit.

Its form is that of crates/journal/src/lib.rs; chunks are LZ4 blocks
(lz4, doc/lz4_Block_format.md), which are written without matches.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import tempfile
import zlib
from pathlib import Path

from tests.fuzz.input import Input
from tests.machine import guests

from tetrarch import Machine
from tetrarch._native import EngineError
from tetrarch.errors import TetrarchError
from tetrarch.testing import pvh_kernel

LIMIT_S = 5
MAGIC_BYTES = 8
HEAD = struct.Struct("<IIQ")


@functools.cache
def recorded() -> tuple[bytes, bytes, list[tuple[int, bytes]]]:
    """Its magic, its configuration, and each chunk: the count at its end, and what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        kernel, record = Path(folder, "kernel"), Path(folder, "record")
        kernel.write_bytes(pvh_kernel(guests.say(b"recorded") + guests.KEYBOARD_RESET))
        with Machine(kernel=kernel, engine="bt", memory="4M", console="none", record=record) as vm:
            vm.run(60)
        data = record.read_bytes()
    (length,) = struct.unpack_from("<I", data, MAGIC_BYTES)
    at = MAGIC_BYTES + 4 + length
    configuration, chunks = data[MAGIC_BYTES + 4 : at], []
    at += 4
    while at < len(data):
        packed, _, count = HEAD.unpack_from(data, at)
        at += HEAD.size + 8
        chunks.append((count, unpacked(data[at : at + packed])))
        at += packed
    return data[:MAGIC_BYTES], configuration, chunks


def unpacked(block: bytes) -> bytes:
    out, at = bytearray(), 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        if nibble == 15:
            while True:
                total, at = total + block[at], at + 1
                if block[at - 1] != 255:
                    break
        return total

    while at < len(block):
        token, at = block[at], at + 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at < len(block):
            back, at = block[at] | block[at + 1] << 8, at + 2
            for _ in range(length(token & 15) + 4):
                out.append(out[-back])
    return bytes(out)


def packed(data: bytes) -> bytes:
    """All literals."""
    if len(data) < 15:
        return bytes([len(data) << 4]) + data
    more, last = divmod(len(data) - 15, 255)
    return b"\xf0" + b"\xff" * more + bytes([last]) + data


def _changed(source: Input, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(source.number(1) % 8):
        # Most of a long one is RAM, which may hold anything.
        at = source.number(2) if source.number(1) % 2 else len(changed) - source.number(2) % 4096
        length = source.number(1) % 12
        changed[at : at + length] = source.bytes(length)
    return bytes(changed)


def recording(data: bytes) -> None:
    source = Input(data)
    magic, configuration, chunks = recorded()
    if source.number(1) % 4 == 0:
        configuration = _changed(source, configuration)
    made = magic + struct.pack("<I", len(configuration)) + configuration
    made += struct.pack("<I", zlib.crc32(configuration))
    for count, body in chunks:
        body = _changed(source, body)
        block = packed(body)
        if source.number(1) % 8 == 0:
            block = _changed(source, block)
        count = source.number(8) if source.number(1) % 8 == 0 else count
        head = HEAD.pack(len(block), len(body), count)
        made += head + struct.pack("<II", zlib.crc32(head), zlib.crc32(block)) + block
    made = made[: len(made) - source.number(2)] if source.number(1) % 8 == 0 else made
    with tempfile.NamedTemporaryFile() as file:
        file.write(made)
        file.flush()
        refused = contextlib.suppress(TetrarchError, EngineError)
        with refused, Machine(replay=file.name, console="none") as vm:
            vm.start()
            with contextlib.suppress(TimeoutError):
                vm.wait(LIMIT_S)
