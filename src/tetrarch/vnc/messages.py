"""What viewers send after the handshake (RFC 6143, 7.5), out of a stream of bytes.

Also SetDesktopSize and QEMU's key events, which are none of the RFC's (the community's version of
the protocol, github.com/rfbproto/rfbproto).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from tetrarch._native import PixelFormat
from tetrarch.display.frame import Rect

__all__ = [
    "FORMAT",
    "FORMAT_BYTES",
    "KeyEvent",
    "Message",
    "MessageReader",
    "NotRfb",
    "PointerEvent",
    "ScanCode",
    "SetDesktopSize",
    "SetEncodings",
    "SetPixelFormat",
    "UpdateRequest",
]

#: PIXEL_FORMAT (7.4): bits, depth, big endian, true colour, maxima, shifts.
_PIXEL_FORMAT: Final = struct.Struct(">BBBB3H3B3x")
#: Ours: 32 bits, as frames are.
FORMAT: Final = PixelFormat(32, False, (255, 255, 255), (16, 8, 0))
FORMAT_BYTES: Final = _PIXEL_FORMAT.pack(32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
#: For who wants a map of colours: the two low bits are blue's, as 8 bits have it most often.
_MAPPED: Final = ((7, 7, 3), (0, 3, 6))

#: Text for the guest's clipboard, which nobody here takes; a longer one is a viewer gone wrong.
_TEXT_MAX: Final = 1 << 20
#: Encodings that a viewer names beyond these are passed over.
_ENCODINGS_MAX: Final = 256


class NotRfb(Exception):
    """Who sends that is no viewer."""


@dataclass(frozen=True)
class SetPixelFormat:
    format: PixelFormat
    colour_map: bool
    """The viewer has to be told what the colours of the 256 points are."""


@dataclass(frozen=True)
class SetEncodings:
    encodings: tuple[int, ...]
    """The first is what it likes best."""


@dataclass(frozen=True)
class UpdateRequest:
    incremental: bool
    rect: Rect


@dataclass(frozen=True)
class KeyEvent:
    down: bool
    keysym: int


@dataclass(frozen=True)
class ScanCode:
    """QEMU's key event: of a keyboard of the PC's, whatever stands on the key."""

    down: bool
    keysym: int
    code: int
    """Of set 1, with 0x80 where 0xE0 comes before it."""


@dataclass(frozen=True)
class PointerEvent:
    buttons: int
    x: int
    y: int


@dataclass(frozen=True)
class SetDesktopSize:
    width: int
    height: int


Message: TypeAlias = (
    SetPixelFormat
    | SetEncodings
    | UpdateRequest
    | KeyEvent
    | ScanCode
    | PointerEvent
    | SetDesktopSize
)


class MessageReader:
    """Keeps the beginning of a message that has not come as a whole."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._skip = 0
        """Bytes of a text that are still to come."""

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole by now. Raises NotRfb, and is of no use after that."""
        self._data += data
        while True:
            skipped = min(self._skip, len(self._data))
            del self._data[:skipped]
            self._skip -= skipped
            if self._skip or not self._data:
                return
            length = self._length()
            if length is None or len(self._data) < length:
                return
            whole = bytes(self._data[:length])
            del self._data[:length]
            message = _READERS[whole[0]](whole)
            if message is not None:
                yield message

    def _length(self) -> int | None:
        """Of the message that has begun; None until it can be known."""
        kind, data = self._data[0], self._data
        if kind in _FIXED:
            return _FIXED[kind]
        if kind == 2:
            return None if len(data) < 4 else 4 + 4 * int.from_bytes(data[2:4])
        if kind == 6:
            if len(data) < 8:
                return None
            self._skip = int.from_bytes(data[4:8])
            if self._skip > _TEXT_MAX:
                raise NotRfb(f"a text of {self._skip} bytes")
            return 8
        if kind == 251:
            return None if len(data) < 8 else 8 + 16 * data[6]
        if kind == 255:
            if len(data) < 2:
                return None
            if data[1] == 0:
                return 12
        raise NotRfb(f"a message of type {kind}")


#: Bytes of those that always have as many: SetPixelFormat, FramebufferUpdateRequest, KeyEvent,
#: PointerEvent.
_FIXED: Final = {0: 20, 3: 10, 4: 8, 5: 6}


def _pixel_format(data: bytes) -> SetPixelFormat:
    bits, _, big, true_colour, *rest = _PIXEL_FORMAT.unpack_from(data, 4)
    maxima, shifts = rest[:3], rest[3:]
    if not true_colour:
        if bits != 8:
            raise NotRfb(f"a map of colours for points of {bits} bits")
        maxima, shifts = map(list, _MAPPED)
    try:
        return SetPixelFormat(PixelFormat(bits, bool(big), maxima, shifts), not true_colour)
    except ValueError as error:
        raise NotRfb(str(error)) from None


def _encodings(data: bytes) -> SetEncodings:
    numbers = memoryview(data)[4 : 4 + 4 * _ENCODINGS_MAX]
    return SetEncodings(tuple(number for (number,) in struct.iter_unpack(">i", numbers)))


def _update_request(data: bytes) -> UpdateRequest:
    incremental, *rect = struct.unpack(">xB4H", data)
    return UpdateRequest(bool(incremental), Rect(*rect))


def _key(data: bytes) -> KeyEvent:
    down, keysym = struct.unpack(">xB2xI", data)
    return KeyEvent(bool(down), keysym)


def _pointer(data: bytes) -> PointerEvent:
    return PointerEvent(*struct.unpack(">xBHH", data))


def _desktop_size(data: bytes) -> SetDesktopSize:
    return SetDesktopSize(*struct.unpack_from(">xxHH", data))


def _scan_code(data: bytes) -> ScanCode:
    down, keysym, code = struct.unpack(">xxHII", data)
    return ScanCode(bool(down), keysym, code)


_READERS: Final[dict[int, Callable[[bytes], Message | None]]] = {
    0: _pixel_format,
    2: _encodings,
    3: _update_request,
    4: _key,
    5: _pointer,
    6: lambda data: None,
    251: _desktop_size,
    255: _scan_code,
}
