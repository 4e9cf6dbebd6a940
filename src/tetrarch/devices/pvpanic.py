"""A port by which a guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst).

ACPI tells which port; QEMU's own, 0x505, is left to whoever attaches devices there.
"""

from collections.abc import Callable
from typing import Final

from tetrarch.devices._access import all_ones

__all__ = ["ACPI_ID", "PORTS", "PORT_BASE", "PvPanic"]

PORT_BASE: Final = 0x610
PORTS: Final = 1
#: Linux's driver and Windows' find it by this.
ACPI_ID: Final = "QEMU0001"

#: The host is to see to it.
PANICKED: Final = 0x01
#: The guest sees to it itself: it starts its crash kernel.
CRASH_LOADED: Final = 0x02


class PvPanic:
    """Calls what hears of either. It has no state."""

    def __init__(self, panicked: Callable[[], None], crash_loaded: Callable[[], None]) -> None:
        self._panicked = panicked
        self._crash_loaded = crash_loaded

    def read(self, offset: int, size: int) -> int:
        """The events that it knows."""
        if offset != 0 or size < 1:
            return all_ones(size)
        return all_ones(size) & ~0xFF | PANICKED | CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != 0 or size < 1:
            return
        if value & PANICKED:
            self._panicked()
        elif value & CRASH_LOADED:
            self._crash_loaded()
