"""What a guest in 64-bit mode has mapped, by its page tables (Intel SDM 3A, 4.5)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["TABLES_MAX", "Mapping", "mappings"]

#: A guest may build tables without end: so many are read, of a few seconds.
TABLES_MAX: Final = 20_000
_ENTRIES: Final = struct.Struct("<512Q")
_PRESENT, _WRITE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_ADDRESS: Final = ((1 << 52) - 1) & ~0xFFF

Mapping = tuple[int, int, int]
"""First address, the address behind the last, and the bits of user and write."""


def mappings(read: Callable[[int], bytes], root: int, levels: int) -> Iterator[Mapping]:
    """Ranges with the same rights, by address. ``read`` gives a page at a physical address.

    Raises OverflowError where there are more tables than anybody wants to see.
    """
    left = TABLES_MAX
    current: Mapping | None = None
    for start, size, rights in _pages(read, root & _ADDRESS, levels, 0, _WRITE | _USER):
        if size == 0:
            left -= 1
            if left == 0:
                raise OverflowError
        elif current is not None and current[1] == start and current[2] == rights:
            current = current[0], start + size, rights
        else:
            if current is not None:
                yield current
            current = start, start + size, rights
    if current is not None:
        yield current


def _pages(
    read: Callable[[int], bytes], table: int, level: int, base: int, rights: int
) -> Iterator[Mapping]:
    """Pages as (address, bytes, rights); a table that was read has 0 bytes."""
    yield base, 0, 0
    shift = 12 + 9 * (level - 1)
    for index, entry in enumerate(_ENTRIES.unpack(read(table))):
        if not entry & _PRESENT:
            continue
        address = base + (index << shift)
        allowed = rights & entry
        if level == 1 or (level <= 3 and entry & _LARGE):
            yield address, 1 << shift, allowed
        else:
            yield from _pages(read, entry & _ADDRESS, level - 1, address, allowed)
