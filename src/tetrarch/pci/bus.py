"""The PCI bus: slots, the two ways into configuration space, and where BARs go at power-on.

Type 1 access by ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2), and ECAM: a page of memory
for each function (PCI Express Base 5.0, 7.2.2). Both show the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.layout import align_up
from tetrarch.devices._access import MAX_ACCESS, all_ones
from tetrarch.devices._state import DeviceState, State, register
from tetrarch.errors import ConfigError
from tetrarch.machine import map as machine_map
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.pci.chipset import (
    ISA_SLOT,
    POWER_FUNCTION,
    host_bridge,
    isa_bridge,
    power_management,
)
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
    "place_bars",
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
    """Bus 0. Attach ``address_port``, ``data_ports`` and ``ecam``; then plug functions.

    ``chipset``: with the one that firmware knows, which has slot 0 and another.

    Lock: ``_lock``, held for a change of the slots; then a function's.
    """

    def __init__(self, vm: EngineVm, *, chipset: bool = False) -> None:
        self.state = PciConfigState()
        self.address_port = PciAddressPort(self.state)
        self.data_ports = PciDataPorts(self)
        self.ecam = PciEcam(self)
        self._vm = vm
        self._lock = threading.Lock()
        self._slots: dict[int, PciFunction] = {}
        self._bridge = (
            host_bridge(vm) if chipset else PciFunction(vm, HOST_BRIDGE, interrupt_pin=False)
        )
        self.plug(self._bridge, slot=0)
        self._isa: dict[int, PciFunction] = {}
        """The functions of the slot that alone has several."""
        if chipset:
            self._isa = {0: isa_bridge(vm), POWER_FUNCTION: power_management(vm)}
            self.plug(self._isa[0], slot=ISA_SLOT)

    def plug(self, function: PciFunction, slot: int | None = None) -> int:
        """Puts a function into a slot, a free one if none is given, and places its BARs."""
        with self._lock:
            free = [one for one in range(SLOTS) if one not in self._slots]
            if slot is None and free:
                slot = free[0]
            if slot is None or slot not in free:
                what = "all slots of the PCI bus are" if slot is None else f"PCI slot {slot} is"
                raise ConfigError(f"{what} taken", mend="give the machine fewer devices")
            places = place_bars(function, self._slots.values(), self._vm.ram)
            function.plug(self._vm.irq_source(machine_map.pci_gsi(slot, pin=0)))
            for bar, address in places:
                function.set_address(bar, address)
            self._slots[slot] = function
        return slot

    def unplug(self, slot: int) -> None:
        with self._lock:
            self._slots.pop(slot).unplug()

    def function(self, slot: int) -> PciFunction | None:
        with self._lock:
            return self._slots.get(slot)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """Configuration space of (slot << 3 | function number); all ones where nobody is."""
        function = self._at(devfn)
        if function is None or offset + size > CONFIG_BYTES:
            return all_ones(size)
        return function.read_config(offset, size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        function = self._at(devfn)
        if function is not None and offset + size <= CONFIG_BYTES:
            function.write_config(offset, size, value)

    def _at(self, devfn: int) -> PciFunction | None:
        slot, number = devfn >> 3, devfn & 7
        if number:
            return self._isa.get(number) if slot == ISA_SLOT else None
        return self.function(slot)

    def reset(self) -> None:
        """The mechanism and the bridges; a device resets its own function, then ``place``."""
        self.state.reset()
        self._bridge.reset()
        for function in self._isa.values():
            function.reset()

    def place(self) -> None:
        """Gives each BAR an address again, as firmware does after a reset."""
        with self._lock:
            placed: list[PciFunction] = []
            for _, function in sorted(self._slots.items()):
                for bar, address in place_bars(function, placed, self._vm.ram):
                    function.set_address(bar, address)
                placed.append(function)

    def save(self) -> State:
        isa = {str(number): function.save() for number, function in self._isa.items()}
        return {**self.state.save(), "bridge": self._bridge.save(), "isa": isa}

    def load(self, state: State) -> None:
        self.state.load(state)
        self._bridge.load(state.get("bridge", {}))
        isa = state.get("isa")
        for number, function in self._isa.items():
            function.load(isa.get(str(number), {}) if isinstance(isa, dict) else {})


#: From this size on a 64-bit BAR goes above 4 GiB.
LARGE: Final = 64 << 20


def place_bars(
    function: PciFunction, others: Iterable[PciFunction], ram: Sequence[tuple[int, int]]
) -> list[tuple[Bar, int]]:
    """Addresses for the BARs of a function, as firmware would choose: each aligned to its size,
    large ones of 64 bits above RAM; beside those of ``others``, wherever a driver has moved them.
    """
    taken = {
        io: [
            (other.address(bar), bar.size) for other in others for bar in other.bars if bar.io is io
        ]
        for io in (False, True)
    }
    places = []
    for bar in sorted(function.bars, key=lambda bar: -bar.size):
        if bar.io:
            window = machine_map.PCI_IO
        elif bar.wide and bar.size >= LARGE:
            window = machine_map.high_window(ram)
        else:
            window = machine_map.PCI_LOW
        address = _find_room(window, bar.size, taken[bar.io])
        taken[bar.io].append((address, bar.size))
        places.append((bar, address))
    return places


def _find_room(window: tuple[int, int], size: int, taken: Iterable[tuple[int, int]]) -> int:
    first, end = window
    at = align_up(first, size)
    for start, length in sorted(taken):
        if start < at + size and at < start + length:
            at = align_up(start + length, size)
    if at + size > end:
        raise ConfigError(
            f"no room for {size:#x} bytes of a PCI device", mend="give the machine fewer devices"
        )
    return at


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
