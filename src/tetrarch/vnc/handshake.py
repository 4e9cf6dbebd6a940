"""The beginning of a viewer's connection (RFC 6143, 7.1 to 7.3), of versions 3.3, 3.7 and 3.8."""

from __future__ import annotations

import hmac
import re
import secrets
import struct
import threading
from collections.abc import Callable
from typing import Final, Protocol

from tetrarch._native import vnc_answer
from tetrarch.vnc.messages import FORMAT_BYTES, NotRfb

__all__ = ["PASSWORD_BYTES", "Stream", "WrongPassword", "begin", "welcome"]

VERSION: Final = b"RFB 003.008\n"
_VERSION: Final = re.compile(rb"RFB (\d{3})\.(\d{3})\n")

NONE: Final = 1
VNC_AUTHENTICATION: Final = 2
#: More of a password no viewer takes.
PASSWORD_BYTES: Final = 8

#: Before a wrong password is said to be wrong.
_DELAY_S: Final = 2.0
_NAME_MAX: Final = 256


class WrongPassword(Exception):
    """And the viewer has been told."""


class Stream(Protocol):
    """A viewer's connection."""

    def read(self, count: int) -> bytes:
        """So many bytes."""

    def write(self, data: bytes) -> None: ...


def begin(stream: Stream, password: bytes | None, ended: threading.Event) -> None:
    """Until the viewer is let in. Raises NotRfb, WrongPassword and what the stream raises.

    ``ended`` says that nobody is let in any more: it cuts a delay short.
    """
    stream.write(VERSION)
    match = _VERSION.fullmatch(stream.read(len(VERSION)))
    if match is None:
        raise NotRfb("it names no version")
    minor = _minor(int(match[1]), int(match[2]))
    kind = NONE if password is None else VNC_AUTHENTICATION
    if minor == 3:
        stream.write(struct.pack(">I", kind))
    else:
        stream.write(bytes([1, kind]))
        if stream.read(1)[0] != kind:
            _refuse(stream, minor, "another kind of security than was offered")
            raise NotRfb("it takes a kind of security that is not offered")
    if password is not None:
        challenge = secrets.token_bytes(16)
        stream.write(challenge)
        answer = stream.read(16)
        if not hmac.compare_digest(vnc_answer(password, challenge), answer):
            ended.wait(_DELAY_S)
            _refuse(stream, minor, "the password is wrong")
            raise WrongPassword
    if password is not None or minor == 8:
        stream.write(struct.pack(">I", 0))


def _minor(major: int, minor: int) -> int:
    """What is neither counts as 3.3, and what is newer as 3.8 (7.1.1)."""
    if (major, minor) >= (3, 8):
        return 8
    return 7 if (major, minor) == (3, 7) else 3


def _refuse(stream: Stream, minor: int, reason: str) -> None:
    text = reason.encode()
    stream.write(struct.pack(">I", 1))
    if minor == 8:  # older ones hang up now
        stream.write(struct.pack(">I", len(text)) + text)


def welcome(stream: Stream, name: str, size: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """ClientInit and ServerInit; the size that the viewer was told. Others stay, whatever it
    wants."""
    stream.read(1)
    width, height = size()
    text = name.encode()[:_NAME_MAX]
    stream.write(struct.pack(">HH", width, height) + FORMAT_BYTES)
    stream.write(struct.pack(">I", len(text)) + text)
    return width, height
