"""The guest's memory map: one table, told to kernels in each protocol's format."""

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from tetrarch.boot.layout import EBDA_BASE, HIGH_MEMORY
from tetrarch.machine import map as machine_map

__all__ = ["E820Entry", "E820Type", "memory_map", "pack_e820", "pack_pvh"]


class E820Type(IntEnum):
    """ACPI 6.5, table 15.4: address range types."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4


class E820Entry(NamedTuple):
    address: int
    length: int
    type: E820Type


def memory_map(ram: Iterable[tuple[int, int]]) -> list[E820Entry]:
    """The map of a PC with these RAM ranges, by ascending address."""
    entries: list[E820Entry] = []
    for base, length in sorted(ram):
        end = base + length
        if base < HIGH_MEMORY:
            if base < EBDA_BASE:
                conventional = min(end, EBDA_BASE) - base
                if conventional > 0:
                    entries.append(E820Entry(base, conventional, E820Type.RAM))
            base = HIGH_MEMORY
        if end > base:
            entries.append(E820Entry(base, end - base, E820Type.RAM))
    # EBDA, the VGA window and the firmware area, where the ACPI tables lie, whether or not RAM
    # is behind them: a kernel must take none of it as free memory.
    entries.append(E820Entry(EBDA_BASE, HIGH_MEMORY - EBDA_BASE, E820Type.RESERVED))
    # Where PCI configuration space is: Linux uses no ECAM that is not reserved
    # (arch/x86/pci/mmconfig-shared.c, pci_mmcfg_check_reserved).
    ecam, ecam_end = machine_map.ECAM
    entries.append(E820Entry(ecam, ecam_end - ecam, E820Type.RESERVED))
    return sorted(entries)


def pack_e820(entries: Iterable[E820Entry]) -> bytes:
    """As ``struct boot_e820_entry``: 20 bytes each."""
    return b"".join(struct.pack("<QQI", *entry) for entry in entries)


def pack_pvh(entries: Iterable[E820Entry]) -> bytes:
    """As ``struct hvm_memmap_table_entry``: 24 bytes each."""
    return b"".join(struct.pack("<QQII", *entry, 0) for entry in entries)
