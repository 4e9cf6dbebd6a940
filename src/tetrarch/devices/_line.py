"""An interrupt line that several threads may move."""

import threading
from collections.abc import Callable

__all__ = ["IrqLine"]


class IrqLine:
    """Drives a line to the level its device wants, changes only.

    The vCPU thread and an input or timer thread can both change what a device wants. The level is
    therefore asked for inside the lock that orders the changes: the last caller drives what is true
    then, and no stale level stays. Lock order: this lock, then the device's. What drives the wire,
    an ``IrqSource`` of the machine's, must not call into devices.
    """

    def __init__(self, irq: Callable[[bool], None], wanted: Callable[[], bool]) -> None:
        self._irq = irq
        self._wanted = wanted
        self._lock = threading.Lock()
        self._level = False

    def update(self) -> None:
        with self._lock:
            self._set(self._wanted())

    def renew(self) -> None:
        """Low, then what is wanted: an edge for the next event behind the one just served."""
        with self._lock:
            self._set(False)
            self._set(self._wanted())

    def _set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._irq(level)
