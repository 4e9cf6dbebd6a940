"""A port that ends the machine with the value written to it, as QEMU's isa-debug-exit."""

from collections.abc import Callable
from typing import Final

from tetrarch.devices import _state
from tetrarch.devices._access import all_ones

__all__ = ["PORTS", "PORT_BASE", "DebugExit"]

PORT_BASE: Final = 0xF4
PORTS: Final = 4


class DebugExit:
    """Calls ``leave`` with the value the guest wrote, of up to 32 bits."""

    def __init__(self, leave: Callable[[int], None]) -> None:
        self._leave = leave

    def read(self, offset: int, size: int) -> int:
        # The device it is modelled on reads as 0.
        return 0 if 0 <= offset < PORTS else all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if 0 <= offset < PORTS and size >= 1:
            self._leave(value & all_ones(min(size, PORTS - offset)))

    def save(self) -> _state.State:
        return {"device": "debug_exit", "version": 1}

    def load(self, state: _state.State) -> None:
        _state.check(state, "debug_exit", 1)
