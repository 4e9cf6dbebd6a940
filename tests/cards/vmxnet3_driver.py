"""A VMXNET3 driver in Python: what Linux does, and what it never does."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field
from typing import Any, Final

from tests.cards.frames import MAC

from tetrarch._native import Vm
from tetrarch.cards import Vmxnet3Card
from tetrarch.cards.vmxnet3 import ACTIVATE_DEV, CMD, DSAH, DSAL, REVISION
from tetrarch.net.network import OpenNetwork
from tetrarch.pci.function import BUS_MASTER, COMMAND, MEMORY_SPACE

LIMIT_S: Final = 30

# Where the driver has what it shares, its rings and its buffers.
SHARED: Final = 0x10_0000
TABLE: Final = 0x10_1000
LISTS: Final = 0x10_4000
TX, TX_DONE = 0x11_0000, 0x12_0000
RX: Final = (0x20_0000, 0x30_0000)
RX_DONE: Final = 0x40_0000
SENT: Final = 0x50_0000
ROOM: Final = 0x60_0000

MAGIC: Final = 3133079265
QUEUE: Final = 256
IMR, TXPROD, RXPROD, RXPROD2 = 0, 0x600, 0x800, 0xA00

# Features, and modes of receiving.
RXCSUM, RSS, RXVLAN, LRO = 1, 2, 4, 8
UCAST, MCAST, BCAST, ALLMULTI, PROMISC = 1, 2, 4, 8, 16
# Kinds of offload.
CSUM, TSO = 2, 3


@dataclass
class Ring:
    base: int
    size: int
    next: int = 0
    generation: int = 1

    def step(self) -> int:
        """The address of the next descriptor, and it is passed."""
        at = self.base + 16 * self.next
        self.next += 1
        if self.next == self.size:
            self.next, self.generation = 0, self.generation ^ 1
        return at


@dataclass
class Completion:
    words: tuple[int, int, int, int]

    @property
    def index(self) -> int:
        return self.words[0] & 0xFFF

    @property
    def first(self) -> bool:
        return bool(self.words[0] & 1 << 15)

    @property
    def last(self) -> bool:
        return bool(self.words[0] & 1 << 14)

    @property
    def queue(self) -> int:
        return self.words[0] >> 16 & 0x3FF

    @property
    def not_calculated(self) -> bool:
        return bool(self.words[0] & 1 << 30)

    @property
    def length(self) -> int:
        return self.words[2] & 0x3FFF

    @property
    def tag(self) -> int | None:
        return self.words[2] >> 16 if self.words[2] & 1 << 15 else None

    @property
    def known(self) -> int:
        """tuc, udp, tcp, ipc, v6, v4, frg, from bit 0 on."""
        return self.words[3] >> 16 & 0x7F


@dataclass
class Received:
    frame: bytes
    completions: list[Completion] = field(default_factory=list)


@dataclass
class RxQueue:
    rings: list[Ring]
    done: Ring
    buffers: dict[tuple[int, int], int] = field(default_factory=dict)
    """Addresses, by ring and descriptor."""


class Vmxnet3Driver:
    """Drives a card: queues of 32 descriptors, unless others are asked for."""

    def __init__(self, network: OpenNetwork, vm: Vm | None = None, mac: bytes = MAC) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.card = Vmxnet3Card(self.vm, network, "net0", mac)
        self.set_bus_master()
        self.rings, self.commands = (bar.parts[0].device for bar in self.card.function.bars[:2])
        assert self.card.function.config.get(8, 1) == REVISION

    def set_bus_master(self, on: bool = True) -> None:
        self.card.function.write_config(COMMAND, 2, MEMORY_SPACE | (BUS_MASTER if on else 0))

    # Registers

    def read(self, register: int) -> int:
        return self.commands.read(register, 4)

    def write(self, register: int, value: int) -> None:
        self.commands.write(register, 4, value)

    def command(self, command: int) -> int:
        self.write(CMD, command)
        return self.read(CMD)

    # Memory

    def poke(self, address: int, *words: int) -> None:
        self.vm.write_memory(address, struct.pack(f"<{len(words)}I", *words))

    def peek(self, address: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.vm.read_memory(address, 4 * count))

    # Life

    def set_up(
        self,
        *,
        tx: int = 1,
        rx: int = 1,
        size: int = 32,
        bodies: int = 32,
        features: int = 0,
        mode: int = UCAST | BCAST,
        auto_mask: bool = True,
        mtu: int = 1500,
        scatter: int = 0,
    ) -> None:
        """Writes what the driver shares; ``activate`` gives it to the card."""
        self.vm.write_memory(SHARED, bytes(720))
        self.vm.write_memory(TABLE, bytes((tx + rx) * QUEUE))
        self.poke(SHARED, MAGIC)
        self.poke(SHARED + 24, features, 0)
        self.poke(SHARED + 40, TABLE, 0)
        self.poke(SHARED + 52, (tx + rx) * QUEUE, mtu, scatter | tx << 16 | rx << 24)
        events = tx + rx
        self.poke(SHARED + 80, int(auto_mask) | (events + 1) << 8 | events << 16)
        self.poke(SHARED + 120, mode)
        self.tx = []
        for index in range(tx):
            sent = Ring(TX + index * 0x1000, size)
            done = Ring(TX_DONE + index * 0x1000, size)
            self.tx.append((sent, done))
            queue = TABLE + index * QUEUE
            self.poke(queue + 16, sent.base, 0, 0, 0, done.base, 0)
            self.poke(queue + 56, size, 0, size, 0, index)
            self.vm.write_memory(sent.base, bytes(16 * size))
            self.vm.write_memory(done.base, bytes(16 * size))
        self.rx = []
        for index in range(rx):
            at = index * 0x1000
            rings = [Ring(RX[0] + at, size), Ring(RX[1] + at, bodies)]
            queue_done = Ring(RX_DONE + 2 * at, size + bodies)
            self.rx.append(RxQueue(rings, queue_done))
            queue = TABLE + (tx + index) * QUEUE
            self.poke(queue + 16, rings[0].base, 0, rings[1].base, 0, queue_done.base, 0)
            self.poke(queue + 56, size, bodies, size + bodies, 0, tx + index)
            for ring in (*rings, queue_done):
                self.vm.write_memory(ring.base, bytes(16 * ring.size))

    def activate(self, shared: int = SHARED) -> int:
        self.write(DSAL, shared & 0xFFFF_FFFF)
        self.write(DSAH, shared >> 32)
        return self.command(ACTIVATE_DEV)

    def start(self, **given: Any) -> None:
        self.set_up(**given)
        assert self.activate() == 0

    # To the network

    def offer(
        self,
        pieces: list[tuple[int, int]],
        *,
        queue: int = 0,
        mode: int = 0,
        header: int = 0,
        position: int = 0,
        tag: int | None = None,
        complete: bool = True,
    ) -> int:
        """Puts a frame into the ring, as addresses and lengths; gives its last descriptor's
        number. Its first is given last."""
        ring = self.tx[queue][0]
        first: tuple[int, tuple[int, ...]] | None = None
        last = 0
        for index, (address, length) in enumerate(pieces):
            generation, last = ring.generation, ring.next
            at = ring.step()
            word2 = (length & 0x3FFF) | generation << 14
            word3 = 0
            if index == 0:
                word2 |= position << 18
                word3 |= header | mode << 10
                if tag is not None:
                    word3 |= 1 << 15 | tag << 16
            if index == len(pieces) - 1:
                word3 |= 1 << 12 | int(complete) << 13
            words = (address & 0xFFFF_FFFF, address >> 32, word2, word3)
            if index == 0:
                first = at, words
            else:
                self.poke(at, *words)
        assert first is not None
        self.poke(first[0], *first[1])
        return last

    def ring(self, queue: int = 0) -> None:
        self.rings.write(TXPROD + 8 * queue, 4, self.tx[queue][0].next)

    def send(self, frame: bytes, *, queue: int = 0, split: int = 0, **given: int | None) -> None:
        """Sends a frame and waits for its end; in two pieces where ``split`` says so."""
        self.vm.write_memory(SENT, frame)
        pieces = [(SENT, len(frame))]
        if split:
            pieces = [(SENT, split), (SENT + split, len(frame) - split)]
        last = self.offer(pieces, queue=queue, **given)  # type: ignore[arg-type]
        self.ring(queue)
        assert self.wait_sent(queue) == last

    def sent(self, queue: int = 0) -> int | None:
        """The number of the descriptor whose end was said next."""
        done = self.tx[queue][1]
        words = self.peek(done.base + 16 * done.next, 4)
        if words[3] >> 31 != done.generation:
            return None
        done.step()
        return words[0] & 0xFFF

    def wait_sent(self, queue: int = 0) -> int:
        end = time.monotonic() + LIMIT_S
        while (last := self.sent(queue)) is None:
            assert time.monotonic() < end, "nothing was sent"
            time.sleep(0.001)
        return last

    # From the network

    def give(
        self,
        length: int = 2048,
        *,
        body: bool = False,
        ring: int = 0,
        queue: int = 0,
        address: int | None = None,
    ) -> None:
        """Gives a buffer."""
        where = self.rx[queue].rings[ring]
        index, generation = where.next, where.generation
        if address is None:
            address = ROOM + (queue * 2 + ring) * 0x4_0000 + index * 0x1000
        self.rx[queue].buffers[ring, index] = address
        at = where.step()
        word2 = length | int(body) << 14 | generation << 31
        self.poke(at, address & 0xFFFF_FFFF, address >> 32, word2, 0)

    def tell(self, queue: int = 0) -> None:
        self.rings.write(RXPROD + 8 * queue, 4, 0)

    def received(self, queue: int = 0) -> Received | None:
        """A frame, if there is one."""
        rx = self.rx[queue]
        frame = Received(b"")
        while True:
            words = self.peek(rx.done.base + 16 * rx.done.next, 4)
            if words[3] >> 31 != rx.done.generation:
                assert not frame.completions, "a frame without an end"
                return None
            rx.done.step()
            one = Completion(words)  # type: ignore[arg-type]
            assert one.first == (not frame.completions)
            ring = one.queue // len(self.rx)
            assert one.queue % len(self.rx) == queue
            address = rx.buffers.pop((ring, one.index))
            frame.frame += self.vm.read_memory(address, one.length)
            frame.completions.append(one)
            if one.last:
                return frame

    def wait(self, queue: int = 0) -> Received:
        end = time.monotonic() + LIMIT_S
        while (frame := self.received(queue)) is None:
            assert time.monotonic() < end, "no frame came"
            time.sleep(0.001)
        return frame

    def wait_until(self, done: object) -> None:
        assert callable(done)
        end = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < end
            time.sleep(0.001)
