"""A PCI function: what a device has that sits on the bus (PCI Local Bus 3.0, section 6)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, Intx, MsiVectors, MsixTable
from tetrarch.devices._state import DeviceState, State, flag, memory, queue, register
from tetrarch.errors import StateError
from tetrarch.machine.engine_vm import BusRegion, EngineVm, InterruptWire
from tetrarch.pci.config_space import CONFIG_BYTES, ConfigSpace

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device
    from tetrarch.pci.memory import BarMemory

__all__ = ["Bar", "BarPart", "Identity", "PciFunction", "PciFunctionState"]

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

MSI_CAPABILITY: Final = 0x05
MSIX_CAPABILITY: Final = 0x11

# Message control of MSI (6.8.1.3), and where the capability's registers are behind it when it
# has addresses of 64 bits and a mask.
MSI_ENABLE: Final = 1 << 0
MSI_COUNT_SHIFT: Final = 4
MSI_COUNT: Final = 7 << MSI_COUNT_SHIFT
MSI_WIDE: Final = 1 << 7
MSI_MASKS: Final = 1 << 8
MSI_ADDRESS, MSI_DATA, MSI_MASK, MSI_PENDING = 2, 10, 14, 18

# Message control of MSI-X (6.8.2.3).
MSIX_ENABLE: Final = 1 << 15
MSIX_MASK: Final = 1 << 14


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
    memory: BarMemory | None = None
    """What the guest uses as RAM, all of the BAR."""

    def __post_init__(self) -> None:
        if self.memory is not None and (self.memory.length != self.size or self.parts or self.io):
            raise ValueError(f"BAR {self.index} is not all memory")
        # 16 bytes are the least of memory; a device may take 256 ports at most (6.2.5.1).
        least, most = (4, 256) if self.io else (16, 1 << 62 if self.wide else 1 << 31)
        if self.size.bit_count() != 1 or not least <= self.size <= most:
            raise ValueError(f"a BAR cannot have {self.size:#x} bytes")
        if not 0 <= self.index < BARS - self.wide or (self.io and self.wide):
            raise ValueError(f"there is no such BAR {self.index}")
        for part in self.parts:
            if not 0 <= part.offset < part.offset + part.length <= self.size:
                raise ValueError(f"BAR {self.index} has no room for its part at {part.offset:#x}")

    @property
    def kind(self) -> int:
        """The low bits that a driver reads (6.2.5.1)."""
        if self.io:
            return 0x1
        return (0x4 if self.wide else 0) | (0x8 if self.prefetchable else 0)


@dataclass
class PciFunctionState(DeviceState):
    """What a driver can change of a function."""

    kind = "pci_function"

    config: bytearray = memory(CONFIG_BYTES)
    intx: bool = flag()
    msi_pending: int = register(0, 0xFFFF_FFFF)
    msix_table: deque[int] = queue(4 * 128, 0xFFFF_FFFF)
    msix_pending: deque[int] = queue(128, 1)


class PciFunction:
    """Configuration space, and the regions of the bus that its registers move.

    Hooks of capabilities are called with (offset in the capability, size) after a write;
    ``on_bus_master`` where the driver gives the device the bus and takes it away. Then it is to
    leave memory alone (6.2.2); messages wait by themselves.

    Lock: ``_lock``, under which the registers and what follows from them change together:
    regions, the line, the vectors. Hooks and devices are called without it, ``on_bus_master``
    under a lock of its own.
    """

    def __init__(
        self,
        vm: EngineVm,
        identity: Identity,
        bars: Sequence[Bar] = (),
        *,
        interrupt_pin: bool = True,
        intx: Intx | None = None,
        read_hook: Callable[[int, int], int | None] | None = None,
        on_bus_master: Callable[[bool], None] | None = None,
    ) -> None:
        self.config = ConfigSpace()
        self.bars = tuple(bars)
        self._vm = vm
        self._lock = threading.Lock()
        self._regions: dict[int, list[tuple[int, BusRegion]]] = {}
        self._hooks: list[tuple[int, int, Callable[[int, int], None]]] = []
        self._read_hook = read_hook
        self._on_bus_master = on_bus_master
        self._master_lock = threading.Lock()
        self._master: bool | None = None
        """What the hook was told last."""
        self._next_capability = FIRST_CAPABILITY
        self._last_pointer = CAPABILITIES
        self._msi: tuple[int, MsiVectors] | None = None
        self._msix: tuple[int, MsixTable] | None = None
        self.intx = intx or Intx()
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
        taken: set[int] = set()
        for bar in self.bars:
            indices = {bar.index, bar.index + bar.wide}
            if taken & indices:
                raise ValueError(f"two BARs have the index {bar.index}")
            taken |= indices
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

    def add_msi(self, vectors: MsiVectors) -> None:
        """The MSI capability (6.8.1), with 64-bit addresses and a mask."""
        count = vectors.vectors
        control = MSI_WIDE | MSI_MASKS | (count.bit_length() - 1) << 1
        body = control.to_bytes(2, "little").ljust(MSI_PENDING + 4, b"\0")
        writable = (MSI_ENABLE | MSI_COUNT).to_bytes(2, "little")
        writable += (~3 & (1 << 64) - 1).to_bytes(8, "little") + b"\xff\xff\0\0"
        writable += ((1 << count) - 1).to_bytes(4, "little")
        at = self.add_capability(MSI_CAPABILITY, body, writable)
        self._msi = at + 2, vectors

    def add_msix(self, table: MsixTable, bar: int, offset: int = 0) -> None:
        """The MSI-X capability of a table that is a page of a BAR, at ``offset`` (6.8.2)."""
        control = (table.vectors - 1).to_bytes(2, "little")
        at = offset | bar
        places = at.to_bytes(4, "little") + (MsixTable.PENDING_OFFSET | at).to_bytes(4, "little")
        writable = (MSIX_ENABLE | MSIX_MASK).to_bytes(2, "little")
        at = self.add_capability(MSIX_CAPABILITY, control + places, writable)
        self._msix = at + 2, table

    @property
    def bus_master(self) -> bool:
        """Whether the device may access memory."""
        return bool(self.config.get(COMMAND, 2) & BUS_MASTER)

    # On the bus

    def plug(self, wire: InterruptWire) -> None:
        """Attaches the regions, mapped nowhere; ``wire`` is that of its interrupt line."""
        with self._lock:
            for bar in self.bars:
                attach = self._vm.attach_ports if bar.io else self._vm.attach_mmio
                self._regions[bar.index] = [
                    (part.offset, attach(part.offset, part.length, part.device, mapped=False))
                    for part in bar.parts
                ]
            self.intx.connect(wire)
            self._update()
        self._tell_bus_master()

    def unplug(self) -> None:
        """Gives the regions back: no access reaches the devices any more."""
        with self._lock:
            for regions in self._regions.values():
                for _, region in regions:
                    region.detach()
            self._regions.clear()
            for bar in self.bars:
                if bar.memory is not None:
                    bar.memory.unmap()
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
            if self._msi is not None:
                at, vectors = self._msi
                self.config.set(at + MSI_PENDING, 4, vectors.pending)
            return self.config.get(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        end = offset + size
        with self._lock:
            self.config.write(offset, size, value)
            self._update()
        self._tell_bus_master()
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
            self._update()

    def _update(self) -> None:
        """Lets vectors, line and regions be as the registers say; ``_lock`` is held."""
        messages = False
        if self._msi is not None:
            messages |= self._update_msi(*self._msi)
        if self._msix is not None:
            at, table = self._msix
            control = self.config.get(at, 2)
            # A message is an access to memory: without the bus it waits.
            masked = bool(control & MSIX_MASK) or not self.bus_master
            table.set_control(bool(control & MSIX_ENABLE), masked)
            messages |= bool(control & MSIX_ENABLE)
        # With messages a function must not use its line (6.8.1.3, 6.8.2.3).
        disabled = self.config.get(COMMAND, 2) & INTX_DISABLE
        self.intx.set_disabled(messages or bool(disabled))
        self._place()

    def _update_msi(self, at: int, vectors: MsiVectors) -> bool:
        get = self.config.get
        control, address, mask = get(at, 2), get(at + MSI_ADDRESS, 8), get(at + MSI_MASK, 4)
        # The driver may give fewer messages than were asked for: several vectors share one.
        count = min(1 << ((control & MSI_COUNT) >> MSI_COUNT_SHIFT), vectors.vectors)
        base = get(at + MSI_DATA, 2) & ~(count - 1)
        enabled = bool(control & MSI_ENABLE)
        if not enabled:
            vectors.set_control(False)
        for number in range(vectors.vectors):
            message = number % count
            masked = bool(mask >> message & 1) or not self.bus_master
            vectors.set(number, address, base | message, masked)
        if enabled:
            vectors.set_control(True)
        return enabled

    def _tell_bus_master(self) -> None:
        if self._on_bus_master is not None:
            with self._master_lock:
                if self._master != (master := self.bus_master):
                    self._master = master
                    self._on_bus_master(master)

    def _place(self) -> None:
        command = self.config.get(COMMAND, 2)
        for bar in self.bars:
            on = command & (IO_SPACE if bar.io else MEMORY_SPACE)
            base = self.address(bar)
            if bar.memory is not None and on and base:
                bar.memory.map(base)
            elif bar.memory is not None:
                bar.memory.unmap()
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
            if self._msi is not None:
                self._msi[1].reset()
            if self._msix is not None:
                self._msix[1].reset()
            self._update()
        self._tell_bus_master()
        self.intx.set(False)

    def save(self) -> State:
        state = PciFunctionState()
        with self._lock:
            state.config = bytearray(self.config.save())
            state.intx = self.intx.level
            if self._msi is not None:
                state.msi_pending = self._msi[1].pending
            if self._msix is not None:
                words, pending = self._msix[1].save()
                state.msix_table, state.msix_pending = deque(words), deque(map(int, pending))
        return state.save()

    def load(self, state: State) -> None:
        new = PciFunctionState()
        new.load(state)
        with self._lock:
            if self._msix is not None:
                pending = [bool(one) for one in new.msix_pending]
                if not self._msix[1].load(list(new.msix_table), pending):
                    raise StateError(
                        "the saved PCI function has another number of MSI-X vectors",
                        mend="make the machine as it was when it was saved",
                    )
            if self._msi is not None:
                self._msi[1].set_pending(new.msi_pending)
            self.config.load(new.config)
            self._update()
        self._tell_bus_master()
        self.intx.set(new.intx)
