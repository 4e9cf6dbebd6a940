"""Hot-plug of vCPUs: a register of a byte for each, which the DSDT's methods use (docs/cpu.md).

It does what QEMU's "ACPI CPU hotplug interface" does (docs/specs/acpi_cpu_hotplug.rst there),
without its selector: so no method has to keep others from the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._hotplug import HotplugAdapter, HotplugCore, HotplugState
from tetrarch.devices._state import register

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
class CpuHotplugState(HotplugState):
    kind = "cpu_hotplug"

    new: int = register(0, _ALL)
    gone: int = register(0, _ALL)


class CpuHotplugCore(HotplugCore):
    """``there`` has a bit for each vCPU that is in the machine: it is no state of the device."""

    def __init__(self, count: int) -> None:
        """``count``: vCPUs that the machine can have."""
        super().__init__(CpuHotplugState(), (1 << count) - 1)
        self.there = 0
        self._count = count

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
            self.eject(1 << offset)


class CpuHotplug(HotplugAdapter[CpuHotplugCore]):
    def __init__(
        self, count: int, event: Callable[[bool], None], eject: Callable[[int], None]
    ) -> None:
        super().__init__(CpuHotplugCore(count), event, eject)

    def set_there(self, vcpu: int, there: bool) -> None:
        """From any thread. Nothing is asked of the guest any more that concerns it."""
        with self._lock:
            self._core.there = self._core.there & ~(1 << vcpu) | there << vcpu
        self.forget(vcpu)
