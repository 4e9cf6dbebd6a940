"""A stream of bytes cut into JSON texts (QMP specification, "Issuing Commands").

Texts need no line ends between them; where one begins and ends is told by its braces. What is
no JSON gives one error and is left out: a control character or 0xFF alone, anything else up to
the end of its line, so that the next text is read again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["JsonStream", "NotJson", "TooLarge"]

#: No command needs a tenth of either.
TEXT_BYTES_MAX: Final = 1 << 20
DEPTH_MAX: Final = 64

_SPACE = b" \t\r\n"
# What counts outside of strings and inside; all else is left to the parser of JSON.
_OUTSIDE = re.compile(rb"[\"{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]")
_INSIDE = re.compile(rb"[\"\\\x00-\x1f\xff]")


class NotJson(Exception):
    """What the stream has at a place; it goes on behind it."""


class TooLarge(Exception):
    """A text that nobody wants to read to its end."""


class JsonStream:
    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at = 0
        """How far the text that has begun was looked at."""
        self._depth = 0
        self._in_string = False
        self._to_line_end = False

    def feed(self, data: bytes) -> Iterator[bytes | NotJson]:
        """The texts that end in ``data``. Raises TooLarge: the stream is at its end then."""
        self._bytes += data
        while self._bytes:
            if self._depth == 0:
                if (wrong := self._between()) is not None:
                    yield wrong
            elif (found := self._within()) is not None:
                yield found
            elif len(self._bytes) > TEXT_BYTES_MAX:
                raise TooLarge(f"a text of more than {TEXT_BYTES_MAX} bytes")
            else:
                return

    def _between(self) -> NotJson | None:
        """Up to the begin of a text."""
        if self._to_line_end:
            line, end, _ = self._bytes.partition(b"\n")
            del self._bytes[: len(line) + len(end)]
            self._to_line_end = not end
            return None
        del self._bytes[: len(self._bytes) - len(self._bytes.lstrip(_SPACE))]
        if not self._bytes:
            return None
        first = self._bytes[0]
        if first in b"{[":
            self._depth = self._at = 1
            return None
        if first < 0x20 or first == 0xFF:
            return self._left_out(1)
        self._to_line_end = True
        return NotJson("expecting a JSON object")

    def _within(self) -> bytes | NotJson | None:
        """Up to the end of the text that has begun; None: more is to come."""
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(self._bytes, self._at):
            self._at = found.end()
            match found[0]:
                case b'"':
                    self._in_string = not self._in_string
                case b"\\":
                    # Whatever is escaped, no quote; but a character that may be in no string.
                    if self._at == len(self._bytes):
                        self._at -= 1
                        return None
                    self._at += self._bytes[self._at] in b'"\\'
                case b"{" | b"[":
                    self._depth += 1
                    if self._depth > DEPTH_MAX:
                        raise TooLarge(f"nesting of more than {DEPTH_MAX} levels")
                case b"}" | b"]":
                    self._depth -= 1
                    if self._depth == 0:
                        text = bytes(self._bytes[: self._at])
                        del self._bytes[: self._at]
                        return text
                case _:
                    return self._left_out(self._at)
        self._at = len(self._bytes)
        return None

    def _left_out(self, count: int) -> NotJson:
        bad = self._bytes[count - 1]
        del self._bytes[:count]
        self._depth, self._in_string = 0, False
        return NotJson(f"invalid byte 0x{bad:02x}")
