"""What a fuzz target takes out of its input."""

from __future__ import annotations


class Input:
    """Values off the front of fuzz data; zeros when it has ended."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def bytes(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def text(self) -> str:
        return self.bytes(self.number(1)).decode("utf-8", "surrogateescape")


def damaged(source: Input, whole: bytes) -> bytes:
    """``whole`` with some bytes or numbers changed, perhaps cut short."""
    data = bytearray(whole)
    for _ in range(source.number(1) % 16):
        at = source.number(2) % len(data)
        change = source.bytes(1 << source.number(1) % 4)
        data[at : at + len(change)] = change
    if source.number(1) % 8 == 7:
        del data[source.number(2) :]
    return bytes(data)
