"""What viewers send, out of a stream of bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrarch.display.frame import Rect
from tetrarch.vnc.messages import (
    FORMAT_BYTES,
    KeyEvent,
    MessageReader,
    NotRfb,
    PointerEvent,
    ScanCode,
    SetDesktopSize,
    SetEncodings,
    SetPixelFormat,
    UpdateRequest,
)

MESSAGES = (
    b"\0\0\0\0" + FORMAT_BYTES,
    struct.pack(">BxH3i", 2, 3, 16, 0, -223),
    struct.pack(">BB4H", 3, 1, 1, 2, 3, 4),
    struct.pack(">BB2xI", 4, 1, 0xFF0D),
    struct.pack(">BBHH", 5, 4, 7, 9),
    struct.pack(">B3xI", 6, 5) + b"\5\5\5\5\5",
    struct.pack(">BxHHBxIHHHHI", 251, 800, 600, 1, 0, 0, 0, 800, 600, 0),
    struct.pack(">BBHII", 255, 0, 1, 0x61, 0x1E),
)
READ = (
    SetEncodings((16, 0, -223)),
    UpdateRequest(True, Rect(1, 2, 3, 4)),
    KeyEvent(True, 0xFF0D),
    PointerEvent(4, 7, 9),
    SetDesktopSize(800, 600),
    ScanCode(True, 0x61, 0x1E),
)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20))
def test_messages_are_found_however_they_come(pieces: list[int]) -> None:
    stream, reader, found = b"".join(MESSAGES), MessageReader(), []
    for length in [*pieces, len(stream)]:
        found += list(reader.feed(stream[:length]))
        stream = stream[length:]
    assert isinstance(found[0], SetPixelFormat)
    assert tuple(found[1:]) == READ


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\1", "type 1"),
        (b"GET / HTTP/1.0\r\n", "type 71"),
        (b"\xff\1", "type 255"),
        (struct.pack(">B3xI", 6, 0xFFFF_FFFF), "a text of 4294967295 bytes"),
        (b"\0\0\0\0" + struct.pack(">BBBB3H3B3x", 24, 24, 0, 1, 255, 255, 255, 16, 8, 0), "24"),
        (b"\0\0\0\0" + struct.pack(">BBBB3H3B3x", 32, 24, 0, 1, 255, 255, 0, 16, 8, 0), "0 to 0"),
        (b"\0\0\0\0" + struct.pack(">BBBB3H3B3x", 32, 24, 0, 0, 255, 255, 255, 16, 8, 0), "map"),
    ],
)
def test_who_sends_anything_else_is_no_viewer(data: bytes, words: str) -> None:
    with pytest.raises(NotRfb, match=words):
        list(MessageReader().feed(data))


def test_long_lists_keep_no_more_than_can_be_of_use() -> None:
    data = struct.pack(">BxH", 2, 0xFFFF) + bytes(4 * 0xFFFF)
    (message,) = MessageReader().feed(data)
    assert message == SetEncodings((0,) * 256)
