"""A PVSCSI driver in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict, Unpack

from tetrarch._native import Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.storage import PvscsiController, ScsiDrive
from tetrarch.storage.pvscsi import (
    ADAPTER_RESET,
    COMMAND_DATA,
    COMMAND_STATUS,
    RINGS,
    SETUP_MSG_RING,
    SETUP_RINGS,
)

LIMIT_S: Final = 30
PAGE: Final = 4096

# Where the driver has its rings and buffers.
STATE: Final = 0x10_0000
REQUESTS: Final = 0x11_0000
COMPLETIONS: Final = 0x14_0000
MESSAGES: Final = 0x18_0000
SENSE: Final = 0x1A_0000
LISTS: Final = 0x1B_0000
DATA: Final = 0x40_0000

# Registers behind the first page.
INTR_STATUS, INTR_MASK, KICK_OTHER, KICK_TRANSFER = 0x100C, 0x2010, 0x3014, 0x4018

# Flags of a request.
LIST, NO_DATA, TO_GUEST, FROM_GUEST = 1, 4, 8, 16

# Statuses of the adapter.
OK, NO_TARGET, DATA_RUN, INVALID, BUS_RESET = 0, 0x11, 0x12, 0x1A, 0x25
CHECK: Final = 2


@dataclass
class Completion:
    context: int
    length: int
    sense: tuple[int, int, int] | None
    """Key, code and qualifier."""
    host: int
    scsi: int

    @property
    def good(self) -> bool:
        return (self.host, self.scsi, self.sense) == (OK, 0, None)


class Fields(TypedDict, total=False):
    """What ``PvscsiDriver.entry`` fills in."""

    address: int
    flags: int
    target: int
    lun: int
    bus: int
    sense: tuple[int, int]
    """Where sense data may go, and how many bytes."""


class PvscsiDriver:
    """Drives a controller, one request at a time or many."""

    def __init__(self, drives: Sequence[ScsiDrive], vm: Vm | None = None) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.controller = PvscsiController(self.vm, drives)
        self.set_bus_master()
        parts = self.controller.function.bars[0].parts
        self.commands, self.registers = parts[0].device, parts[1].device
        assert parts[1].offset == RINGS
        self.pages = (1, 1)
        self._context = 0x100

    def set_bus_master(self, master: bool = True) -> None:
        self.controller.function.write_config(COMMAND, 2, BUS_MASTER if master else 0)

    # Commands of the controller

    def command(self, number: int, *words: int) -> int:
        """Its status at the end."""
        self.commands.write(0, 4, number)
        for word in words:
            self.commands.write(COMMAND_DATA, 4, word)
        return self.status

    @property
    def status(self) -> int:
        return self.commands.read(COMMAND_STATUS, 4)

    def set_up_rings(
        self,
        requests: int = 1,
        completions: int = 1,
        state: int = STATE,
        numbers: Sequence[int] = (),
    ) -> int:
        """With so many pages, whose numbers are ``numbers`` where any are given."""
        rows = [[0] * 32, [0] * 32]
        for row, count, at in zip(
            rows, (requests, completions), (REQUESTS, COMPLETIONS), strict=True
        ):
            for page in range(min(count, 32)):
                row[page] = numbers[page] if numbers else (at // PAGE + page)
        quads = [state // PAGE, *rows[0], *rows[1]]
        words = [half for quad in quads for half in (quad & 0xFFFF_FFFF, quad >> 32)]
        self.pages = (requests, completions)
        return self.command(SETUP_RINGS, requests, completions, *words)

    def set_up_messages(self, pages: int = 1) -> int:
        words = []
        for page in range(16):
            words += [MESSAGES // PAGE + page if page < pages else 0, 0]
        return self.command(SETUP_MSG_RING, pages, 0, *words)

    def start(self, pages: int = 1) -> None:
        self.command(ADAPTER_RESET)
        self.vm.write_memory(STATE, bytes(DATA - STATE))
        assert self.set_up_rings(pages, pages) == 0

    # The page of the rings' state

    def state(self, at: int) -> int:
        (value,) = struct.unpack("<I", self.vm.read_memory(STATE + at, 4))
        assert isinstance(value, int)
        return value

    def set_state(self, at: int, value: int) -> None:
        self.vm.write_memory(STATE + at, struct.pack("<I", value & 0xFFFF_FFFF))

    # Requests

    def entry(
        self,
        cdb: bytes,
        room: int = 0,
        *,
        address: int = DATA,
        flags: int = TO_GUEST,
        target: int = 0,
        lun: int = 0,
        bus: int = 0,
        sense: tuple[int, int] = (SENSE, 96),
    ) -> tuple[int, bytes]:
        """A context, and a request with it."""
        self._context += 1
        entry = struct.pack(
            "<QQQQII16sB8sBBBB59x",
            self._context,
            address,
            room,
            sense[0],
            sense[1],
            flags,
            cdb.ljust(16, b"\0"),
            len(cdb),
            bytes([0, lun]).ljust(8, b"\0"),
            0x20,
            bus,
            target,
            0,
        )
        assert len(entry) == 128
        return self._context, entry

    def put(self, entry: bytes) -> None:
        index = self.state(0)
        slot = index % (32 * self.pages[0])
        self.vm.write_memory(REQUESTS + 128 * slot, entry)
        self.set_state(0, index + 1)

    def kick(self, register: int = KICK_TRANSFER) -> None:
        self.registers.write(register - RINGS, 4, 0)

    def poll(self, *, take: bool = True) -> Completion | None:
        index = self.state(16)
        if self.state(12) == index:
            return None
        slot = index % (128 * self.pages[1])
        entry = self.vm.read_memory(COMPLETIONS + 32 * slot, 32)
        context, length, sense_length, host, scsi, padding = struct.unpack("<QQIHHQ", entry)
        assert padding == 0
        sense = None
        if sense_length:
            data = self.vm.read_memory(SENSE, 18)
            assert (data[0], data[7]) == (0x70, 10)
            sense = data[2], data[12], data[13]
        if take:
            self.set_state(16, index + 1)
        return Completion(context, length, sense, host, scsi)

    def wait(self) -> Completion:
        deadline = time.monotonic() + LIMIT_S
        while (done := self.poll()) is None:
            assert time.monotonic() < deadline, "the controller does not answer"
            time.sleep(0.0005)
        return done

    def ask(self, cdb: bytes, room: int = 0, **fields: Unpack[Fields]) -> Completion:
        context, entry = self.entry(cdb, room, **fields)
        self.put(entry)
        self.kick()
        done = self.wait()
        assert done.context == context
        return done

    def data(self, cdb: bytes, room: int = 4096, *, target: int = 0, lun: int = 0) -> bytes:
        """What a command gives, which is to succeed."""
        self.vm.write_memory(DATA, b"\xee" * room)
        done = self.ask(cdb, room, target=target, lun=lun)
        assert done.good, done
        given = self.vm.read_memory(DATA, room)
        assert given[done.length :] == b"\xee" * (room - done.length)
        return given[: done.length]

    # Data

    def ready(self, target: int = 0) -> None:
        """Takes what a unit tells first."""
        done = self.ask(bytes(6), flags=NO_DATA, target=target)
        assert done.sense in (None, (6, 0x29, 0)), done

    def write(self, block: int, data: bytes, *, target: int = 0, fua: bool = False) -> Completion:
        self.vm.write_memory(DATA, data)
        cdb = struct.pack(">BBIBHB", 0x2A, fua << 3, block, 0, len(data) // 512, 0)
        return self.ask(cdb, len(data), flags=FROM_GUEST, target=target)

    def read(self, block: int, length: int, *, target: int = 0) -> bytes:
        cdb = struct.pack(">BBIBHB", 0x28, 0, block, 0, length // 512, 0)
        given = self.data(cdb, length, target=target)
        assert len(given) == length
        return given

    def put_list(self, pieces: Sequence[tuple[int, int]], at: int = LISTS) -> None:
        for index, (address, length) in enumerate(pieces):
            self.vm.write_memory(at + 16 * index, struct.pack("<QII", address, length, 0))
