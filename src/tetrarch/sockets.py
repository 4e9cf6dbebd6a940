"""Where sockets of our own lie."""

from __future__ import annotations

import os
import tempfile
from typing import Final

__all__ = ["socket_directory"]

#: What a path has, of the 107 bytes that an address holds (unix(7)), before our names.
_PLACE_MAX: Final = 64


def socket_directory() -> tempfile.TemporaryDirectory[str]:
    """A private directory for sockets, under TMPDIR where paths are not too long there."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _PLACE_MAX:
        place = "/tmp"
    return tempfile.TemporaryDirectory(prefix="tetrarch-", dir=place)
