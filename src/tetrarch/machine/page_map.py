"""What a guest in 64-bit mode has mapped, by its page tables (Intel SDM 3A, 4.5)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tetrarch._native import GuestMemoryError
from tetrarch.errors import ConfigError

__all__ = ["USER", "WRITE", "MappedRange", "TooManyTables", "mapped_ranges", "table_levels"]

#: A guest may build tables without end: so many are read, of a few seconds.
TABLES_MAX: Final = 20_000
#: Bits of ``rights``.
WRITE: Final = 1 << 1
USER: Final = 1 << 2
_PAGING, _LONG, _FIVE_LEVELS = 1 << 31, 1 << 10, 1 << 12
_PAGE: Final = 4096
_ENTRIES: Final = struct.Struct("<512Q")
_PRESENT, _LARGE = 1 << 0, 1 << 7
_ALL: Final = WRITE | USER
_LINEAR_MAX: Final = (1 << 64) - 1
_ADDRESS: Final = ((1 << 52) - 1) & ~0xFFF


class TooManyTables(Exception):
    """More of them than anybody wants to see."""


@dataclass(frozen=True)
class MappedRange:
    """Addresses that follow each other, linear and physical ones, with the same rights."""

    linear: int
    physical: int
    size: int
    rights: int

    @property
    def end(self) -> int:
        return self.linear + self.size

    @property
    def physical_end(self) -> int:
        return self.physical + self.size


def table_levels(regs: Mapping[str, int]) -> int:
    """Of a vCPU's page tables: 4 or 5, 0 without paging. Raises ConfigError for those of 32-bit
    modes."""
    if not regs["cr0"] & _PAGING:
        return 0
    if not regs["efer"] & _LONG:
        raise ConfigError("the page tables of 64-bit mode alone are read", mend="do it there")
    return 5 if regs["cr4"] & _FIVE_LEVELS else 4


def mapped_ranges(
    read_memory: Callable[[int, int], bytes], root: int, levels: int
) -> Iterator[MappedRange]:
    """What tables map, by linear address; ``root`` is CR3.

    Raises TooManyTables behind the first ``TABLES_MAX``.
    """

    def read(address: int) -> bytes:
        try:
            return read_memory(address, _PAGE)
        except GuestMemoryError:
            return bytes(_PAGE)

    top = 1 << 11 + 9 * levels
    current: MappedRange | None = None
    for low, physical, size, rights in _pages(read, root & _ADDRESS, levels, 0, _ALL, [TABLES_MAX]):
        linear = low | -(low & top) & _LINEAR_MAX  # the highest bit goes on upwards (3.3.7.1)
        if current is not None:
            if (linear, physical, rights) == (current.end, current.physical_end, current.rights):
                size += current.size
                linear, physical = current.linear, current.physical
            else:
                yield current
        current = MappedRange(linear, physical, size, rights)
    if current is not None:
        yield current


def _pages(
    read: Callable[[int], bytes], table: int, level: int, base: int, rights: int, left: list[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Single pages, without the upper bits; ``left`` is how many tables may still be read."""
    if left[0] == 0:
        raise TooManyTables
    left[0] -= 1
    shift = 12 + 9 * (level - 1)
    for index, entry in enumerate(_ENTRIES.unpack(read(table))):
        if not entry & _PRESENT:
            continue
        address = base + (index << shift)
        allowed = rights & entry
        if level == 1 or (level <= 3 and entry & _LARGE):
            size = 1 << shift
            # Below the address of a large page lies its PAT bit (4.5.4, tables 4-16 and 4-18).
            yield address, entry & _ADDRESS & -size, size, allowed
        else:
            yield from _pages(read, entry & _ADDRESS, level - 1, address, allowed, left)
