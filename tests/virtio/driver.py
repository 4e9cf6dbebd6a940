"""A virtio driver in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from typing import Any, Protocol

from tetrarch._native import Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.virtio.mmio import NOTIFY, VirtioMmio
from tetrarch.virtio.pci import COMMON, DEVICE, VirtioPci
from tetrarch.virtio.pci import NOTIFY as PCI_NOTIFY
from tetrarch.virtio.registers import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    RING_PACKED,
    VERSION_1,
)

LIMIT_S = 30

NEXT = 1
WRITE = 2


class Transport(Protocol):
    def status(self) -> int: ...
    def set_status(self, value: int) -> None: ...
    def features(self) -> int: ...
    def set_features(self, features: int) -> None: ...
    def set_up(self, queue: int, size: int, areas: tuple[int, int, int]) -> None: ...
    def disable(self, queue: int) -> None: ...
    def enabled(self, queue: int) -> bool: ...
    def size(self, queue: int) -> int: ...
    def notify(self, queue: int) -> None: ...
    def config(self, offset: int, size: int) -> int: ...
    def write_config(self, offset: int, size: int, value: int) -> None: ...


class Mmio:
    def __init__(self, device: VirtioMmio) -> None:
        self.device = device

    def _get(self, offset: int) -> int:
        return self.device.read(offset, 4)

    def _set(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value)

    def status(self) -> int:
        return self._get(0x70)

    def set_status(self, value: int) -> None:
        self._set(0x70, value)

    def features(self) -> int:
        features = 0
        for half in (0, 1):
            self._set(0x14, half)
            features |= self._get(0x10) << 32 * half
        return features

    def set_features(self, features: int) -> None:
        for half in (0, 1):
            self._set(0x24, half)
            self._set(0x20, features >> 32 * half & 0xFFFF_FFFF)

    def set_up(self, queue: int, size: int, areas: tuple[int, int, int]) -> None:
        self._set(0x30, queue)
        self._set(0x38, size)
        for offset, address in zip((0x80, 0x90, 0xA0), areas, strict=True):
            self._set(offset, address & 0xFFFF_FFFF)
            self._set(offset + 4, address >> 32)
        self._set(0x44, 1)

    def disable(self, queue: int) -> None:
        self._set(0x30, queue)
        self._set(0x44, 0)

    def enabled(self, queue: int) -> bool:
        self._set(0x30, queue)
        return bool(self._get(0x44))

    def size(self, queue: int) -> int:
        self._set(0x30, queue)
        return self._get(0x34)

    def notify(self, queue: int) -> None:
        assert NOTIFY == 0x50
        self.device.doorbells.write(0, 4, queue)

    def config(self, offset: int, size: int) -> int:
        return self.device.read(0x100 + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.device.write(0x100 + offset, size, value)


class Pci:
    def __init__(self, device: VirtioPci) -> None:
        self.device = device
        device.function.write_config(COMMAND, 2, BUS_MASTER)
        self.parts = {part.offset: part.device for part in device.function.bars[1].parts}

    def _get(self, offset: int, size: int) -> int:
        return self.parts[COMMON].read(offset, size)

    def _set(self, offset: int, size: int, value: int) -> None:
        self.parts[COMMON].write(offset, size, value)

    def status(self) -> int:
        return self._get(0x14, 1)

    def set_status(self, value: int) -> None:
        self._set(0x14, 1, value)

    def features(self) -> int:
        features = 0
        for half in (0, 1):
            self._set(0x00, 4, half)
            features |= self._get(0x04, 4) << 32 * half
        return features

    def set_features(self, features: int) -> None:
        for half in (0, 1):
            self._set(0x08, 4, half)
            self._set(0x0C, 4, features >> 32 * half & 0xFFFF_FFFF)

    def set_up(self, queue: int, size: int, areas: tuple[int, int, int]) -> None:
        self._set(0x16, 2, queue)
        self._set(0x18, 2, size)
        self._set(0x20, 8, areas[0])
        for offset, address in zip((0x28, 0x30), areas[1:], strict=True):
            self._set(offset, 4, address & 0xFFFF_FFFF)
            self._set(offset + 4, 4, address >> 32)
        self._set(0x1C, 2, 1)

    def disable(self, queue: int) -> None:
        self._set(0x16, 2, queue)
        self._set(0x1C, 2, 0)

    def enabled(self, queue: int) -> bool:
        self._set(0x16, 2, queue)
        return bool(self._get(0x1C, 2))

    def size(self, queue: int) -> int:
        self._set(0x16, 2, queue)
        return self._get(0x18, 2)

    def notify(self, queue: int) -> None:
        self.parts[PCI_NOTIFY].write(4 * queue, 2, queue)

    def config(self, offset: int, size: int) -> int:
        return self.parts[DEVICE].read(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.parts[DEVICE].write(offset, size, value)


class Driver:
    """Drives a device over split rings, one chain at a time or many."""

    def __init__(self, vm: Vm, transport: Transport, memory: int = 0x10_0000) -> None:
        self.vm = vm
        self.device = transport
        self.memory = memory
        self._available: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._free: dict[int, int] = {}

    def negotiate(self, wanted: int = 0) -> int:
        self.device.set_status(0)
        self.device.set_status(ACKNOWLEDGE)
        self.device.set_status(ACKNOWLEDGE | DRIVER)
        features = self.device.features() & (wanted | VERSION_1)
        assert not features & RING_PACKED
        self.device.set_features(features)
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.device.status() & FEATURES_OK
        return features

    def areas(self, queue: int) -> tuple[int, int, int]:
        base = self.memory + 0x4_0000 * queue
        return base, base + 0x1_0000, base + 0x2_0000

    def start(self, queues: int, features: int = 0, size: int = 64) -> None:
        self.negotiate(features)
        for queue in range(queues):
            self.add_queue(queue, size)
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def add_queue(self, queue: int, size: int = 64) -> None:
        descriptors, driver, device = self.areas(queue)
        for address in (descriptors, driver, device):
            self.vm.write_memory(address, bytes(0x2000))
        size = min(size, self.device.size(queue))
        self.device.set_up(queue, size, (descriptors, driver, device))
        self._available[queue] = self._used[queue] = self._free[queue] = 0
        self._sizes[queue] = size

    def offer(self, queue: int, chain: list[tuple[int, int, bool]], *, notify: bool = True) -> int:
        """Buffers as (address, length, for the device to write); gives the head."""
        descriptors, driver, _ = self.areas(queue)
        size = self._sizes[queue]
        head = self._free[queue]
        for index, (address, length, write) in enumerate(chain):
            at = (head + index) % size
            flags = (WRITE if write else 0) | (NEXT if index + 1 < len(chain) else 0)
            entry = struct.pack("<QIHH", address, length, flags, (at + 1) % size)
            self.vm.write_memory(descriptors + 16 * at, entry)
        self._free[queue] = (head + len(chain)) % size
        index = self._available[queue]
        self.vm.write_memory(driver + 4 + 2 * (index % size), head.to_bytes(2, "little"))
        self._available[queue] = index = (index + 1) & 0xFFFF
        self.vm.write_memory(driver + 2, index.to_bytes(2, "little"))
        if notify:
            self.device.notify(queue)
        return head

    def used_index(self, queue: int) -> int:
        data = self.vm.read_memory(self.areas(queue)[2] + 2, 2)
        return int.from_bytes(data, "little")

    def wait(self, queue: int) -> tuple[int, int]:
        """(head, written) of the next used chain."""
        deadline = time.monotonic() + LIMIT_S
        while self.used_index(queue) == self._used[queue]:
            assert time.monotonic() < deadline, "the device does not answer"
            time.sleep(0.0005)
        at = self.areas(queue)[2] + 4 + 8 * (self._used[queue] % self._sizes[queue])
        self._used[queue] = (self._used[queue] + 1) & 0xFFFF
        head, written = struct.unpack("<II", self.vm.read_memory(at, 8))
        return head, written

    def ask(self, queue: int, chain: list[tuple[int, int, bool]]) -> int:
        """Offers a chain and waits; how much was written."""
        head = self.offer(queue, chain)
        used, written = self.wait(queue)
        assert used == head
        return written


def wait_until(condition: Any, what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)
