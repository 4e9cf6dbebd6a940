"""A picture of a screen."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Self

__all__ = ["Screen"]


@dataclass(frozen=True)
class Screen:
    """What a screen showed at one moment."""

    width: int
    height: int
    pixels: bytes
    """Red, green and blue of each, from the top left."""
    text: str = ""
    """In a text mode its lines, without what is blank behind them."""

    def array(self) -> memoryview:
        """Of shape (height, width, 3); ``numpy.asarray`` takes it."""
        return memoryview(self.pixels).cast("B", (self.height, self.width, 3))

    def ppm(self) -> bytes:
        """As a PPM file (netpbm's ppm(5), raw)."""
        return b"P6\n%d %d\n255\n" % (self.width, self.height) + self.pixels

    def png(self) -> bytes:
        """As a PNG file (ISO/IEC 15948): true colour, 8 bits a sample."""
        row = 3 * self.width
        rows = b"".join(
            b"\0" + self.pixels[at : at + row] for at in range(0, len(self.pixels), row)
        )
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)

    @classmethod
    def of_png(cls, data: bytes, text: str) -> Self:
        """Of a file that ``png`` has made."""
        width, height = struct.unpack_from(">II", data, 16)
        (size,) = struct.unpack_from(">I", data, 33)
        rows, step = zlib.decompress(data[41 : 41 + size]), 1 + 3 * width
        pixels = b"".join(rows[at + 1 : at + step] for at in range(0, len(rows), step))
        return cls(width, height, pixels, text)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
