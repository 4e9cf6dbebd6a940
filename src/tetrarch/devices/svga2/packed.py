"""Memory as text: of a saved SVGA II."""

from __future__ import annotations

import base64
import binascii
import zlib

from tetrarch.errors import StateError

__all__ = ["damaged", "packed", "unpacked"]


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def unpacked(text: object, length: int) -> bytes:
    """Raises StateError for what is not so many bytes."""
    if not isinstance(text, str):
        raise damaged()
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), length + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise damaged() from error
    if len(data) != length:
        raise damaged()
    return data


def damaged() -> StateError:
    return StateError("a saved SVGA II is damaged", mend="save the machine again")
