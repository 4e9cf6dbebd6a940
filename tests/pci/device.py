"""A PCI device to plug in: registers that remember, in memory and ports, and interrupts."""

from __future__ import annotations

from typing import Final

from tetrarch._native import MsiVectors, MsixTable, Vm
from tetrarch.devices._access import all_ones
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.pci import Bar, BarPart, Identity, PciFunction

VENDOR, DEVICE = 0x1B36, 0x0005
REGISTERS_BAR, PORTS_BAR, MSIX_BAR = 0, 2, 4
VECTORS: Final = 4


class Registers:
    """Bytes that remember, and count how often they were touched."""

    def __init__(self, length: int, fill: int = 0) -> None:
        self.data = bytearray([fill] * length)
        self.accesses = 0

    def read(self, offset: int, size: int) -> int:
        self.accesses += 1
        return int.from_bytes(self.data[offset : offset + size], "little") & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses += 1
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class Device:
    """With BARs of every kind: 32 bits, ports, and 64 bits with the table of MSI-X."""

    def __init__(self, vm: EngineVm) -> None:
        assert isinstance(vm, Vm)
        self.registers = Registers(0x1000, fill=0xAB)
        self.ports = Registers(32)
        self.msix = MsixTable(vm, VECTORS)
        self.msi = MsiVectors(vm, VECTORS)
        bars = [
            Bar(REGISTERS_BAR, 0x1000, [BarPart(0, 0x1000, self.registers)]),
            Bar(PORTS_BAR, 32, [BarPart(0, 32, self.ports)], io=True),
            Bar(MSIX_BAR, 0x1000, [BarPart(0, 0x1000, self.msix)], wide=True, prefetchable=True),
        ]
        self.function = PciFunction(vm, Identity(VENDOR, DEVICE, 0xFF0000), bars)
        self.function.add_msi(self.msi)
        self.function.add_msix(self.msix, MSIX_BAR)
