"""ACPI tables as firmware takes them: files, and commands that put them into its memory.

The commands are QEMU's (hw/acpi/bios-linker-loader.c): allocate memory for a file, add the address
of one file to a pointer in another, and make a checksum anew.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from tetrarch.boot.layout import align_up

__all__ = ["acpi_files"]

TABLES: Final = "etc/acpi/tables"
RSDP: Final = "etc/acpi/rsdp"
LOADER: Final = "etc/table-loader"

ALLOCATE: Final = 1
ADD_POINTER: Final = 2
ADD_CHECKSUM: Final = 3
COMMAND_BYTES: Final = 128
HIGH_ZONE: Final = 1
#: Below 1 MiB, where an operating system looks for the RSDP.
LOW_ZONE: Final = 2

#: Pointers by the table that has them: offset and size (ACPI 6.5, 5.2.5 to 5.2.9). Those behind
#: the header of the XSDT are as many as it is long.
POINTERS: Final[Mapping[bytes, Sequence[tuple[int, int]]]] = {
    b"FACP": ((36, 4), (40, 4), (140, 8)),
    b"RSD ": ((24, 8),),
}
XSDT: Final = b"XSDT"
CHECKSUM: Final = 9
HEADER_BYTES: Final = 36


def acpi_files(rsdp: int, tables: Sequence[tuple[int, bytes]]) -> dict[str, bytes]:
    """The files for firmware, of what ``build_acpi`` gives."""
    rest = sorted((address, data) for address, data in tables if address != rsdp)
    base = rest[0][0]
    blob = bytearray(align_up(rest[-1][0] + len(rest[-1][1]) - base, 64))
    commands = [
        _allocate(RSDP, 16, LOW_ZONE),
        _allocate(TABLES, 64, HIGH_ZONE),
    ]
    for address, data in rest:
        at = address - base
        table = bytearray(data)
        pointers = _relative(table, base)
        blob[at : at + len(table)] = table
        commands += [_add_pointer(TABLES, TABLES, at + offset, size) for offset, size in pointers]
        if pointers:
            blob[at + CHECKSUM] = 0
            commands.append(_add_checksum(TABLES, at + CHECKSUM, at, len(table)))
    root = bytearray(next(data for address, data in tables if address == rsdp))
    commands += [_add_pointer(RSDP, TABLES, *pointer) for pointer in _relative(root, base)]
    for at, length in ((8, 20), (32, len(root))):
        root[at] = 0
        commands.append(_add_checksum(RSDP, at, 0, length))
    return {RSDP: bytes(root), TABLES: bytes(blob), LOADER: b"".join(commands)}


def _relative(table: bytearray, base: int) -> list[tuple[int, int]]:
    """Lets the table's pointers count from ``base``; which they are."""
    signature = bytes(table[:4])
    pointers = list(POINTERS.get(signature, ()))
    if signature == XSDT:
        pointers = [(offset, 8) for offset in range(HEADER_BYTES, len(table), 8)]
    for offset, size in pointers:
        place = slice(offset, offset + size)
        table[place] = (int.from_bytes(table[place], "little") - base).to_bytes(size, "little")
    return pointers


def _name(file: str) -> bytes:
    return file.encode().ljust(56, b"\0")


def _allocate(file: str, alignment: int, zone: int) -> bytes:
    return _command(ALLOCATE, _name(file) + struct.pack("<IB", alignment, zone))


def _add_pointer(file: str, to: str, offset: int, size: int) -> bytes:
    return _command(ADD_POINTER, _name(file) + _name(to) + struct.pack("<IB", offset, size))


def _add_checksum(file: str, at: int, start: int, length: int) -> bytes:
    return _command(ADD_CHECKSUM, _name(file) + struct.pack("<III", at, start, length))


def _command(number: int, body: bytes) -> bytes:
    return (number.to_bytes(4, "little") + body).ljust(COMMAND_BYTES, b"\0")
