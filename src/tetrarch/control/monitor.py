"""What a command works on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tetrarch.control.protocol import QmpError
from tetrarch.machine.machine import Machine

__all__ = ["Descriptors", "Monitor"]


class Descriptors:
    """File descriptors that a client has sent (SCM_RIGHTS), and those that it has named."""

    def __init__(self) -> None:
        self._sent: list[int] = []
        self._named: dict[str, int] = {}

    def take(self, sent: list[int]) -> None:
        """They came with what was read."""
        self._sent += sent

    def name(self, name: str) -> None:
        """Gives the next that was sent a name, and closes one that had it."""
        if not self._sent:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        before = self._named.get(name)
        self._named[name] = self._sent.pop(0)
        if before is not None:
            os.close(before)

    def pop(self, name: str) -> int:
        """It is the caller's from now on."""
        if name not in self._named:
            raise QmpError(f"File descriptor named '{name}' not found")
        return self._named.pop(name)

    def close(self) -> None:
        for descriptor in (*self._sent, *self._named.values()):
            os.close(descriptor)
        self._sent.clear()
        self._named.clear()


@dataclass
class Monitor:
    """A machine and the client that steers it."""

    machine: Machine
    descriptors: Descriptors = field(default_factory=Descriptors)
