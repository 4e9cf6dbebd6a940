"""What a screen shows at one moment, as viewers of it are given it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from tetrarch.display.screen import Screen

__all__ = ["POINT_BYTES", "Cursor", "Frame", "Rect"]

#: Blue, green, red, and a byte that says nothing: words of 32 bits, blue lowest.
POINT_BYTES: Final = 4


class Rect(NamedTuple):
    """In points, from the left upper corner."""

    x: int
    y: int
    width: int
    height: int

    def within(self, other: Rect) -> Rect:
        """What both have in common; of no width or height where that is nothing."""
        left, top = max(self.x, other.x), max(self.y, other.y)
        right = min(self.x + self.width, other.x + other.width)
        bottom = min(self.y + self.height, other.y + other.height)
        return Rect(left, top, max(0, right - left), max(0, bottom - top))

    def __bool__(self) -> bool:
        return self.width > 0 and self.height > 0


@dataclass(frozen=True, eq=False)
class Frame:
    width: int
    height: int
    points: bytes
    """Line by line, without gaps."""
    text: str = ""
    """As ``Screen.text``."""

    @property
    def all(self) -> Rect:
        return Rect(0, 0, self.width, self.height)

    def screen(self) -> Screen:
        pixels = bytearray(3 * self.width * self.height)
        for part in range(3):  # red is behind green and blue
            pixels[part::3] = self.points[2 - part :: POINT_BYTES]
        return Screen(self.width, self.height, bytes(pixels), self.text)

    def of_size(self, width: int, height: int) -> Frame:
        """Cut off, or with black beside and below it."""
        if (width, height) == (self.width, self.height):
            return self
        row, shown = POINT_BYTES * self.width, POINT_BYTES * min(width, self.width)
        lines = [
            self.points[at : at + shown].ljust(POINT_BYTES * width, b"\0")
            for at in range(0, row * min(height, self.height), row)
        ]
        points = b"".join(lines).ljust(POINT_BYTES * width * height, b"\0")
        return Frame(width, height, points, self.text)


@dataclass(frozen=True, eq=False)
class Cursor:
    """The picture of a pointer, which who shows it puts where the pointer is."""

    width: int
    height: int
    x: int
    """Which of its points is at the pointer's place."""
    y: int
    points: bytes
    """As those of a frame; the fourth byte says how much is to be seen of it, 255: all."""
