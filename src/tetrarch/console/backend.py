"""What a serial line needs of its other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tetrarch.errors import HostError

__all__ = ["ConsoleBackend", "ConsoleError", "Leave", "NullConsole", "Receive", "Resize"]

Receive = Callable[[bytes], None]
"""Takes what was typed. May block while the guest does not read."""

Leave = Callable[[], None]
"""The user wants out of the console."""


Resize = Callable[[int, int], None]
"""Takes the rows and columns of a terminal; zeroes where there is none."""


class ConsoleError(HostError):
    """The console's other end cannot be opened or has gone."""


class ConsoleBackend(Protocol):
    """The other end of a serial line.

    ``write`` is called on a thread of the machine's own, from ``start`` until ``close``;
    while it blocks, the guest waits. What it raises stops the machine and comes out of
    ``Machine.run``.

    One that knows whether its other end is a terminal says so in ``guest_terminal``: its
    size as "24x80", or "none". The default guest is told.

    One whose other end may be a terminal of changing size has ``watch_size(resize)``, called
    before ``start``: it says the size at once, and again when it is another. A virtio console
    tells the guest; a serial line has no way to.
    """

    def start(self, receive: Receive, leave: Leave) -> None: ...
    def write(self, data: bytes) -> None: ...
    def close(self) -> None:
        """Gives back what start() took. May be called twice, or without start()."""


class NullConsole:
    """Drops what the guest says and types nothing."""

    guest_terminal = "none"

    def start(self, receive: Receive, leave: Leave) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass
