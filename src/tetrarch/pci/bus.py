"""The PCI bus: slots, the two ways into configuration space, and where BARs go at power-on.

Type 1 access by ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2), and ECAM: a page of memory
for each function (PCI Express Base 5.0, 7.2.2). Both show the same.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import MAX_ACCESS, all_ones
from tetrarch.devices._state import DeviceState, State, register
from tetrarch.errors import ConfigError
from tetrarch.machine import map as machine_map
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.pci.config_space import CONFIG_BYTES
from tetrarch.pci.function import Bar, Identity, PciFunction

__all__ = [
    "ADDRESS_PORT",
    "DATA_PORT",
    "DATA_PORTS",
    "SLOTS",
    "PciAddressPort",
    "PciBus",
    "PciConfigState",
    "PciDataPorts",
    "PciEcam",
]

#: Takes dwords alone: bytes there are ordinary ports, such as the reset register.
ADDRESS_PORT: Final = 0xCF8
DATA_PORT: Final = 0xCFC
DATA_PORTS: Final = 4

ENABLE: Final = 1 << 31
#: Bus, device, function and register; bits 24 to 30 and the low two are reserved and 0.
ADDRESS_MASK: Final = ENABLE | 0x00FF_FFFC

SLOTS: Final = 32

#: A host bridge that guests know as QEMU's for PCI Express machines: they look for one before
#: they trust the mechanism (Linux, arch/x86/pci/direct.c, pci_sanity_check). It has nothing to
#: configure, and no chipset's registers are expected of it.
HOST_BRIDGE: Final = Identity(0x1B36, 0x0008, 0x060000)


@dataclass
class PciConfigState(DeviceState):
    kind = "pci_config"

    address: int = register(0, ADDRESS_MASK)


class PciBus:
    """Bus 0. Attach ``address_port``, ``data_ports`` and ``ecam``; then plug functions."""

    def __init__(self, vm: EngineVm) -> None:
        self.state = PciConfigState()
        self.address_port = PciAddressPort(self.state)
        self.data_ports = PciDataPorts(self)
        self.ecam = PciEcam(self)
        self._vm = vm
        self._lock = threading.Lock()
        self._slots: dict[int, PciFunction] = {}
        self._windows = _Windows(vm)
        self.plug(PciFunction(vm, HOST_BRIDGE, interrupt_pin=False), slot=0)

    @property
    def slots(self) -> dict[int, PciFunction]:
        with self._lock:
            return dict(self._slots)

    def plug(self, function: PciFunction, slot: int | None = None) -> int:
        """Puts a function into a slot, a free one if none is given, and places its BARs."""
        with self._lock:
            free = [one for one in range(SLOTS) if one not in self._slots]
            if slot is None and free:
                slot = free[0]
            if slot is None or slot not in free:
                what = "all slots of the PCI bus are" if slot is None else f"PCI slot {slot} is"
                raise ConfigError(f"{what} taken", mend="give the machine fewer devices")
        function.plug(self._vm.irq_source(machine_map.pci_gsi(slot, pin=0)))
        self._windows.place(function)
        with self._lock:
            self._slots[slot] = function
        return slot

    def unplug(self, slot: int) -> None:
        with self._lock:
            function = self._slots.pop(slot)
        function.unplug()
        self._windows.forget(function)

    def function(self, slot: int) -> PciFunction | None:
        with self._lock:
            return self._slots.get(slot)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """Configuration space of (slot << 3 | function number); all ones where nobody is."""
        function = self.function(devfn >> 3)
        if function is None or devfn & 7 or offset + size > CONFIG_BYTES:
            return all_ones(size)
        return function.read_config(offset, size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        function = self.function(devfn >> 3)
        if function is not None and not devfn & 7 and offset + size <= CONFIG_BYTES:
            function.write_config(offset, size, value)

    def reset(self) -> None:
        """The mechanism and the bridge; a device resets its own function, then ``place``."""
        self.state.reset()

    def place(self) -> None:
        """Gives each BAR an address again, as firmware does after a reset."""
        for function in self.slots.values():
            self._windows.place(function)

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)


class _Windows:
    """Where the BARs of the bus go, as firmware would choose: each aligned to its size, large
    ones of 64 bits above RAM. What a driver moves elsewhere is its own affair."""

    #: From this size on a 64-bit BAR goes above 4 GiB.
    LARGE: Final = 64 << 20

    def __init__(self, vm: EngineVm) -> None:
        high = machine_map.high_window(vm.ram)
        self._ranges = {
            "io": machine_map.PCI_IO,
            "low": machine_map.PCI_LOW,
            "high": (high[0], high[1]),
        }
        self._taken: dict[int, list[tuple[str, int, int, Bar]]] = {}

    def place(self, function: PciFunction) -> None:
        mine = self._taken.setdefault(id(function), [])
        if not mine:
            for bar in sorted(function.bars, key=lambda bar: -bar.size):
                name = "io" if bar.io else "high" if bar.wide and bar.size >= self.LARGE else "low"
                mine.append((name, self._find(name, bar.size), bar.size, bar))
        for _, address, _, bar in mine:
            function.set_address(bar, address)

    def _find(self, name: str, size: int) -> int:
        first, end = self._ranges[name]
        used = sorted(
            (address, address + length)
            for places in self._taken.values()
            for window, address, length, _ in places
            if window == name
        )
        at = -(-first // size) * size
        for start, stop in used:
            if at + size <= start:
                break
            at = max(at, -(-stop // size) * size)
        if at + size > end:
            raise ConfigError(
                f"no room for {size:#x} bytes of a PCI device", mend="give the machine fewer"
            )
        return at

    def forget(self, function: PciFunction) -> None:
        self._taken.pop(id(function), None)


class PciAddressPort:
    def __init__(self, state: PciConfigState) -> None:
        self._state = state

    def read(self, offset: int, size: int) -> int:
        return self._state.address if offset == 0 and size == 4 else all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self._state.address = value & ADDRESS_MASK


class PciDataPorts:
    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def _target(self, offset: int, size: int) -> tuple[int, int] | None:
        """(devfn, register) of an access that stays in its dword, if it is of bus 0."""
        address = self._bus.state.address
        if not address & ENABLE or address >> 16 & 0xFF or not 0 <= offset <= DATA_PORTS - size:
            return None
        return address >> 8 & 0xFF, (address & 0xFC) + offset

    def read(self, offset: int, size: int) -> int:
        target = self._target(offset, min(size, MAX_ACCESS))
        if target is None:
            return all_ones(size)  # nobody answers: master abort
        return self._bus.read(*target, size)

    def write(self, offset: int, size: int, value: int) -> None:
        target = self._target(offset, min(size, MAX_ACCESS))
        if target is not None:
            self._bus.write(*target, size, value)


class PciEcam:
    """A page for each function of bus 0."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        if offset % size:
            return all_ones(size)
        return self._bus.read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset % size == 0:
            self._bus.write(offset >> 12, offset & 0xFFF, size, value)
