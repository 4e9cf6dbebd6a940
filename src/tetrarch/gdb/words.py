"""Words that packets are made of."""

from __future__ import annotations

import binascii
from contextlib import suppress

__all__ = ["BadRequest", "number", "numbers", "unhex"]


class BadRequest(Exception):
    """A packet that makes no sense."""


def number(text: bytes) -> int:
    """64 bits in hex digits, and nothing else that int() takes."""
    if not text or len(text) > 16 or text.strip(b"0123456789abcdefABCDEF"):
        raise BadRequest
    return int(text, 16)


def numbers(text: bytes, separator: bytes, count: int) -> list[int]:
    found = [number(part) for part in text.split(separator)]
    if len(found) != count:
        raise BadRequest
    return found


def unhex(digits: bytes) -> bytes:
    with suppress(binascii.Error):
        return binascii.unhexlify(digits)
    raise BadRequest
