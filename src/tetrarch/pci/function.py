"""A PCI function: what a device has that sits on the bus (PCI Local Bus 3.0, section 6)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, Intx, MsixTable
from tetrarch.devices._state import State
from tetrarch.errors import StateError
from tetrarch.machine.engine_vm import BusRegion, EngineVm, InterruptWire
from tetrarch.pci.config_space import ConfigSpace

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device

__all__ = ["Bar", "BarPart", "Identity", "PciFunction"]

# Registers of the type 0 header (6.1), and of capabilities.
COMMAND: Final = 0x04
STATUS: Final = 0x06
BAR_0: Final = 0x10
BARS: Final = 6
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
FIRST_CAPABILITY: Final = 0x40

# Command (6.2.2) and status (6.2.3).
IO_SPACE: Final = 1 << 0
MEMORY_SPACE: Final = 1 << 1
BUS_MASTER: Final = 1 << 2
INTX_DISABLE: Final = 1 << 10
COMMAND_BITS: Final = IO_SPACE | MEMORY_SPACE | BUS_MASTER | INTX_DISABLE
INTERRUPT_STATUS: Final = 1 << 3
CAPABILITY_LIST: Final = 1 << 4

MSIX_CAPABILITY: Final = 0x11
MSIX_ENABLE: Final = 1 << 15
MSIX_MASK: Final = 1 << 14

#: Where the regions of BARs are until a driver places them: no address of a guest's.
_PARKING: Final = 1 << 60


@dataclass(frozen=True)
class Identity:
    vendor: int
    device: int
    class_code: int
    """Base class, sub-class and interface: 0x010802 is an NVMe controller."""
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True)
class BarPart:
    """A device that answers in a part of a BAR."""

    offset: int
    length: int
    device: Device


@dataclass(frozen=True)
class Bar:
    """A base address register: what it maps. Sizes are powers of 2."""

    index: int
    size: int
    parts: Sequence[BarPart]
    io: bool = False
    wide: bool = False
    """64 bits: takes the next index too."""
    prefetchable: bool = False

    @property
    def kind(self) -> int:
        """The low bits that a driver reads (6.2.5.1)."""
        if self.io:
            return 0x1
        return (0x4 if self.wide else 0) | (0x8 if self.prefetchable else 0)


class PciFunction:
    """Configuration space, and the regions of the bus that its registers move.

    Hooks of capabilities are called with (offset in the capability, size) after a write.
    """

    def __init__(
        self,
        vm: EngineVm,
        identity: Identity,
        bars: Sequence[Bar] = (),
        *,
        interrupt_pin: bool = True,
        read_hook: Callable[[int, int], int | None] | None = None,
    ) -> None:
        self.config = ConfigSpace()
        self.bars = tuple(bars)
        self._vm = vm
        self._lock = threading.Lock()
        self._regions: dict[int, list[tuple[int, BusRegion]]] = {}
        self._hooks: list[tuple[int, int, Callable[[int, int], None]]] = []
        self._read_hook = read_hook
        self._next_capability = FIRST_CAPABILITY
        self._last_pointer = CAPABILITIES
        self._msix: tuple[int, MsixTable] | None = None
        self.intx = Intx()
        """The interrupt line; the device sets it, from any thread."""
        self._define(identity, interrupt_pin)

    def _define(self, identity: Identity, interrupt_pin: bool) -> None:
        define = self.config.define
        define(0x00, 2, identity.vendor)
        define(0x02, 2, identity.device)
        define(COMMAND, 2, 0, COMMAND_BITS)
        define(0x08, 1, identity.revision)
        define(0x09, 3, identity.class_code)
        define(0x0C, 1, 0, 0xFF)  # cache line size
        define(0x2C, 2, identity.subsystem_vendor)
        define(0x2E, 2, identity.subsystem)
        define(INTERRUPT_LINE, 1, 0, 0xFF)
        define(INTERRUPT_LINE + 1, 1, 1 if interrupt_pin else 0)  # INTA#
        for bar in self.bars:
            low = ~(bar.size - 1) & 0xFFFF_FFFF
            define(BAR_0 + 4 * bar.index, 4, bar.kind, low & (~3 if bar.io else ~0xF))
            if bar.wide:
                define(BAR_0 + 4 * bar.index + 4, 4, 0, ~(bar.size - 1) >> 32 & 0xFFFF_FFFF)

    def add_capability(
        self,
        identifier: int,
        body: bytes,
        writable: bytes = b"",
        hook: Callable[[int, int], None] | None = None,
    ) -> int:
        """Adds one to the list (6.7); gives its offset. ``body`` begins behind the pointer."""
        at = self._next_capability
        self._next_capability = (at + 2 + len(body) + 3) & ~3
        if self._next_capability > 0x100:
            raise ValueError("the capabilities do not fit into configuration space")
        self.config.define(self._last_pointer, 1, at)
        self.config.define(at, 2, identifier)
        self._last_pointer = at + 1
        mask = writable.ljust(len(body), b"\0")
        for index, byte in enumerate(body):
            self.config.define(at + 2 + index, 1, byte, mask[index])
        self.config.define(STATUS, 2, CAPABILITY_LIST)
        if hook is not None:
            self._hooks.append((at, at + 2 + len(body), hook))
        return at

    def add_msix(self, table: MsixTable, bar: int) -> None:
        """The MSI-X capability of a table that is a page at the start of a BAR (6.8.2)."""
        control = (table.vectors - 1).to_bytes(2, "little")
        places = bar.to_bytes(4, "little") + (MsixTable.PENDING_OFFSET | bar).to_bytes(4, "little")
        writable = (MSIX_ENABLE | MSIX_MASK).to_bytes(2, "little")
        at = self.add_capability(
            MSIX_CAPABILITY, control + places, writable, lambda offset, size: self._update_msix()
        )
        self._msix = at + 2, table

    def _update_msix(self) -> None:
        if self._msix is not None:
            at, table = self._msix
            control = self.config.get(at, 2)
            table.set_control(bool(control & MSIX_ENABLE), bool(control & MSIX_MASK))

    @property
    def bus_master(self) -> bool:
        return bool(self.config.get(COMMAND, 2) & BUS_MASTER)

    # On the bus

    def plug(self, wire: InterruptWire) -> None:
        """Attaches the regions, mapped nowhere; ``wire`` is that of its interrupt line."""
        self.intx.connect(wire)
        parking = _PARKING
        for bar in self.bars:
            attach = self._vm.attach_ports if bar.io else self._vm.attach_mmio
            regions = self._regions[bar.index] = []
            for part in bar.parts:
                while True:
                    base = 0xF000_0000 + parking - _PARKING if bar.io else parking
                    try:
                        region = attach(base, part.length, part.device)
                        break
                    except EngineError:
                        if parking >= _PARKING << 1:
                            raise
                        parking += 1 << 32
                region.unmap()
                regions.append((part.offset, region))

    def unplug(self) -> None:
        """Gives the regions back: no access reaches the devices any more."""
        with self._lock:
            for regions in self._regions.values():
                for _, region in regions:
                    region.detach()
            self._regions.clear()
            self.intx.connect(None)

    def read_config(self, offset: int, size: int) -> int:
        if self._read_hook is not None:
            value = self._read_hook(offset, size)
            if value is not None:
                return value
        with self._lock:
            if offset <= STATUS < offset + size:
                status = self.config.get(STATUS, 1) & ~INTERRUPT_STATUS
                self.config.set(STATUS, 1, status | (INTERRUPT_STATUS if self.intx.level else 0))
            return self.config.get(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        end = offset + size
        with self._lock:
            self.config.write(offset, size, value)
            if offset < BAR_0 + 4 * BARS and end > COMMAND:
                self._place()
        for first, last, hook in self._hooks:
            if offset < last and end > first:
                hook(offset - first, size)

    def address(self, bar: Bar) -> int:
        """Where a BAR is, whether or not it answers there."""
        at = BAR_0 + 4 * bar.index
        low = self.config.get(at, 4) & (~3 if bar.io else ~0xF)
        return low | (self.config.get(at + 4, 4) << 32 if bar.wide else 0)

    def set_address(self, bar: Bar, address: int) -> None:
        """As firmware does it."""
        with self._lock:
            at = BAR_0 + 4 * bar.index
            self.config.write(at, 4, address & 0xFFFF_FFFF)
            if bar.wide:
                self.config.write(at + 4, 4, address >> 32)
            self._place()

    def _place(self) -> None:
        """Moves the regions to where the registers say; ``_lock`` is held."""
        command = self.config.get(COMMAND, 2)
        self.intx.set_disabled(bool(command & INTX_DISABLE))
        for bar in self.bars:
            on = command & (IO_SPACE if bar.io else MEMORY_SPACE)
            base = self.address(bar)
            for offset, region in self._regions.get(bar.index, ()):
                if not on or base == 0:
                    if region.mapped:
                        region.unmap()
                    continue
                try:
                    if region.base != base + offset:
                        region.move(base + offset)
                    if not region.mapped:
                        region.map()
                except EngineError:  # past the last address: nothing answers
                    if region.mapped:
                        region.unmap()

    # Life

    def reset(self) -> None:
        with self._lock:
            self.config.reset()
            self._place()
        self.intx.set(False)
        if self._msix is not None:
            self._msix[1].reset()

    def save(self) -> State:
        with self._lock:
            state: State = {"config": self.config.save(), "intx": self.intx.level}
        if self._msix is not None:
            words, pending = self._msix[1].save()
            state["msix_table"], state["msix_pending"] = words, [int(one) for one in pending]
        return state

    def load(self, state: State) -> None:
        try:
            config = [int(byte) for byte in state["config"]]
            intx = bool(state["intx"])
            words = [int(word) & 0xFFFF_FFFF for word in state.get("msix_table", [])]
            pending = [bool(one) for one in state.get("msix_pending", [])]
        except (KeyError, TypeError, ValueError):
            raise StateError(
                "saved state of a PCI function is none", mend="save it again: it is damaged"
            ) from None
        if self._msix is not None and not self._msix[1].load(words, pending):
            raise StateError(
                "the saved PCI function has another number of MSI-X vectors",
                mend="make the machine as it was when it was saved",
            )
        with self._lock:
            self.config.load(config)
            self._place()
        self._update_msix()
        self.intx.set(intx)
