"""What SMBIOS says of the machine (DSP0134 3.0): in memory, where a kernel looks that starts
without firmware, or for firmware to pass on."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.boot.layout import SMBIOS_BASE, SMBIOS_END
from tetrarch.errors import ConfigError
from tetrarch.platforms.platform import SystemIdentity

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = ["place_smbios", "smbios_files"]

MEMORY_END: Final = 127
#: Of what stands for firmware where there is none.
FIRMWARE_VERSION: Final = "1"
FIRMWARE_DATE: Final = "01/01/2026"
#: Largest memory device that its 16-bit field of MiB can say (7.18.4).
DEVICE_MIB_MAX: Final = 0x7FFF
UNKNOWN: Final = 2
OTHER_ENCLOSURE: Final = 1
_ENTRY_BYTES: Final = 24


def smbios_files(memory_bytes: int, identity: SystemIdentity) -> dict[str, bytes]:
    """``etc/smbios/...`` of fw_cfg: the structures, and an entry point of version 3 for them."""
    tables = b"".join(_structures(memory_bytes, identity))
    return {
        "etc/smbios/smbios-tables": tables,
        "etc/smbios/smbios-anchor": _entry_point(0, len(tables)),
    }


def place_smbios(vm: EngineVm, memory_bytes: int, identity: SystemIdentity) -> None:
    """In the segment that a kernel searches for the entry point (5.2.2)."""
    tables = b"".join([_firmware(identity), *_structures(memory_bytes, identity)])
    at = SMBIOS_BASE + 32
    if at + len(tables) > SMBIOS_END:
        raise ConfigError("the platform's identity is too long", mend="shorten its texts")
    vm.write_memory(SMBIOS_BASE, _entry_point(at, len(tables)))
    vm.write_memory(at, tables)


def _entry_point(address: int, length: int) -> bytes:
    """Of version 3 (5.2.2)."""
    entry = bytearray(
        struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, _ENTRY_BYTES, 3, 0, 0, 1, 0, length, address)
    )
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry)


def _firmware(identity: SystemIdentity) -> bytes:
    """BIOS information (7.1), which firmware has of its own. Drivers are found by names that begin
    with it."""
    # Characteristics are not said (bit 3); in a virtual machine (byte 2, bit 4).
    body = struct.pack("<BBHBBQBBBBBB", 1, 2, 0xF000, 3, 0, 1 << 3, 0, 1 << 4, 0, 0, 0xFF, 0xFF)
    return _structure(0, 0, body, identity.vendor, FIRMWARE_VERSION, FIRMWARE_DATE)


def _structures(memory_bytes: int, identity: SystemIdentity) -> list[bytes]:
    mib = memory_bytes >> 20
    size, more = (mib, 0) if mib < DEVICE_MIB_MAX else (DEVICE_MIB_MAX, mib)
    # Strings are counted from 1, and 0 is none (6.1.3).
    texts = [identity.vendor, identity.product]
    numbers = []
    for text in (identity.version, identity.serial):
        if text:
            texts.append(text)
        numbers.append(len(texts) if text else 0)
    # The first fields are little-endian (7.2.1).
    uuid = bytes(16) if identity.uuid is None else identity.uuid.bytes_le
    return [
        # System information (7.2), woken by a power switch.
        _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, *numbers, uuid, 6, 0, 0), *texts),
        # System enclosure (7.4).
        _structure(
            3,
            0x300,
            struct.pack(
                "<BBBBBBBBBIBBBBB", 1, OTHER_ENCLOSURE, 0, 0, 0, 3, 3, 3, UNKNOWN, 0, 0, 0, 0, 0, 0
            ),
            identity.vendor,
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
            identity.vendor,
        ),
        # System boot information (7.33): no errors.
        _structure(32, 0x2000, bytes(7)),
        _structure(MEMORY_END, 0x7F00, b""),
    ]


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """Header, fields, and strings each with a zero behind; two zeros are the end (6.1.3)."""
    text = b"".join(one.encode() + b"\0" for one in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"
