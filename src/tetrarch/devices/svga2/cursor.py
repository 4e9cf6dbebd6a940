"""Pictures of the SVGA II's pointer: as commands define them, and as they are saved."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from tetrarch.devices._state import State
from tetrarch.devices.svga2.packed import damaged, packed, unpacked
from tetrarch.display.frame import POINT_BYTES, Cursor

__all__ = [
    "CURSOR_MAX",
    "alpha_cursor",
    "load_cursor",
    "mask_words",
    "masked_cursor",
    "save_cursor",
]

#: Points a side.
CURSOR_MAX: Final = 256


def alpha_cursor(arguments: Sequence[int]) -> Cursor:
    """Of points that say how much of them is to be seen (SVGAFifoCmdDefineAlphaCursor)."""
    _, x, y, width, height = arguments[:5]
    points = struct.pack(f"<{width * height}I", *arguments[5:])
    return Cursor(width, height, min(x, width), min(y, height), points)


def masked_cursor(arguments: Sequence[int]) -> Cursor:
    """Of a mask of what stays and one of what is turned over, of 1 or 32 bits each
    (SVGAFifoCmdDefineCursor)."""
    _, x, y, width, height, and_depth, xor_depth = arguments[:7]
    and_words = mask_words(width, height, and_depth)
    keeps = _mask(arguments[7 : 7 + and_words], width, height, and_depth)
    turns = _mask(arguments[7 + and_words :], width, height, xor_depth)
    points = bytearray()
    for keep, turn in zip(keeps, turns, strict=True):
        # What is under it cannot be turned over by a viewer: it is black there.
        seen = not keep or bool(turn)
        colour = 0 if keep else turn
        points += (colour & 0xFF_FFFF | (0xFF00_0000 if seen else 0)).to_bytes(4, "little")
    return Cursor(width, height, min(x, width), min(y, height), bytes(points))


def mask_words(width: int, height: int, depth: int) -> int:
    """Lines begin on a word."""
    return -(-width * depth // 32) * height


def _mask(words: Sequence[int], width: int, height: int, depth: int) -> list[int]:
    """A colour for each point; of one bit the leftmost is the highest of the first byte."""
    if depth == 32:
        return [word & 0xFF_FFFF for word in words]
    data = struct.pack(f"<{len(words)}I", *words)
    row = 4 * -(-width // 32)
    return [
        0xFF_FFFF if data[row * line + column // 8] & 0x80 >> column % 8 else 0
        for line in range(height)
        for column in range(width)
    ]


def save_cursor(cursor: Cursor | None) -> State:
    if cursor is None:
        return {}
    size = [cursor.width, cursor.height, cursor.x, cursor.y]
    return {"size": size, "points": packed(cursor.points)}


def load_cursor(saved: object) -> Cursor | None:
    """Raises StateError."""
    if saved == {}:
        return None
    if not isinstance(saved, dict) or not isinstance(size := saved.get("size"), list):
        raise damaged()
    if len(size) != 4 or not all(type(one) is int and 0 <= one <= CURSOR_MAX for one in size):
        raise damaged()
    width, height, x, y = size
    return Cursor(width, height, x, y, unpacked(saved.get("points"), POINT_BYTES * width * height))
