"""SMBIOS in memory, as a kernel reads it that starts without firmware (DSP0134 3.0)."""

from __future__ import annotations

import struct
from typing import cast
from uuid import UUID

import pytest

from tetrarch.boot.layout import SMBIOS_BASE, SMBIOS_END
from tetrarch.boot.smbios import place_smbios
from tetrarch.errors import ConfigError
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.platforms import SystemIdentity

WORD = UUID("00112233-4455-6677-8899-aabbccddeeff")


class Segment:
    def __init__(self) -> None:
        self.memory = bytearray(SMBIOS_END - SMBIOS_BASE)

    def write_memory(self, address: int, data: bytes) -> None:
        assert SMBIOS_BASE <= address <= SMBIOS_END - len(data)
        at = address - SMBIOS_BASE
        self.memory[at : at + len(data)] = data


def read(identity: SystemIdentity) -> dict[int, tuple[bytes, list[str]]]:
    """The structures by their types: fields, and strings."""
    segment = Segment()
    place_smbios(cast(EngineVm, segment), 1 << 30, identity)
    entry = bytes(segment.memory[:24])
    assert (SMBIOS_BASE % 16, entry[:5], sum(entry) & 0xFF) == (0, b"_SM3_", 0)
    length, address = struct.unpack("<IQ", entry[12:24])
    at = address - SMBIOS_BASE
    table = bytes(segment.memory[at : at + length])
    found = {}
    while table:
        size = table[1]
        text, _, rest = table[size:].partition(b"\0\0")
        found[table[0]] = table[:size], [word.decode() for word in text.split(b"\0") if word]
        table = rest
    return found


def test_kernel_finds_who_the_machine_is() -> None:
    found = read(SystemIdentity("Maker", "Thing", serial="S-1", uuid=WORD))
    assert list(found) == [0, 1, 3, 16, 17, 32, 127]
    fields, words = found[1]
    assert words == ["Maker", "Thing", "S-1"]
    # Manufacturer, product, no version, serial number; the UUID's first fields are little-endian.
    assert tuple(fields[4:8]) == (1, 2, 0, 3)
    assert fields[8:24] == WORD.bytes_le
    assert found[0][1][0] == "Maker"  # names that drivers are found by begin with it
    assert struct.unpack("<H", found[17][0][12:14]) == (1024,)


def test_plain_machine_is_tetrarchs() -> None:
    fields, words = read(SystemIdentity())[1]
    assert words == ["Tetrarch", "Tetrarch PC"]
    assert (tuple(fields[4:8]), fields[8:24]) == ((1, 2, 0, 0), bytes(16))


def test_identity_that_finds_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="identity is too long; shorten its texts"):
        read(SystemIdentity(vendor="x" * 4096))
