"""Words for the host's log that a guest can give cause for as often as it likes."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Seldom"]

#: Seconds.
_QUIET_S: Final = 60.0


class Seldom:
    """Something that is told again after a minute at the earliest: a log is a file of the host."""

    def __init__(self) -> None:
        self._told: float | None = None

    def due(self) -> bool:
        """Whether it is to be told now; it then counts as told."""
        now = time.monotonic()
        if self._told is not None and now - self._told < _QUIET_S:
            return False
        self._told = now
        return True
