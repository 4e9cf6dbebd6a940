"""Hot-plug of PCI functions: three registers that the DSDT's methods use (docs/pci.md).

The same in kind as QEMU's "ACPI PCI hotplug interface" (docs/specs/acpi_pci_hotplug.rst there), but
for how long a request stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._hotplug import HotplugAdapter, HotplugCore, HotplugState
from tetrarch.devices._state import register

__all__ = ["EJECT", "GONE", "NEW", "PORTS", "PciHotplug", "PciHotplugCore", "PciHotplugState"]

# Registers of 32 bits, a bit for each slot, accessed as a whole.
#: Slots that have a new function. Ones that are written clear.
NEW: Final = 0
#: Slots whose function is to be given up. Ones that are written clear.
GONE: Final = 4
#: Written: the slots whose function the guest has given up. Reads as 0.
EJECT: Final = 8
PORTS: Final = 12

ALL_SLOTS: Final = 0xFFFF_FFFE
"""But the host bridge's."""


@dataclass
class PciHotplugState(HotplugState):
    kind = "pci_hotplug"

    new: int = register(0, ALL_SLOTS)
    gone: int = register(0, ALL_SLOTS)


class PciHotplugCore(HotplugCore):
    def __init__(self) -> None:
        super().__init__(PciHotplugState(), ALL_SLOTS)

    def read(self, offset: int, size: int) -> int:
        if size != 4:
            return all_ones(size)
        match offset:
            case 0:
                return self.state.new
            case 4:
                return self.state.gone
            case 8:
                return 0
            case _:
                return all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        match offset:
            case 0:
                self.state.new &= ~value
            case 4:
                self.state.gone &= ~value
            case 8:
                self.eject(value)


class PciHotplug(HotplugAdapter[PciHotplugCore]):
    def __init__(self, event: Callable[[bool], None], eject: Callable[[int], None]) -> None:
        super().__init__(PciHotplugCore(), event, eject)
