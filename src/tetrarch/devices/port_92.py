"""System Control Port A, port 0x92 (IBM PS/2; PORT92 of the Intel ICH9 data sheet, 13.7.2).

Its INIT is a way to reset a PC: Linux and boot loaders fall back on it. An INIT keeps memory and
chips and sends the CPU to its reset vector at 0xFFFFFFF0, where firmware tells by CMOS memory
what is wanted. There is no firmware here, so the whole machine is reset, as by the other ports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, register

__all__ = ["PORTS", "PORT_BASE", "Port92", "Port92State"]

PORT_BASE: Final = 0x92
PORTS: Final = 1

INIT_NOW: Final = 0x01
ALT_A20_GATE: Final = 0x02


@dataclass
class Port92State(DeviceState):
    kind = "port_92"

    # A20 is open, as firmware leaves it.
    value: int = register(ALT_A20_GATE, INIT_NOW | ALT_A20_GATE)


class Port92:
    """Calls ``reset`` on the rising edge of INIT_NOW.

    ALT_A20_GATE only reads back: A20 stays open, since no guest of ours needs it shut.
    """

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.state = Port92State()

    def read(self, offset: int, size: int) -> int:
        if offset != 0 or size < 1:
            return all_ones(size)
        return all_ones(size) & ~0xFF | self.state.value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != 0 or size < 1:
            return
        rises = value & ~self.state.value & INIT_NOW
        self.state.value = value & (INIT_NOW | ALT_A20_GATE)
        if rises:
            self._reset()

    def reset(self) -> None:
        self.state.reset()

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)
