"""Which parts of a frame have changed: tiles of 64 points a side, as ZRLE has them.

Frames are compared in Python, by slices: of 1024 by 768 points that is half a millisecond where few
have changed, and five where all have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from tetrarch.display.frame import POINT_BYTES, Frame, Rect

__all__ = ["TILE", "Changes", "changed_tiles"]

TILE: Final = 64


def changed_tiles(old: Frame, new: Frame) -> Iterator[Rect]:
    """Of two frames of one size."""
    if old.points == new.points:
        return
    before, after, row = old.points, new.points, POINT_BYTES * new.width
    for top in range(0, new.height, TILE):
        lines = min(TILE, new.height - top)
        first, last = top * row, (top + lines) * row
        if before[first:last] == after[first:last]:
            continue
        for left in range(0, new.width, TILE):
            columns = min(TILE, new.width - left)
            begin, length = first + POINT_BYTES * left, POINT_BYTES * columns
            for at in range(begin, last, row):
                if before[at : at + length] != after[at : at + length]:
                    yield Rect(left, top, columns, lines)
                    break


class Changes:
    """Tiles of a frame that its viewer has not got yet."""

    def __init__(self, width: int, height: int) -> None:
        self._all = Rect(0, 0, width, height)
        self._rows = [0] * -(-height // TILE)
        """A bit for each tile."""

    def __bool__(self) -> bool:
        return any(self._rows)

    def add(self, *rects: Rect) -> None:
        for rect in rects:
            if part := rect.within(self._all):
                first, last = part.x // TILE, (part.x + part.width - 1) // TILE
                bits = (2 << last) - (1 << first)
                for row in range(part.y // TILE, (part.y + part.height - 1) // TILE + 1):
                    self._rows[row] |= bits

    def take(self, wanted: Rect) -> list[Rect]:
        """Those within ``wanted``, next to each other as one; tiles of which all is wanted are then
        none of the changes any more."""
        wanted = wanted.within(self._all)
        found = []
        for row, bits in enumerate(self._rows):
            for first, last in _runs(bits):
                run = Rect(first * TILE, row * TILE, (last - first) * TILE, TILE).within(self._all)
                if part := run.within(wanted):
                    found.append(part)
                    self._rows[row] &= ~_inside(run, part)
        return found


def _runs(bits: int) -> Iterable[tuple[int, int]]:
    """Where ones that follow each other begin and end."""
    at = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = (~bits & bits + 1).bit_length() - 1
        yield at + zeros, at + zeros + ones
        bits >>= ones
        at += zeros + ones


def _inside(run: Rect, part: Rect) -> int:
    """A bit for each tile of a run that ``part`` has all of."""
    if part.y > run.y or part.y + part.height < run.y + run.height:
        return 0
    first = -(-part.x // TILE)
    end = part.x + part.width
    # The last one of a line may be narrower.
    last = -(-end // TILE) if end == run.x + run.width else end // TILE
    return (1 << last) - (1 << first) if last > first else 0
