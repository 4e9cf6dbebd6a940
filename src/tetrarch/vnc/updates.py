"""Parts of frames as a viewer gets them (RFC 6143, 7.6 and 7.7), in what it takes of the encodings.

Parts are the height of a tile at most, so that what is made of one at a time stays small.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from tetrarch._native import PixelFormat
from tetrarch.display.frame import Cursor, Frame, Rect
from tetrarch.vnc.messages import FORMAT

__all__ = ["Encoder", "Pseudo", "colour_map", "update_header"]

RAW: Final = 0
#: Raw points by zlib, which is none of the RFC's, but of the community's version.
ZLIB: Final = 6
ZRLE: Final = 16


class Pseudo:
    """Encodings that say what a viewer understands beside points."""

    DESKTOP_SIZE: Final = -223
    CURSOR: Final = -239
    QEMU_KEYS: Final = -258
    EXTENDED_DESKTOP_SIZE: Final = -308


#: Why the size is what it is (ExtendedDesktopSize): the machine has changed it; this viewer asked.
SIZE_OF_SERVER: Final = 0
SIZE_OF_VIEWER: Final = 1
#: And what became of that: nobody but the guest changes it.
SIZE_PROHIBITED: Final = 1

_RECT: Final = struct.Struct(">4Hi")


def update_header(rects: int) -> bytes:
    return struct.pack(">BxH", 0, rects)


def colour_map() -> bytes:
    """SetColourMapEntries (7.6.2): of the 256 points those three colours that they are made of."""
    colours = [
        (value & 7) * 0xFFFF // 7 if part < 2 else value * 0xFFFF // 3
        for point in range(256)
        for part, value in enumerate((point & 7, point >> 3 & 7, point >> 6))
    ]
    return struct.pack(">BxHH", 1, 0, 256) + struct.pack(f">{len(colours)}H", *colours)


class Encoder:
    """What one viewer is sent; zlib's stream of each encoding is one from the first part to the
    last."""

    def __init__(self) -> None:
        self.format: PixelFormat = FORMAT
        self._streams: dict[int, zlib._Compress] = {}
        self._encoding = RAW
        self._known: frozenset[int] = frozenset()

    def set_encodings(self, encodings: Sequence[int]) -> None:
        self._known = frozenset(encodings)
        taken = (number for number in encodings if number in (RAW, ZLIB, ZRLE))
        self._encoding = next(taken, RAW)

    def knows(self, *pseudo: int) -> bool:
        """Whether the viewer understands one of them."""
        return not self._known.isdisjoint(pseudo)

    def part(self, frame: Frame, rect: Rect) -> bytes:
        form = self.format.tiles if self._encoding == ZRLE else self.format.raw
        data = form(frame.points, frame.width, rect)
        if self._encoding != RAW:
            # The fastest: guests draw faster than most viewers take it.
            stream = self._streams.get(self._encoding) or zlib.compressobj(1)
            self._streams[self._encoding] = stream
            data = stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)
            data = struct.pack(">I", len(data)) + data
        return _RECT.pack(*rect, self._encoding) + data

    def size(self, width: int, height: int, why: int = 0, result: int = 0) -> bytes:
        """Of the screen, as the viewer understands it."""
        if not self.knows(Pseudo.EXTENDED_DESKTOP_SIZE):
            return _RECT.pack(0, 0, width, height, Pseudo.DESKTOP_SIZE)
        head = _RECT.pack(why, result, width, height, Pseudo.EXTENDED_DESKTOP_SIZE)
        # One screen, with number 0: place, size, flags.
        return head + struct.pack(">B3xI4HI", 1, 0, 0, 0, width, height, 0)

    def qemu_keys(self) -> bytes:
        return _RECT.pack(0, 0, 0, 0, Pseudo.QEMU_KEYS)

    def cursor(self, cursor: Cursor | None) -> bytes:
        """Its points, and a mask of those that are to be seen (7.8.1). None is an empty one."""
        if cursor is None:
            return _RECT.pack(0, 0, 0, 0, Pseudo.CURSOR)
        size = Rect(0, 0, cursor.width, cursor.height)
        head = _RECT.pack(cursor.x, cursor.y, cursor.width, cursor.height, Pseudo.CURSOR)
        points = self.format.raw(cursor.points, cursor.width, size)
        return head + points + b"".join(_mask(cursor))


def _mask(cursor: Cursor) -> Iterator[bytes]:
    """A bit for each point, lines that begin on a byte, the leftmost in the high bit."""
    for line in range(cursor.height):
        alpha = cursor.points[4 * cursor.width * line :][3 : 4 * cursor.width : 4]
        bits = "".join("1" if value >= 0x80 else "0" for value in alpha)
        count = -(-cursor.width // 8)
        yield int(bits.ljust(8 * count, "0") or "0", 2).to_bytes(count)
