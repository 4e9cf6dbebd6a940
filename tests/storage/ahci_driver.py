"""An AHCI driver in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch._native import Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.storage import AhciController, AtaDrive

LIMIT_S: Final = 30

# Where the driver has its lists, frames, tables and buffers, by port.
LISTS: Final = 0x10_0000
FRAMES: Final = 0x11_0000
TABLES: Final = 0x12_0000
DATA: Final = 0x40_0000
PAGE: Final = 4096

# Registers of a port.
CLB, FB, IS, IE, CMD, TFD, SIG, SSTS, SCTL, SERR, SACT, CI = (
    *(0x00, 0x08, 0x10, 0x14, 0x18, 0x20),
    *(0x24, 0x28, 0x2C, 0x30, 0x34, 0x38),
)
START, RECEIVE = 1 << 0, 1 << 4
TASK_FILE, HOST_BUS, INTERFACE = 1 << 30, 1 << 29, 1 << 27

IDENTIFY, READ, WRITE, WRITE_FUA, TRIM, FLUSH = 0xEC, 0x25, 0x35, 0x3D, 0x06, 0xEA
READ_QUEUED, WRITE_QUEUED, READ_LOG, SET_FEATURES = 0x60, 0x61, 0x2F, 0xEF
READ_PIO, WRITE_PIO = 0x24, 0x34
PACKET, IDENTIFY_PACKET = 0xA0, 0xA1

READY: Final = 0x50
ERROR: Final = 0x01


@dataclass
class Ended:
    """How a command ended: status and error, what is pending, how many bytes were moved."""

    status: int
    error: int
    interrupts: int
    moved: int
    frame: bytes
    """The register frame that was received last."""


class AhciDriver:
    def __init__(self, drives: Sequence[AtaDrive], vm: Vm | None = None) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.controller = AhciController(self.vm, drives)
        self.set_bus_master()
        self.registers = self.controller.ports
        self.port = 0

    def set_bus_master(self, master: bool = True) -> None:
        self.controller.function.write_config(COMMAND, 2, BUS_MASTER if master else 0)

    # Registers

    def get(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.registers.write(offset, size, value)

    def at(self, register: int) -> int:
        return 0x100 + 0x80 * self.port + register

    def port_get(self, register: int) -> int:
        return self.get(self.at(register))

    def port_set(self, register: int, value: int) -> None:
        self.set(self.at(register), value)

    # Life of a port

    def start(self, port: int = 0) -> None:
        self.port = port
        self.set(4, 1 << 31 | 1 << 1)
        self.port_set(CMD, 0)
        self.vm.write_memory(LISTS + 0x400 * port, bytes(0x400))
        self.vm.write_memory(FRAMES + 0x100 * port, bytes(0x100))
        self.set(self.at(CLB), LISTS + 0x400 * port, 8)
        self.set(self.at(FB), FRAMES + 0x100 * port, 8)
        self.port_set(CMD, RECEIVE)
        self.port_set(SERR, 0xFFFF_FFFF)
        self.port_set(IS, 0xFFFF_FFFF)
        self.port_set(IE, 0xFFFF_FFFF)
        self.port_set(CMD, RECEIVE | START)
        self.set(8, 0xFFFF_FFFF)

    def restart(self) -> None:
        """After an error: stops the port and starts it again."""
        self.port_set(CMD, RECEIVE)
        assert not self.port_get(CMD) & (1 << 15)
        assert self.port_get(CI) == self.port_get(SACT) == 0
        self.port_set(IS, 0xFFFF_FFFF)
        self.port_set(SERR, 0xFFFF_FFFF)
        self.port_set(CMD, RECEIVE | START)

    # Commands

    def table(self, slot: int) -> int:
        return TABLES + 0x1_0000 * self.port + 0x2000 * slot

    def fill(
        self,
        slot: int,
        command: int,
        lba: int = 0,
        count: int = 0,
        regions: Sequence[tuple[int, int]] = (),
        *,
        features: int = 0,
        device: int = 0x40,
        packet: bytes = b"",
        flags: int = 5,
    ) -> None:
        """Writes a header and a table; regions are (address, bytes)."""
        table = self.table(slot)
        entries = b"".join(
            struct.pack("<QII", address, 0, length - 1) for address, length in regions
        )
        low, high = lba & 0xFF_FFFF, lba >> 24
        frame = struct.pack("<BBBB", 0x27, 0x80, command, features & 0xFF)
        frame += low.to_bytes(3, "little") + bytes([device])
        frame += high.to_bytes(3, "little") + bytes([features >> 8])
        frame += struct.pack("<HBBI", count, 0, 0, 0)
        self.vm.write_memory(table, frame.ljust(0x40, b"\0") + packet.ljust(0x40, b"\0") + entries)
        header = struct.pack("<IIQ", flags | len(regions) << 16, 0, table)
        self.vm.write_memory(LISTS + 0x400 * self.port + 32 * slot, header.ljust(32, b"\0"))

    def give(self, slot: int, *, queued: bool = False) -> None:
        if queued:
            self.port_set(SACT, 1 << slot)
        self.port_set(CI, 1 << slot)

    def wait(self, slot: int = 0) -> Ended:
        """Until a command has ended, or the port has stopped."""
        deadline = time.monotonic() + LIMIT_S
        pending = TASK_FILE | HOST_BUS | INTERFACE
        while (self.port_get(CI) | self.port_get(SACT)) >> slot & 1:
            if self.port_get(IS) & pending:
                break
            assert time.monotonic() < deadline, "the device does not answer"
            time.sleep(0.0005)
        return self.ended(slot)

    def ended(self, slot: int = 0) -> Ended:
        task = self.port_get(TFD)
        interrupts = self.port_get(IS)
        self.port_set(IS, interrupts)
        self.set(8, 1 << self.port)
        header = self.vm.read_memory(LISTS + 0x400 * self.port + 32 * slot, 8)
        frame = self.vm.read_memory(FRAMES + 0x100 * self.port + 0x40, 20)
        moved = struct.unpack_from("<I", header, 4)[0]
        return Ended(task & 0xFF, task >> 8 & 0xFF, interrupts, moved, frame)

    def ask(
        self,
        command: int,
        lba: int = 0,
        count: int = 0,
        length: int = 0,
        *,
        features: int = 0,
        device: int = 0x40,
        packet: bytes = b"",
    ) -> Ended:
        """One command in slot 0, with ``length`` bytes at DATA."""
        regions = [(DATA, length)] if length else []
        self.fill(0, command, lba, count, regions, features=features, device=device, packet=packet)
        self.give(0)
        return self.wait()

    def write(self, lba: int, data: bytes, command: int = WRITE) -> Ended:
        self.vm.write_memory(DATA, data)
        return self.ask(command, lba, len(data) // 512, len(data))

    def read(self, lba: int, length: int, command: int = READ) -> bytes:
        self.vm.write_memory(DATA, b"\xee" * length)
        ended = self.ask(command, lba, length // 512, length)
        assert (ended.status, ended.moved) == (READY, length), ended
        return self.vm.read_memory(DATA, length)

    def identify(self, command: int = IDENTIFY) -> tuple[int, ...]:
        assert self.ask(command, length=512).status == READY
        return struct.unpack("<256H", self.vm.read_memory(DATA, 512))

    def packet(self, *packet: int, length: int = 0) -> tuple[Ended, bytes]:
        """A packet command with room for ``length`` bytes, and what it gave."""
        self.vm.write_memory(DATA, b"\xee" * max(length, 1))
        ended = self.ask(PACKET, 0, 0, length, features=1, packet=bytes(packet))
        return ended, self.vm.read_memory(DATA, ended.moved) if ended.moved else b""
