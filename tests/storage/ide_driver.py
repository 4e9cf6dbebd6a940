"""A driver of an IDE channel in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from tetrarch._native import Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.storage import AtaDrive, IdeController

LIMIT_S: Final = 30

TABLE: Final = 0x10_0000
DATA: Final = 0x40_0000

BUSY, READY, DATA_REQUEST, ERROR = 1 << 7, 0x50, 1 << 3, 1
ABORT, NOT_FOUND, UNCORRECTABLE = 1 << 2, 1 << 4, 1 << 6

IDENTIFY, IDENTIFY_PACKET, PACKET, FLUSH, SET_FEATURES = 0xEC, 0xA1, 0xA0, 0xEA, 0xEF
READ, WRITE, READ_WIDE, WRITE_WIDE = 0x20, 0x30, 0x24, 0x34
READ_MULTIPLE, WRITE_MULTIPLE, SET_MULTIPLE = 0xC4, 0xC5, 0xC6
READ_DMA, WRITE_DMA, READ_DMA_WIDE, WRITE_DMA_WIDE = 0xC8, 0xCA, 0x25, 0x35
TRIM: Final = 0x06

#: Bus master: start; to memory; its status: active, error, interrupt.
START, TO_MEMORY = 1, 8
ACTIVE, FAILED, INTERRUPT = 1, 2, 4


class IdeDriver:
    def __init__(self, drives: Sequence[AtaDrive | None], vm: Vm | None = None) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.controller = IdeController(self.vm, drives)
        self.set_bus_master()
        self.masters = self.controller.function.bars[0].parts[0].device
        self.use(0, 0)

    def use(self, channel: int, drive: int) -> None:
        self.channel, self.drive = channel, drive
        self.ports = self.controller.channels.task_ports(channel)
        self.control = self.controller.channels.control_port(channel)
        self.ports.write(6, 1, 0xA0 | drive << 4)

    def set_bus_master(self, master: bool = True) -> None:
        self.controller.function.write_config(COMMAND, 2, BUS_MASTER if master else 0)

    # Registers

    def get(self, offset: int) -> int:
        return self.ports.read(offset, 1)

    def set(self, offset: int, value: int) -> None:
        self.ports.write(offset, 1, value)

    @property
    def status(self) -> int:
        """The alternate one, which acknowledges nothing."""
        return self.control.read(0, 1)

    def wait(self) -> int:
        """Until the drive is not busy; the status, which acknowledges its interrupt."""
        deadline = time.monotonic() + LIMIT_S
        while self.status & BUSY:
            assert time.monotonic() < deadline, "the drive does not answer"
            time.sleep(0.0005)
        return self.get(7)

    def master(self, offset: int, value: int | None = None, size: int = 1) -> int:
        at = 8 * self.channel + offset
        if value is not None:
            self.masters.write(at, size, value)
        return self.masters.read(at, size)

    # Commands

    def command(
        self, command: int, lba: int = 0, count: int = 0, features: int = 0, wide: bool = False
    ) -> None:
        if wide:
            self.set(1, features >> 8)
            self.set(2, count >> 8)
            for index in range(3):
                self.set(3 + index, lba >> (24 + 8 * index) & 0xFF)
        self.set(1, features & 0xFF)
        self.set(2, count & 0xFF)
        for index in range(3):
            self.set(3 + index, lba >> 8 * index & 0xFF)
        top = 0 if wide else lba >> 24 & 0xF
        self.set(6, 0xE0 | self.drive << 4 | top)
        self.set(7, command)

    def read_words(self, count: int, size: int = 2) -> bytes:
        step = range(0, 2 * count, size)
        return b"".join(self.ports.read(0, size).to_bytes(size, "little") for _ in step)

    def write_words(self, data: bytes, size: int = 2) -> None:
        for at in range(0, len(data), size):
            self.ports.write(0, size, int.from_bytes(data[at : at + size], "little"))

    def data_in(self, length: int, block: int = 512) -> bytes:
        """What a command gives by programmed I/O, block for block."""
        data = b""
        while len(data) < length:
            status = self.wait()
            assert status == READY | DATA_REQUEST, hex(status)
            data += self.read_words(min(block, length - len(data)) // 2)
        assert self.wait() == READY
        return data

    def data_out(self, data: bytes, block: int = 512) -> int:
        for at in range(0, len(data), block):
            status = self.wait()
            assert status == READY | DATA_REQUEST, hex(status)
            self.write_words(data[at : at + block])
        return self.wait()

    def identify(self, command: int = IDENTIFY) -> tuple[int, ...]:
        self.command(command)
        return struct.unpack("<256H", self.data_in(512))

    def regions(self, regions: Sequence[tuple[int, int]]) -> None:
        """A table for the bus master: (address, bytes)."""
        table = b"".join(
            struct.pack("<IHH", address, length & 0xFFFF, 0x8000 if at == len(regions) - 1 else 0)
            for at, (address, length) in enumerate(regions)
        )
        self.vm.write_memory(TABLE, table)
        self.master(4, TABLE, 4)

    def dma(self, start: Callable[[], Any], to_memory: bool, length: int) -> int:
        """A command by the bus master, with data at DATA; the drive's status."""
        pieces = range(0, length, 65536)
        self.regions([(DATA + at, min(65536, length - at)) for at in pieces])
        way = TO_MEMORY if to_memory else 0
        self.master(0, way)
        self.master(2, FAILED | INTERRUPT)
        start()
        self.master(0, way | START)
        status = self.wait()
        assert self.master(2) & INTERRUPT
        self.master(0, way)
        return status

    def read_dma(self, lba: int, length: int) -> bytes:
        self.vm.write_memory(DATA, b"\xee" * length)
        count = length // 512
        status = self.dma(
            lambda: self.command(READ_DMA_WIDE, lba, count, wide=True),
            to_memory=True,
            length=length,
        )
        assert status == READY
        assert not self.master(2) & (ACTIVE | FAILED)
        return self.vm.read_memory(DATA, length)

    def write_dma(self, lba: int, data: bytes) -> int:
        self.vm.write_memory(DATA, data)
        count = len(data) // 512
        return self.dma(
            lambda: self.command(WRITE_DMA_WIDE, lba, count, wide=True),
            to_memory=False,
            length=len(data),
        )

    # Packets

    def packet(self, *packet: int, limit: int = 0xFFFE, dma: bool = False) -> None:
        self.command(PACKET, limit << 8, features=int(dma))
        status = self.wait()
        assert status & (DATA_REQUEST | ERROR) == DATA_REQUEST
        assert self.get(2) & 3 == 1, "it wants a packet"
        self.write_words(bytes(packet).ljust(12, b"\0"))

    def packet_in(self, *packet: int, limit: int = 0xFFFE) -> tuple[int, bytes]:
        """The status at the end, and what was given, by programmed I/O."""
        self.packet(*packet, limit=limit)
        data = b""
        while (status := self.wait()) & DATA_REQUEST:
            assert self.get(2) & 3 == 2, "data for the host"
            length = self.get(4) | self.get(5) << 8
            assert 0 < length <= limit
            data += self.read_words(-(-length // 2))[:length]
        assert self.get(2) & 3 == 3
        return status, data
