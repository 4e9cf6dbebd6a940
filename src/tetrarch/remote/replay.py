"""The way through a recording of a machine of another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tetrarch.machine.debugger import Place
from tetrarch.machine.replay import not_replayed

__all__ = ["RemoteReplay"]


class RemoteReplay:
    """As ``ReplayView``."""

    def __init__(self, execute: Callable[..., Any]) -> None:
        self._execute = execute

    @property
    def count(self) -> int:
        """As ``ReplayView.count``."""
        told = self._execute("query-replay")
        if told["mode"] != "play":
            raise not_replayed()
        return int(told["icount"])

    def goto(self, count: int) -> Place:
        """As ``ReplayView.goto``."""
        self._execute("replay-seek", {"icount": count}, timeout=None)
        return "here" if self.count == count else "end"
