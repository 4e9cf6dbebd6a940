"""The memory map as one table."""

from hypothesis import given
from hypothesis import strategies as st

from tetrarch.boot.e820 import E820Type, memory_map, pack_e820, pack_pvh

GIB = 1 << 30


def test_memory_above_the_hole_is_told() -> None:
    entries = memory_map([(0, 3 * GIB), (4 * GIB, GIB)])

    assert entries[-3:] == [
        (0x10_0000, 3 * GIB - 0x10_0000, E820Type.RAM),
        (0xE000_0000, 0x10_0000, E820Type.RESERVED),
        (4 * GIB, GIB, E820Type.RAM),
    ]


def test_both_formats_hold_the_same_entries() -> None:
    entries = memory_map([(0, GIB)])

    assert len(pack_e820(entries)) == 20 * len(entries)
    assert len(pack_pvh(entries)) == 24 * len(entries)
    assert pack_e820(entries)[:20] == pack_pvh(entries)[:20]


@given(st.integers(1, 3 * GIB // 4096))
def test_entries_are_ordered_apart_and_within_ram(pages: int) -> None:
    entries = memory_map([(0, pages * 4096)])

    ends = [entry.address + entry.length for entry in entries]
    assert all(end <= after.address for end, after in zip(ends, entries[1:], strict=False))
    usable = [e for e in entries if e.type == E820Type.RAM]
    assert all(e.address + e.length <= pages * 4096 for e in usable)
    assert all(e.length > 0 for e in entries)
