"""An NVMe driver in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from tetrarch._native import Disk, Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.storage import NvmeController
from tetrarch.storage.nvme import DOORBELLS, ENABLE

LIMIT_S: Final = 30

# Where the driver has its queues and buffers.
QUEUES: Final = 0x10_0000
LISTS: Final = 0x30_0000
DATA: Final = 0x40_0000

# Admin commands, and those of I/O.
DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ = 0, 1, 2, 4, 5
IDENTIFY, ABORT, SET_FEATURES, GET_FEATURES, EVENT = 6, 8, 9, 0xA, 0xC
FLUSH, WRITE, READ, ZEROES, MANAGE = 0, 1, 2, 8, 9

PAGE: Final = 4096
#: Do Not Retry.
DNR: Final = 1 << 14


@dataclass
class Completion:
    result: int
    head: int
    queue: int
    command: int
    status: int
    """Without Do Not Retry, which each error of ours has."""


@dataclass
class Pair:
    submissions: int
    completions: int
    entries: int
    tail: int = 0
    head: int = 0
    phase: int = 1


class NvmeDriver:
    """Drives a controller, one command at a time or many."""

    def __init__(self, disk: Disk, queues: int = 2, vm: Vm | None = None) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.controller = NvmeController(self.vm, disk, name="disk0", queues=queues)
        self.set_bus_master()
        parts = self.controller.function.bars[0].parts
        self.registers, self.doorbells = parts[0].device, parts[1].device
        assert parts[1].offset == DOORBELLS
        self.pairs: dict[int, Pair] = {}
        self._next_id = 0x100

    def set_bus_master(self, master: bool = True) -> None:
        self.controller.function.write_config(COMMAND, 2, BUS_MASTER if master else 0)

    # Registers

    def get(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.registers.write(offset, size, value)

    @property
    def status(self) -> int:
        return self.get(0x1C)

    def enable(self, entries: int = 32) -> None:
        pair = self._pair(0, entries)
        self.set(0x24, (entries - 1) << 16 | (entries - 1))
        self.set(0x28, pair.submissions, 8)
        self.set(0x30, pair.completions, 8)
        self.set(0x14, 0x46_0000 | ENABLE)
        assert self.status == 1, hex(self.status)

    def start(self, pairs: int = 1, entries: int = 32) -> None:
        self.enable()
        for queue in range(1, pairs + 1):
            self.add_pair(queue, entries)

    def _pair(self, queue: int, entries: int) -> Pair:
        base = QUEUES + 0x2_0000 * queue
        pair = self.pairs[queue] = Pair(base, base + 0x1_0000, entries)
        self.vm.write_memory(base, bytes(0x2_0000))
        return pair

    def add_pair(self, queue: int, entries: int = 32) -> None:
        pair = self._pair(queue, entries)
        size = (entries - 1) << 16 | queue
        assert self.admin(CREATE_CQ, pair.completions, size, queue << 16 | 3).status == 0
        assert self.admin(CREATE_SQ, pair.submissions, size, queue << 16 | 1).status == 0

    # Commands

    def offer(
        self,
        queue: int,
        opcode: int,
        prps: tuple[int, int] = (0, 0),
        words: tuple[int, ...] = (),
        *,
        namespace: int = 1,
        flags: int = 0,
        ring: bool = True,
    ) -> int:
        """Puts a command into a queue; gives its number. ``words`` are from 10 on."""
        self._next_id = (self._next_id + 1) & 0xFFFF
        command = self._next_id
        first = opcode | flags << 8 | command << 16
        entry = struct.pack("<IIQQQQ", first, namespace, 0, 0, *prps)
        entry += struct.pack("<6I", *(*words, 0, 0, 0, 0, 0, 0)[:6])
        pair = self.pairs[queue]
        self.vm.write_memory(pair.submissions + 64 * pair.tail, entry)
        pair.tail = (pair.tail + 1) % pair.entries
        if ring:
            self.ring(queue)
        return command

    def ring(self, queue: int) -> None:
        self.doorbells.write(8 * queue, 4, self.pairs[queue].tail)

    def poll(self, queue: int, *, take: bool = True) -> Completion | None:
        pair = self.pairs[queue]
        entry = self.vm.read_memory(pair.completions + 16 * pair.head, 16)
        result, _, head, sqid, command, status = struct.unpack("<IIHHHH", entry)
        if status & 1 != pair.phase:
            return None
        pair.head = (pair.head + 1) % pair.entries
        pair.phase ^= pair.head == 0
        if take:
            self.take(queue)
        status >>= 1
        assert not status or status & DNR, hex(status)
        return Completion(result, head, sqid, command, status & ~DNR)

    def take(self, queue: int) -> None:
        self.doorbells.write(8 * queue + 4, 4, self.pairs[queue].head)

    def wait(self, queue: int, *, take: bool = True) -> Completion:
        deadline = time.monotonic() + LIMIT_S
        while (done := self.poll(queue, take=take)) is None:
            assert time.monotonic() < deadline, "the controller does not answer"
            time.sleep(0.0005)
        return done

    def ask(
        self,
        queue: int,
        opcode: int,
        prps: tuple[int, int] = (0, 0),
        words: tuple[int, ...] = (),
        *,
        namespace: int = 1,
        flags: int = 0,
    ) -> Completion:
        command = self.offer(queue, opcode, prps, words, namespace=namespace, flags=flags)
        done = self.wait(queue)
        assert (done.command, done.queue) == (command, queue)
        return done

    def admin(self, opcode: int, prp: int = 0, *words: int, namespace: int = 0) -> Completion:
        return self.ask(0, opcode, (prp, 0), words, namespace=namespace)

    def identify(self, cns: int, namespace: int = 0) -> bytes:
        assert self.admin(IDENTIFY, DATA, cns, namespace=namespace).status == 0
        return self.vm.read_memory(DATA, PAGE)

    def log_page(self, page: int, length: int, *, keep: bool = False, offset: int = 0) -> bytes:
        word = page | keep << 15 | (length // 4 - 1) << 16
        assert self.admin(GET_LOG, DATA, word, 0, offset).status == 0
        return self.vm.read_memory(DATA, length)

    # Data

    def prps(self, address: int, length: int) -> tuple[int, int]:
        """Of data that lies in one piece, with a list at LISTS where one is needed."""
        first = PAGE - address % PAGE
        pages = range(address + first, address + length, PAGE)
        if len(pages) < 2:
            return address, pages[0] if pages else 0
        self.vm.write_memory(LISTS, struct.pack(f"<{len(pages)}Q", *pages))
        return address, LISTS

    def transfer(
        self, opcode: int, block: int, length: int, *, queue: int = 1, flags: int = 0
    ) -> Completion:
        """Reads into, or writes from, DATA; ``flags`` is of word 12."""
        words = (block & 0xFFFF_FFFF, block >> 32, (length // 512 - 1) | flags)
        return self.ask(queue, opcode, self.prps(DATA, length), words)

    def write(self, block: int, data: bytes, *, queue: int = 1, flags: int = 0) -> Completion:
        self.vm.write_memory(DATA, data)
        return self.transfer(WRITE, block, len(data), queue=queue, flags=flags)

    def read(self, block: int, length: int, *, queue: int = 1) -> bytes:
        self.vm.write_memory(DATA, b"\xee" * length)
        assert self.transfer(READ, block, length, queue=queue).status == 0
        return self.vm.read_memory(DATA, length)

    def drain(self, queue: int, count: int) -> deque[Completion]:
        return deque(self.wait(queue) for _ in range(count))
