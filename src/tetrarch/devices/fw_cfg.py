"""The firmware configuration device: what a guest's firmware asks about its machine.

QEMU's docs/specs/fw_cfg.rst is its specification: items with a number, read byte by byte at a port
or copied by DMA, and a directory that gives numbers to names.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from operator import itemgetter
from struct import Struct
from typing import Final, Protocol, runtime_checkable

from tetrarch.devices._access import all_ones, read_bytes
from tetrarch.devices._state import DeviceState, State, register

__all__ = [
    "DATA_PORT",
    "DMA_PORT",
    "DMA_PORTS",
    "SELECTOR_PORT",
    "BytesItem",
    "FwCfg",
    "FwCfgCore",
    "FwCfgDma",
    "FwCfgItem",
    "FwCfgPorts",
    "FwCfgState",
    "GuestBytes",
    "Key",
    "WritableItem",
]

#: The selector takes words; a byte at the port behind it is data.
SELECTOR_PORT: Final = 0x510
DATA_PORT: Final = 0x511
DMA_PORT: Final = 0x514
DMA_PORTS: Final = 8


class Key(IntEnum):
    """Items that have no name."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NOGRAPHIC = 0x04
    NB_CPUS = 0x05
    KERNEL_ADDR = 0x07
    KERNEL_SIZE = 0x08
    INITRD_ADDR = 0x0A
    INITRD_SIZE = 0x0B
    BOOT_MENU = 0x0E
    MAX_CPUS = 0x0F
    KERNEL_ENTRY = 0x10
    KERNEL_DATA = 0x11
    INITRD_DATA = 0x12
    CMDLINE_ADDR = 0x13
    CMDLINE_SIZE = 0x14
    CMDLINE_DATA = 0x15
    SETUP_ADDR = 0x16
    SETUP_SIZE = 0x17
    SETUP_DATA = 0x18
    FILE_DIR = 0x19
    FILE_FIRST = 0x20


SIGNATURE: Final = b"QEMU"
#: Bit 0: the ports are there; bit 1: DMA too.
FEATURES: Final = 3
DMA_SIGNATURE: Final = int.from_bytes(b"QEMU CFG", "big")
#: Bits of the selector beside the number: it is for writing, of this machine's architecture.
KEY_BITS: Final = 0xBFFF
FILE_NAME_MAX: Final = 55
FILE_ENTRY: Final = Struct(">IHH56s")

# Of the DMA control word.
DMA_ERROR: Final = 1 << 0
DMA_READ: Final = 1 << 1
DMA_SKIP: Final = 1 << 2
DMA_SELECT: Final = 1 << 3
DMA_WRITE: Final = 1 << 4
DMA_COMMAND: Final = Struct(">IIQ")
#: What is copied at a time: the guest names lengths up to 4 GiB.
DMA_CHUNK: Final = 1 << 20


