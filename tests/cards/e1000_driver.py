"""A driver of Intel's 82540EM in Python: what the manual tells, and what no driver does."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.cards.frames import MAC

from tetrarch._native import Vm
from tetrarch.cards import E1000Card
from tetrarch.cards.e1000 import MDIC, MDIC_READ, MDIC_WRITE
from tetrarch.net.network import OpenNetwork
from tetrarch.pci.function import BUS_MASTER, COMMAND, IO_SPACE, MEMORY_SPACE

LIMIT_S: Final = 30

# Registers.
ICR, ITR, ICS, IMS, IMC = 0xC0, 0xC4, 0xC8, 0xD0, 0xD8
VET, RCTL, TCTL, RXCSUM = 0x38, 0x100, 0x400, 0x5000
RDBAL, RDBAH, RDLEN, RDH, RDT, RDTR, RXDCTL, RADV = (
    0x2800 + offset for offset in (0, 4, 8, 16, 24, 32, 40, 44)
)
TDBAL, TDBAH, TDLEN, TDH, TDT, TIDV, TXDCTL, TADV = (
    0x3800 + offset for offset in (0, 4, 8, 16, 24, 32, 40, 44)
)
MTA, RA, VFTA = 0x5200, 0x5400, 0x5600

# RCTL and TCTL.
EN, UPE, MPE, LPE, BAM, VFE, BSEX, SECRC = (1 << bit for bit in (1, 3, 4, 5, 15, 18, 25, 26))
PSP: Final = 1 << 3
# Causes.
TXDW, TXQE, LSC, RXDMT0, RXO, RXT0, MDAC, TXD_LOW, SRPD = (
    1 << bit for bit in (0, 1, 2, 4, 6, 7, 9, 15, 16)
)
# Commands of descriptors to send; status and errors of those that came.
EOP, IFCS, TSE, RS, RPS, DEXT, VLE, IDE = (1 << bit for bit in range(24, 32))
IC: Final = TSE
DATA: Final = DEXT | 1 << 20
TUCMD_TCP, TUCMD_IP = 1 << 24, 1 << 25
IXSM, TXSM = 1 << 8, 1 << 9
DD, END, IGNORE, VP, TCPCS, IPCS, PIF = (1 << bit for bit in (0, 1, 2, 3, 5, 6, 7))
TCPE, IPE, RXE = (1 << bit for bit in (13, 14, 15))

# Where the driver has its rings and buffers.
TX, RX = 0x11_0000, 0x20_0000
SENT, ROOM = 0x50_0000, 0x60_0000
BUFFER: Final = 0x1000


@dataclass
class Received:
    frame: bytes
    status: int
    """Status and errors of the last descriptor."""
    tag: int
    sum: int
    descriptors: int


class E1000Driver:
    """Drives a card: rings of 32 descriptors, unless others are asked for."""

    def __init__(self, network: OpenNetwork, vm: Vm | None = None, mac: bytes = MAC) -> None:
        self.vm = vm or Vm("bt", 16 << 20)
        self.card = E1000Card(self.vm, network, "net0", mac)
        self.set_bus_master()
        self.parts = self.card.function.bars[0].parts
        self.ports = self.card.function.bars[1].parts[0].device

    def set_bus_master(self, on: bool = True) -> None:
        command = IO_SPACE | MEMORY_SPACE | (BUS_MASTER if on else 0)
        self.card.function.write_config(COMMAND, 2, command)

    # Registers

    def read(self, register: int, size: int = 4) -> int:
        part = next(one for one in reversed(self.parts) if one.offset <= register)
        return part.device.read(register - part.offset, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        part = next(one for one in reversed(self.parts) if one.offset <= register)
        part.device.write(register - part.offset, size, value)

    def phy_read(self, number: int) -> int:
        self.write(MDIC, MDIC_READ << 26 | 1 << 21 | number << 16)
        assert self.read(MDIC) >> 28 == 1
        return self.read(MDIC) & 0xFFFF

    def phy_write(self, number: int, value: int) -> None:
        self.write(MDIC, MDIC_WRITE << 26 | 1 << 21 | number << 16 | value)

    # Memory

    def poke(self, address: int, *words: int) -> None:
        self.vm.write_memory(address, struct.pack(f"<{len(words)}I", *words))

    def peek(self, address: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.vm.read_memory(address, 4 * count))

    # Life

    def start(
        self, control: int = BAM | SECRC, *, size: int = 32, buffers: int | None = None
    ) -> None:
        """Rings, all of whose buffers but one the card has, and both ways on."""
        self.size = size
        self.next_tx = self.done_tx = self.next_rx = self.given = 0
        for base, at in ((TDBAL, TX), (RDBAL, RX)):
            self.vm.write_memory(at, bytes(16 * size))
            self.write(base, at)
            self.write(base + 4, 0)
            self.write(base + 8, 16 * size)
            self.write(base + 16, 0)
            self.write(base + 24, 0)
        self.write(RCTL, EN | control)
        self.write(TCTL, EN)
        for _ in range(size - 1 if buffers is None else buffers):
            self.give()
        self.tell()

    # To the network

    def offer(self, address: int, word2: int, word3: int = 0) -> int:
        """Puts a descriptor into the ring; gives its number."""
        number = self.next_tx
        self.poke(TX + 16 * number, address & 0xFFFF_FFFF, address >> 32, word2, word3)
        self.next_tx = (number + 1) % self.size
        return number

    def context(
        self,
        *,
        ip: tuple[int, int, int] = (0, 0, 0),
        transport: tuple[int, int, int] = (0, 0, 0),
        command: int = 0,
        length: int = 0,
        header: int = 0,
        size: int = 0,
    ) -> None:
        """Start, place and end of the sums."""
        words = [start | offset << 8 | end << 16 for start, offset, end in (ip, transport)]
        self.offer(words[0] | words[1] << 32, length | command | DEXT, header << 8 | size << 16)

    def ring(self) -> None:
        self.write(TDT, self.next_tx)

    def is_sent(self, number: int) -> bool:
        return bool(self.peek(TX + 16 * number + 12)[0] & DD)

    def send(self, frame: bytes, command: int = IFCS, word3: int = 0, *, split: int = 0) -> None:
        """Sends a frame and waits for its end; in two pieces where ``split`` says so."""
        self.vm.write_memory(SENT, frame)
        if split:
            self.offer(SENT, split | command, word3)
        number = self.offer(SENT + split, len(frame) - split | command | EOP | RS, word3)
        self.ring()
        self.wait_until(lambda: self.is_sent(number))

    # From the network

    def give(self, address: int | None = None) -> None:
        """Gives a buffer."""
        number = self.given % self.size
        if address is None:
            address = ROOM + number * BUFFER
        self.poke(RX + 16 * number, address & 0xFFFF_FFFF, address >> 32, 0, 0)
        self.given += 1

    def tell(self) -> None:
        self.write(RDT, self.given % self.size)

    def received(self) -> Received | None:
        """A frame, if there is one, whose buffers are given back."""
        frame, count = b"", 0
        while True:
            at = RX + 16 * ((self.next_rx + count) % self.size)
            low, high, length, status = self.peek(at, 4)
            if not status & DD:
                assert count == 0 or not frame, "a frame without an end"
                return None
            frame += self.vm.read_memory(low | high << 32, length & 0xFFFF) if length else b""
            count += 1
            if status & END:
                break
        self.next_rx = (self.next_rx + count) % self.size
        for _ in range(count):
            self.give()
        self.tell()
        return Received(frame, status & 0xFFFF, status >> 16, length >> 16, count)

    def wait(self) -> Received:
        end = time.monotonic() + LIMIT_S
        while (frame := self.received()) is None:
            assert time.monotonic() < end, "no frame came"
            time.sleep(0.001)
        return frame

    def wait_until(self, done: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT_S
        while not done():
            assert time.monotonic() < end
            time.sleep(0.001)
