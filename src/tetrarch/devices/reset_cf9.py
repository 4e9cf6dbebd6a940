"""The reset control register at port 0xCF9 (Intel PIIX3 data sheet, 3.3.4), ACPI's RESET_REG."""

from collections.abc import Callable
from typing import Final

from tetrarch.devices import _state
from tetrarch.devices._access import all_ones

__all__ = ["PORTS", "PORT_BASE", "RESET_VALUE", "ResetCf9"]

PORT_BASE: Final = 0xCF9
PORTS: Final = 1
#: A hard reset: SYS_RST and RST_CPU. It is what the FADT tells guests to write.
RESET_VALUE: Final = 0x06

SYS_RST: Final = 0x02
RST_CPU: Final = 0x04
FULL_RST: Final = 0x08


class ResetCf9:
    """Calls ``reset`` when the guest resets the machine."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        if offset != 0 or size < 1:
            return all_ones(size)
        return all_ones(size) & ~0xFF | self._value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != 0 or size < 1:
            return
        # RST_CPU reads as 0 after the reset that its rising edge causes.
        self._value = value & (SYS_RST | FULL_RST)
        if value & RST_CPU:
            self._reset()

    def save(self) -> _state.State:
        return {"device": "reset_cf9", "version": 1, "value": self._value}

    def load(self, state: _state.State) -> None:
        _state.check(state, "reset_cf9", 1)
        self._value = int(state["value"]) & (SYS_RST | FULL_RST)
