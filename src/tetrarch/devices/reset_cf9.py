"""The reset control register at port 0xCF9 (Intel PIIX3 data sheet, 3.3.4), ACPI's RESET_REG."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, register

__all__ = ["PORTS", "PORT_BASE", "RESET_VALUE", "ResetCf9", "ResetCf9State"]

PORT_BASE: Final = 0xCF9
PORTS: Final = 1
#: A hard reset: SYS_RST and RST_CPU. It is what the FADT tells guests to write.
RESET_VALUE: Final = 0x06

SYS_RST: Final = 0x02
RST_CPU: Final = 0x04
FULL_RST: Final = 0x08


@dataclass
class ResetCf9State(DeviceState):
    kind = "reset_cf9"

    value: int = register(0, SYS_RST | FULL_RST)


class ResetCf9:
    """Calls ``reset`` when the guest resets the machine."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.state = ResetCf9State()

    def read(self, offset: int, size: int) -> int:
        if offset != 0 or size < 1:
            return all_ones(size)
        return all_ones(size) & ~0xFF | self.state.value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != 0 or size < 1:
            return
        # RST_CPU reads as 0 after the reset that its rising edge causes.
        self.state.value = value & (SYS_RST | FULL_RST)
        if value & RST_CPU:
            self._reset()

    def reset(self) -> None:
        self.state.reset()

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)
