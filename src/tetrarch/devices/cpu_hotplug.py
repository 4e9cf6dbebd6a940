"""Hot-plug of vCPUs: a register of a byte for each, which the DSDT's methods use (docs/cpu.md).

It does what QEMU's "ACPI CPU hotplug interface" does (docs/specs/acpi_cpu_hotplug.rst there),
without its selector: so no method has to keep others from the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, register

__all__ = [
    "EJECT",
    "GONE",
    "NEW",
    "PORTS",
    "THERE",
    "CpuHotplug",
    "CpuHotplugCore",
    "CpuHotplugState",
]

#: A port for each vCPU that a machine can have, and one more.
PORTS: Final = 256

# Bits of a vCPU's register.
#: Reads as 1 where it is in the machine.
THERE: Final = 1 << 0
#: It has come. A one that is written clears.
NEW: Final = 1 << 1
#: It is to be given up. A one that is written clears.
GONE: Final = 1 << 2
#: Written: the guest has given it up. Reads as 0.
EJECT: Final = 1 << 3

_ALL: Final = (1 << PORTS) - 1


@dataclass
class CpuHotplugState(DeviceState):
    kind = "cpu_hotplug"

    new: int = register(0, _ALL)
    gone: int = register(0, _ALL)


class CpuHotplugCore:
    """``there`` has a bit for each vCPU that is in the machine: it is no state of the device."""

    def __init__(self, count: int) -> None:
        """``count``: vCPUs that the machine can have."""
        self.state = CpuHotplugState()
        self.there = 0
        self._count = count
        self._ejected = 0

    @property
    def irq(self) -> bool:
        return bool(self.state.new | self.state.gone)

    def announce(self, vcpu: int) -> None:
        self.state.new |= 1 << vcpu

    def request(self, vcpu: int) -> None:
        self.state.gone |= 1 << vcpu

    def forget(self, vcpu: int) -> None:
        self.state.new &= ~(1 << vcpu)
        self.state.gone &= ~(1 << vcpu)

    def take_ejected(self) -> list[int]:
        ejected, self._ejected = self._ejected, 0
        return [vcpu for vcpu in range(self._count) if ejected >> vcpu & 1]

    def read(self, offset: int, size: int) -> int:
        if size != 1 or not 0 <= offset < self._count:
            return all_ones(size)
        bits = ((self.there, THERE), (self.state.new, NEW), (self.state.gone, GONE))
        return sum(bit for vcpus, bit in bits if vcpus >> offset & 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1 or not 0 <= offset < self._count:
            return
        if value & NEW:
            self.state.new &= ~(1 << offset)
        if value & GONE:
            self.state.gone &= ~(1 << offset)
        if value & EJECT:
            self._ejected |= 1 << offset


class CpuHotplug(Adapter[CpuHotplugCore]):
    """The registers on a machine. ``event`` is driven while there is something to ask for;
    ``eject`` takes a vCPU out of the machine, on another's thread or its own."""

    def __init__(
        self, count: int, event: Callable[[bool], None], eject: Callable[[int], None]
    ) -> None:
        super().__init__(CpuHotplugCore(count), event)
        self._eject = eject

    def set_there(self, vcpu: int, there: bool) -> None:
        """From any thread. Nothing is asked of the guest any more that concerns it."""
        with self._lock:
            self._core.there = self._core.there & ~(1 << vcpu) | there << vcpu
            self._core.forget(vcpu)
        self._line.update()

    def announce(self, vcpu: int) -> None:
        """It has come; from any thread."""
        with self._lock:
            self._core.announce(vcpu)
        self._line.update()

    def request(self, vcpu: int) -> None:
        """Asks the guest to give a vCPU up; from any thread."""
        with self._lock:
            self._core.request(vcpu)
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return self._core.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._core.write(offset, size, value)
            ejected = self._core.take_ejected()
        self._line.update()
        for vcpu in ejected:
            self._eject(vcpu)
