"""A port that ends the machine with the value written to it, as QEMU's isa-debug-exit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State

__all__ = ["PORTS", "PORT_BASE", "DebugExit", "DebugExitState"]

PORT_BASE: Final = 0xF4
PORTS: Final = 4


@dataclass
class DebugExitState(DeviceState):
    """Nothing: a write ends the machine."""

    kind = "debug_exit"


class DebugExit:
    """Calls ``leave`` with the value the guest wrote, of up to 32 bits."""

    def __init__(self, leave: Callable[[int], None]) -> None:
        self._leave = leave
        self.state = DebugExitState()

    def read(self, offset: int, size: int) -> int:
        # The device it is modelled on reads as 0.
        return 0 if 0 <= offset < PORTS else all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if 0 <= offset < PORTS and size >= 1:
            self._leave(value & all_ones(min(size, PORTS - offset)))

    def reset(self) -> None:
        self.state.reset()

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)
