"""Hot-plug of PCI functions: three registers that the DSDT's methods use (docs/pci.md).

The same in kind as QEMU's "ACPI PCI hotplug interface" (docs/specs/acpi_pci_hotplug.rst there), but
a request stays until the guest has confirmed it, and so does the general-purpose event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, register

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
class PciHotplugState(DeviceState):
    kind = "pci_hotplug"

    new: int = register(0, ALL_SLOTS)
    gone: int = register(0, ALL_SLOTS)


class PciHotplugCore:
    def __init__(self) -> None:
        self.state = PciHotplugState()
        self._ejected = 0

    @property
    def irq(self) -> bool:
        return bool(self.state.new | self.state.gone)

    def announce(self, slot: int) -> None:
        self.state.new |= 1 << slot & ALL_SLOTS

    def request(self, slot: int) -> None:
        self.state.gone |= 1 << slot & ALL_SLOTS

    def forget(self, slot: int) -> None:
        self.state.new &= ~(1 << slot)
        self.state.gone &= ~(1 << slot)

    def take_ejected(self) -> list[int]:
        ejected, self._ejected = self._ejected, 0
        return [slot for slot in range(32) if ejected >> slot & 1]

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
                self._ejected |= value & ALL_SLOTS


class PciHotplug(Adapter[PciHotplugCore]):
    """The registers on a machine. ``event`` is driven while there is something to ask for;
    ``eject`` takes a function out of its slot, on a vCPU's thread."""

    def __init__(self, event: Callable[[bool], None], eject: Callable[[int], None]) -> None:
        super().__init__(PciHotplugCore(), event)
        self._eject = eject

    def announce(self, slot: int) -> None:
        """There is a new function; from any thread."""
        with self._lock:
            self._core.announce(slot)
        self._line.update()

    def request(self, slot: int) -> None:
        """Asks the guest to give a function up; from any thread."""
        with self._lock:
            self._core.request(slot)
        self._line.update()

    def forget(self, slot: int) -> None:
        """The slot is empty."""
        with self._lock:
            self._core.forget(slot)
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return self._core.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._core.write(offset, size, value)
            ejected = self._core.take_ejected()
        self._line.update()
        for slot in ejected:
            self._eject(slot)
