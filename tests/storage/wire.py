"""An interrupt line that a test looks at."""

from __future__ import annotations


class Wire:
    def __init__(self) -> None:
        self._level = False

    def set(self, level: bool) -> None:
        self._level = level

    def is_high(self) -> bool:
        return self._level
