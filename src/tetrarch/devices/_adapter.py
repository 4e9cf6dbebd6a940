"""What the adapters of register cores to a machine have in common: lock, line, state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from tetrarch.devices._line import IrqLine
from tetrarch.devices._state import DeviceState, State

__all__ = ["Adapter", "Core"]


class Core(Protocol):
    """A register file without bus, lock, thread or I/O."""

    state: DeviceState

    @property
    def irq(self) -> bool:
        """The level that the core wants its interrupt line to have."""


CoreT = TypeVar("CoreT", bound=Core)


class Adapter(Generic[CoreT]):
    """Owns a core's lock and its interrupt line.

    Lock order: the line's, then the device's; neither is held while calling out.
    """

    def __init__(self, core: CoreT, irq: Callable[[bool], None]) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._line = IrqLine(irq, self._wanted)

    def _wanted(self) -> bool:
        with self._lock:
            return self._core.irq

    def reset(self) -> None:
        """As after power-on, but for what a battery keeps."""
        with self._lock:
            self._core.state.reset()
        self._line.update()

    def save(self) -> State:
        with self._lock:
            return self._core.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self._core.state.load(state)
        self._line.update()
