"""The SMBIOS structures that firmware passes on to its operating system (DSP0134 3.0)."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["smbios_files"]

VENDOR: Final = "Tetrarch"
PRODUCT: Final = "Tetrarch PC"
MEMORY_END: Final = 127
#: Largest memory device that its 16-bit field of MiB can say (7.18.4).
DEVICE_MIB_MAX: Final = 0x7FFF
UNKNOWN: Final = 2
OTHER_ENCLOSURE: Final = 1


def smbios_files(memory_bytes: int) -> dict[str, bytes]:
    """``etc/smbios/...``: the structures, and an entry point of version 3 for them."""
    tables = b"".join(_structures(memory_bytes))
    anchor = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 0, 0, 1, 0, len(tables), 0))
    anchor[5] = -sum(anchor) & 0xFF
    return {"etc/smbios/smbios-tables": tables, "etc/smbios/smbios-anchor": bytes(anchor)}


def _structures(memory_bytes: int) -> list[bytes]:
    mib = memory_bytes >> 20
    size, more = (mib, 0) if mib < DEVICE_MIB_MAX else (DEVICE_MIB_MAX, mib)
    return [
        # System information (7.2), woken by a power switch.
        _structure(
            1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), 6, 0, 0), VENDOR, PRODUCT
        ),
        # System enclosure (7.4).
        _structure(
            3,
            0x300,
            struct.pack(
                "<BBBBBBBBBIBBBBB", 1, OTHER_ENCLOSURE, 0, 0, 0, 3, 3, 3, UNKNOWN, 0, 0, 0, 0, 0, 0
            ),
            VENDOR,
        ),
        # Physical memory array (7.17): on the system board, system memory, without correction.
        _structure(
            16, 0x1000, struct.pack("<BBBIHHQ", 3, 3, 3, 0x8000_0000, 0xFFFE, 1, memory_bytes)
        ),
        # Memory device (7.18).
        _structure(
            17,
            0x1100,
            struct.pack(
                "<HHHHHBBBBBHHBBBBBIHHHH",
                *(0x1000, 0xFFFE, 0xFFFF, 0xFFFF, size, 9, 0, 1, 0, 7, 0, 0, 2, 0, 0, 0, 0),
                *(more, 0, 0, 0, 0),
            ),
            "DIMM 0",
            VENDOR,
        ),
        # System boot information (7.33): no errors.
        _structure(32, 0x2000, bytes(7)),
        _structure(MEMORY_END, 0x7F00, b""),
    ]


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Header, fields, and strings each with a zero behind; two zeros are the end (6.1.3)."""
    text = b"".join(one.encode() + b"\0" for one in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"
