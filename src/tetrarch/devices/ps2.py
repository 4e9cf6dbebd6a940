"""What PS/2 devices have in common: they answer commands by bytes, which the controller takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._state import DeviceState, queue, register
from tetrarch.devices.input_user import Event

__all__ = ["ACK", "OUTPUT_MAX", "RESEND", "TEST_PASSED", "Ps2Core", "Ps2State"]

ACK: Final = 0xFA
RESEND: Final = 0xFE
TEST_PASSED: Final = 0xAA
#: What waits to be read: a real keyboard has room for 16 bytes, and hands that press no faster.
OUTPUT_MAX: Final = 64


@dataclass
class Ps2State(DeviceState):
    expects: int = register(0, 0xFF)
    """The command whose byte is still to come; 0 is none."""
    last: int = register(0, 0xFF)
    output: deque[int] = queue(OUTPUT_MAX)


class Ps2Core(ABC):
    """A device without a clock: it is asked for its bytes."""

    state: Ps2State

    def take(self) -> int | None:
        """The next byte for the controller."""
        if not self.state.output:
            return None
        self.state.last = self.state.output.popleft()
        return self.state.last

    @abstractmethod
    def write(self, value: int) -> None:
        """A byte from the controller."""

    @abstractmethod
    def admit(self, events: Sequence[Event]) -> bool:
        """What a program does with it: all of it is taken, or nothing."""

    @property
    @abstractmethod
    def leds(self) -> frozenset[str]:
        """Those that are lit."""

    def _say(self, *values: int) -> None:
        self._put(bytes(values))

    def _put(self, said: bytes) -> bool:
        """All of it, or nothing."""
        room = len(self.state.output) + len(said) <= OUTPUT_MAX
        if room:
            self.state.output.extend(said)
        return room
