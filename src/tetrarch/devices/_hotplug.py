"""What comes into a machine that runs, and goes by its guest's leave: the part that the registers
for slots and for vCPUs have in common.

A request stays until the guest has confirmed it, and so does the general-purpose event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, register

__all__ = ["HotplugAdapter", "HotplugCore", "HotplugState"]


@dataclass
class HotplugState(DeviceState):
    """A bit for each place; who makes one says how many there are."""

    new: int = register(0, 0)
    gone: int = register(0, 0)


class HotplugCore(ABC):
    """``places`` has a bit for each that can come and go."""

    def __init__(self, state: HotplugState, places: int) -> None:
        self.state = state
        self._places = places
        self._ejected = 0

    @property
    def irq(self) -> bool:
        return bool(self.state.new | self.state.gone)

    def announce(self, place: int) -> None:
        self.state.new |= 1 << place & self._places

    def request(self, place: int) -> None:
        self.state.gone |= 1 << place & self._places

    def forget(self, place: int) -> None:
        self.state.new &= ~(1 << place)
        self.state.gone &= ~(1 << place)

    def eject(self, places: int) -> None:
        """The guest has given these up."""
        self._ejected |= places & self._places

    def take_ejected(self) -> list[int]:
        ejected, self._ejected = self._ejected, 0
        return [place for place in range(ejected.bit_length()) if ejected >> place & 1]

    @abstractmethod
    def read(self, offset: int, size: int) -> int: ...

    @abstractmethod
    def write(self, offset: int, size: int, value: int) -> None: ...


HotplugT = TypeVar("HotplugT", bound=HotplugCore)


class HotplugAdapter(Adapter[HotplugT]):
    """The registers on a machine. ``event`` is driven while there is something to ask for;
    ``eject`` takes out what the guest has given up, on a vCPU's thread."""

    def __init__(
        self, core: HotplugT, event: Callable[[bool], None], eject: Callable[[int], None]
    ) -> None:
        super().__init__(core, event)
        self._eject = eject

    def announce(self, place: int) -> None:
        """Something has come there; from any thread."""
        with self._lock:
            self._core.announce(place)
        self._line.update()

    def request(self, place: int) -> None:
        """Asks the guest to give up what is there; from any thread."""
        with self._lock:
            self._core.request(place)
        self._line.update()

    def forget(self, place: int) -> None:
        """Nothing is asked of the guest any more that concerns it."""
        with self._lock:
            self._core.forget(place)
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return self._core.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._core.write(offset, size, value)
            ejected = self._core.take_ejected()
        self._line.update()
        for place in ejected:
            self._eject(place)