class FwCfgItem(Protocol):
    """What an item holds."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes:
        """Bytes that are within it."""


@runtime_checkable
class WritableItem(FwCfgItem, Protocol):
    """One that the guest writes, too: by DMA alone."""

    def write(self, offset: int, data: bytes) -> None:
        """Bytes that are within it."""


@dataclass(frozen=True)
class BytesItem:
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class GuestBytes(Protocol):
    """Guest memory, for DMA."""

    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...


@dataclass
class FwCfgState(DeviceState):
    kind = "fw_cfg"

    key: int = register(Key.SIGNATURE, 0xFFFF)
    offset: int = register(0, 0xFFFF_FFFF)
    dma_high: int = register(0, 0xFFFF_FFFF)
    """The upper half of the address, until the lower one starts the command."""


class FwCfgCore:
    """Items and where the guest is in the selected one."""

    def __init__(self, memory: GuestBytes, refused: type[Exception]) -> None:
        """``refused`` is what ``memory`` raises for what is not RAM."""
        self.state = FwCfgState()
        self._memory = memory
        self._refused = refused
        self._items: dict[int, FwCfgItem] = {}
        self.provide({}, {})

    def provide(
        self,
        items: Mapping[int, bytes | FwCfgItem],
        files: Mapping[str, bytes | FwCfgItem],
    ) -> None:
        """What there is from now on, by number and by name."""
        everything: dict[int, bytes | FwCfgItem] = {
            Key.SIGNATURE: SIGNATURE,
            Key.ID: FEATURES.to_bytes(4, "little"),
            **items,
        }
        entries = [len(files).to_bytes(4, "big")]
        for key, (name, data) in enumerate(
            sorted(files.items(), key=itemgetter(0)), Key.FILE_FIRST
        ):
            size = len(data) if isinstance(data, bytes) else data.size
            encoded = name.encode("ascii")
            if len(encoded) > FILE_NAME_MAX:
                raise ValueError(f"the name {name!r} is too long for fw_cfg")
            entries.append(FILE_ENTRY.pack(size, key, 0, encoded))
            everything[key] = data
        everything[Key.FILE_DIR] = b"".join(entries)
        self._items = {
            key: BytesItem(item) if isinstance(item, bytes) else item
            for key, item in everything.items()
        }

    def select(self, key: int) -> None:
        self.state.key, self.state.offset = key & KEY_BITS, 0

    def _take(self, length: int) -> bytes:
        """The next bytes; behind the end are zeros."""
        item = self._items.get(self.state.key)
        offset = self.state.offset
        there = 0 if item is None else max(0, min(length, item.size - offset))
        self.state.offset = min(offset + length, 0xFFFF_FFFF)
        data = item.read(offset, there) if item is not None and there else b""
        return data.ljust(length, b"\0")

    def read_data(self) -> int:
        return self._take(1)[0]

    def read_dma(self, offset: int) -> int:
        if not 0 <= offset < DMA_PORTS:
            return 0xFF
        return DMA_SIGNATURE >> 8 * (DMA_PORTS - 1 - offset) & 0xFF

    def write_dma(self, offset: int, size: int, value: int) -> None:
        """The address in big-endian order, in two halves or at once."""
        if (offset, size) not in ((0, 4), (4, 4), (0, 8)):
            return
        swapped = int.from_bytes((value & all_ones(size)).to_bytes(size, "little"), "big")
        if (offset, size) == (0, 4):
            self.state.dma_high = swapped
        else:
            address = swapped if size == 8 else self.state.dma_high << 32 | swapped
            self.state.dma_high = 0
            self._execute(address)

    def _execute(self, address: int) -> None:
        try:
            command = self._memory.read_memory(address, DMA_COMMAND.size)
        except self._refused:
            return  # nowhere to say that it failed
        control, length, buffer = DMA_COMMAND.unpack(command)
        if control & DMA_SELECT:
            self.select(control >> 16)
        try:
            failed = self._transfer(control, length, buffer)
        except (self._refused, OverflowError):  # past RAM, or past all addresses
            failed = True
        result = DMA_ERROR if failed else 0
        # The command lies where it was read from, unless the guest took the memory away.
        with contextlib.suppress(self._refused):
            self._memory.write_memory(address, result.to_bytes(4, "big"))

    def _transfer(self, control: int, length: int, buffer: int) -> bool:
        """Whether it failed."""
        if control & DMA_READ:
            while length:
                step = min(length, DMA_CHUNK)
                self._memory.write_memory(buffer, self._take(step))
                buffer, length = buffer + step, length - step
        elif control & DMA_WRITE:
            return self._put(length, buffer)
        elif control & DMA_SKIP:
            self.state.offset = min(self.state.offset + length, 0xFFFF_FFFF)
        return False

    def _put(self, length: int, buffer: int) -> bool:
        """What the guest writes to an item that takes it; whether it failed."""
        item, offset = self._items.get(self.state.key), self.state.offset
        if not isinstance(item, WritableItem) or offset + length > item.size:
            return True
        item.write(offset, self._memory.read_memory(buffer, length))
        self.state.offset += length
        return False


class FwCfg:
    """The device on a machine. Attach ``ports`` at SELECTOR_PORT, two of them, and ``dma`` at
    DMA_PORT.

    What an item raises while it is read ends the machine.
    """

    def __init__(self, memory: GuestBytes, refused: type[Exception]) -> None:
        self.core = FwCfgCore(memory, refused)
        self._lock = threading.Lock()
        self.ports = FwCfgPorts(self.core, self._lock)
        self.dma = FwCfgDma(self.core, self._lock)

    def reset(self) -> None:
        with self._lock:
            self.core.state.reset()

    def save(self) -> State:
        with self._lock:
            return self.core.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self.core.state.load(state)


class FwCfgPorts:
    def __init__(self, core: FwCfgCore, lock: threading.Lock) -> None:
        self._core = core
        self._lock = lock

    def read(self, offset: int, size: int) -> int:
        if offset != 1 or size != 1:
            return all_ones(size)  # the selector cannot be read
        with self._lock:
            return self._core.read_data()

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            with self._lock:
                self._core.select(value)


class FwCfgDma:
    def __init__(self, core: FwCfgCore, lock: threading.Lock) -> None:
        self._core = core
        self._lock = lock

    def read(self, offset: int, size: int) -> int:
        return read_bytes(self._core.read_dma, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._core.write_dma(offset, size, value)
