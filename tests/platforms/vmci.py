"""A guest's driver of VMCI, and its end of vSockets, that know no more than Linux's headers."""

from __future__ import annotations

import struct
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, cast

from tests.storage.wire import Wire

from tetrarch._native import Vm
from tetrarch.machine.engine_vm import InterruptWire
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.platforms.vmware.vmci import Vmci

STATUS, CONTROL, ICR, IMR, DATA_OUT, DATA_IN, CAPS, RESULT, RESULT_HIGH = range(0, 36, 4)
OUT_LOW, OUT_HIGH, IN_LOW, IN_HIGH, PAGE_SHIFT = range(0x24, 0x38, 4)
RESET, ENABLE, DISABLE = 1, 2, 4
DATAGRAM, NOTIFICATIONS, PPN64, TRANSFERS = 4, 8, 16, 32
QUERY, GET_CONTEXT, SET_FLAGS, LINK, UNLINK, NOTIFY = range(6)
SUBSCRIBE, UNSUBSCRIBE, ALLOC, DETACH = range(8, 12)
HYPERVISOR, HOST = 0, 2
ANONYMOUS = (0xFFFFFFFF, 0xFFFFFFFF)
PAGE = 4096
RAM = 8 << 20
FLAGS = 0x40
"""The page of the flags."""
SEND, RECEIVE = 0x10_0000, 0x12_0000
"""Buffers of transfers."""
FIRST_FREE = 0x200
"""Pages from here on are for queue pairs."""
LIMIT_S = 30.0

# Packets of control (net/vmw_vsock/vmci_transport.h).
(
    INVALID,
    REQUEST,
    NEGOTIATE,
    OFFER,
    ATTACH,
    WROTE,
    READ,
    RST,
    SHUTDOWN,
    WAITING_WRITE,
    WAITING_READ,
    REQUEST2,
    NEGOTIATE2,
) = range(13)
_PACKET = struct.Struct("<BBHIIIQQ")

#: The port of no socket.
NOBODY = 0xFFFFFFFF

Handle = tuple[int, int]


class Packet(NamedTuple):
    kind: int
    host: int
    guest: int
    word: int = 0
    proto: int = 0
    second: int = 0


class Driver:
    def __init__(
        self,
        *,
        notifications: bool = True,
        sockets: Path | None = None,
        transfers: bool = False,
        wide: bool = True,
    ) -> None:
        self.transfers, self.wide = transfers, wide
        self.vm = Vm("bt", RAM, translate=False)
        self.device = Vmci(self.vm, notifications=notifications, sockets=sockets)
        self.wire = Wire()
        self.device.function.plug(cast(InterruptWire, self.wire))
        self.device.function.write_config(COMMAND, 2, BUS_MASTER)
        (part,) = self.device.function.bars[0].parts
        self.ports = part.device
        self._next_page = FIRST_FREE
        self.packets: deque[Packet] = deque()
        self.events: deque[tuple[int, ...]] = deque()

    def read(self, register: int) -> int:
        return self.ports.read(register, 4)

    def write(self, register: int, value: int) -> None:
        self.ports.write(register, 4, value)

    def send(self, resource: int, payload: bytes, context: int = 0, size: int | None = None) -> int:
        """The answer, with its sign."""
        length = len(payload) if size is None else size
        datagram = struct.pack("<IIIIQ", context, resource, *ANONYMOUS, length) + payload
        if self.transfers:
            self.vm.write_memory(SEND, struct.pack("<IIIIQ", 1, 0, len(datagram), 0, 0) + datagram)
            self.write(OUT_HIGH, SEND >> 32)
            self.write(OUT_LOW, SEND & 0xFFFFFFFF)
            busy, _, _, _, result = struct.unpack("<IIIIq", self.vm.read_memory(SEND, 24))
            assert busy == 0
        else:
            for byte in datagram:
                self.ports.write(DATA_OUT, 1, byte)
            result = None
        low, high = self.read(RESULT), self.read(RESULT_HIGH)
        assert high == (0xFFFFFFFF if low >> 31 else 0)
        (answer,) = struct.unpack("<i", struct.pack("<I", low))
        assert isinstance(answer, int)
        assert result is None or result == answer
        return answer

    def start(self) -> None:
        """As Linux's driver does."""
        capabilities = self.read(CAPS)
        assert capabilities & DATAGRAM
        used = capabilities & ~(0 if self.transfers else TRANSFERS) & ~(0 if self.wide else PPN64)
        self.write(CAPS, used)
        if used & NOTIFICATIONS:
            assert self.send(SET_FLAGS, self.page(FLAGS)) == 0
        assert self.send(QUERY, struct.pack("<III", 1, 0, GET_CONTEXT)) == 1
        self.write(IMR, used >> 2 & 1 | used >> 2 & 2 | used >> 3 & 4)
        self.write(CONTROL, ENABLE)
        assert self.read(STATUS) == 1
        self.context = self.send(GET_CONTEXT, b"")

    def page(self, number: int) -> bytes:
        return number.to_bytes(8, "little")[: 8 if self.wide else 4]

    def link(self, resource: int, flag: int) -> int:
        return self.send(LINK, struct.pack("<IIQ", self.context, resource, flag))

    def flag(self, number: int) -> int:
        (value,) = self.vm.read_memory(FLAGS * PAGE + number, 1)
        return value

    # Datagrams of the host

    def fetch(self) -> None:
        """Takes what there is when an interrupt says that there is something."""
        while self.read(ICR) & 1:
            if self.transfers:
                header = struct.pack("<IIIIQQQ", 0, 1, 1, 0, 0, RECEIVE + PAGE, 17 * PAGE)
                self.vm.write_memory(RECEIVE, header)
                self.write(IN_HIGH, RECEIVE >> 32)
                self.write(IN_LOW, RECEIVE & 0xFFFFFFFF)
                assert self.vm.read_memory(RECEIVE, 4) == b"\1\0\0\0"
                data = self.vm.read_memory(RECEIVE + PAGE, 17 * PAGE)
            else:
                data = bytes(self.ports.read(DATA_IN, 1) for _ in range(PAGE))
            self._take(data)

    def _take(self, data: bytes) -> None:
        while len(data) >= 24:
            *handles, length = struct.unpack_from("<IIIIQ", data)
            if handles[1] == 0xFFFFFFFF:
                return
            assert handles[0] == self.context
            payload, data = data[24 : 24 + length], data[24 + (length + 7 & ~7) :]
            assert len(payload) == length
            if handles[1:] == [0, HYPERVISOR, 0]:
                self.events.append(struct.unpack(f"<{length // 4}I", payload))
            else:
                assert handles[1:] == [1, HOST, 1]
                version, kind, proto, host, guest, _, word, second = _PACKET.unpack(payload)
                assert version == 1
                if guest == NOBODY:
                    self.tell(RST, host, guest)  # as for every port that nobody has
                else:
                    self.packets.append(Packet(kind, host, guest, word, proto, second))

    def packet(self, *skipped: int) -> Packet:
        """The next one, within a time, that is none of some kinds."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            self.fetch()
            while self.packets:
                packet = self.packets.popleft()
                if packet.kind not in skipped:
                    return packet
            time.sleep(0.001)
        raise AssertionError("no packet comes")

    def packet_of(self, host: int, guest: int) -> Packet:
        """The next one of a connection that begins; those of others are lost."""
        while True:
            packet = self.packet(READ, WROTE)
            if (packet.host, packet.guest) == (host, guest):
                return packet

    def tell(self, kind: int, host: int, guest: int, word: int = 0, proto: int = 0) -> int:
        payload = _PACKET.pack(1, kind, proto, guest, host, 0, word, 0)
        return self.send(1, payload, HOST)

    # Queue pairs

    def pages(self, count: int) -> list[int]:
        first, self._next_page = self._next_page, self._next_page + count
        assert self._next_page * PAGE <= RAM
        return list(range(first, first + count))[::-1]  # not in the order of memory

    def alloc(
        self,
        handle: Handle,
        produce: int,
        consume: int,
        pages: list[int],
        *,
        flags: int = 0,
        peer: int = HOST,
        count: int | None = None,
    ) -> int:
        count = len(pages) if count is None else count
        head = struct.pack("<IIIIQQQ", *handle, peer, flags, produce, consume, count)
        return self.send(ALLOC, head + b"".join(map(self.page, pages)))

    def detach(self, handle: Handle) -> int:
        return self.send(DETACH, struct.pack("<II", *handle))

    # vSockets

    def connect(self, host: int, guest: int, size: int = 1 << 16, *, old: bool = False) -> Stream:
        """To a program of the host that listens."""
        sent = 24 + _PACKET.size
        if old:
            assert self.tell(REQUEST, host, guest, size) == sent
            answer = self.packet_of(host, guest)
            assert answer == Packet(NEGOTIATE, host, guest, answer.word)
        else:
            assert self.tell(REQUEST2, host, guest, size, 1) == sent
            answer = self.packet_of(host, guest)
            assert answer == Packet(NEGOTIATE2, host, guest, answer.word, 1)
        handle = (self.context, 5000 + guest)
        stream = Stream(self, host, guest, handle, answer.word, old=old)
        assert stream.alloc(flags=0) == 4
        self.tell(OFFER, host, guest, stream.word)
        assert self.packet_of(host, guest) == Packet(ATTACH, host, guest, stream.word)
        self.events.remove((3, 0, *handle, HOST, 0))
        return stream

    def accept(self, size: int = 1 << 16, *, old: bool = False) -> Stream:
        """A program of the host that connects; what its "OK" says is the host's port."""
        asked = self.packet()
        assert (asked.kind, asked.proto) == (REQUEST2, 1)
        host, guest = asked.host, asked.guest
        if old:  # as a driver that does not know it
            self.tell(INVALID, host, guest)
            again = self.packet()
            assert again == Packet(REQUEST, host, guest, asked.word)
            self.tell(NEGOTIATE, host, guest, size)
        else:
            self.tell(NEGOTIATE2, host, guest, size, 1)
        offer = self.packet()
        assert (offer.kind, offer.host, offer.guest) == (OFFER, host, guest)
        handle = (offer.word & 0xFFFFFFFF, offer.word >> 32)
        assert handle[0] == HOST
        stream = Stream(self, host, guest, handle, size, old=old)
        assert stream.alloc(flags=1) == 5
        self.tell(ATTACH, host, guest, offer.word)
        return stream


class Stream:
    """The guest's end of a connection."""

    def __init__(
        self, driver: Driver, host: int, guest: int, handle: Handle, size: int, *, old: bool
    ) -> None:
        self.driver, self.host, self.guest, self.handle = driver, host, guest, handle
        self.size, self.old = size, old
        self.word = handle[0] | handle[1] << 32
        count = (size + PAGE - 1) // PAGE + 1
        pages = driver.pages(2 * count)
        self.produce, self.consume = pages[:count], pages[count:]

    def alloc(self, flags: int) -> int:
        for header in (self.produce[0], self.consume[0]):
            self.driver.vm.write_memory(header * PAGE, b"\xee" * PAGE)
        pages = self.produce + self.consume
        result = self.driver.alloc(self.handle, self.size, self.size, pages, flags=flags)
        if result > 0:
            for header in (self.produce[0], self.consume[0]):
                words = struct.unpack("<IIQQ", self.driver.vm.read_memory(header * PAGE, 24))
                assert words == (*self.handle, 0, 0)
        return result

    def _number(self, page: int, offset: int) -> int:
        return int.from_bytes(self.driver.vm.read_memory(page * PAGE + offset, 8), "little")

    def set_number(self, page: int, offset: int, number: int) -> None:
        self.driver.vm.write_memory(page * PAGE + offset, number.to_bytes(8, "little"))

    def used(self) -> int:
        """Bytes that the host has not taken."""
        tail, head = self._number(self.produce[0], 8), self._number(self.consume[0], 16)
        return (tail - head) % self.size

    def ready(self) -> int:
        tail, head = self._number(self.consume[0], 8), self._number(self.produce[0], 16)
        return (tail - head) % self.size

    def _spans(self, pages: list[int], at: int, length: int) -> list[tuple[int, int]]:
        spans = []
        while length:
            here = min(PAGE - at % PAGE, self.size - at, length)
            spans.append((pages[1 + at // PAGE] * PAGE + at % PAGE, here))
            at, length = (at + here) % self.size, length - here
        return spans

    def tell(self, kind: int, word: int = 0) -> None:
        self.driver.tell(kind, self.host, self.guest, word)

    def write(self, data: bytes) -> int:
        """How much found room."""
        length = min(len(data), self.size - 1 - self.used())
        tail, done = self._number(self.produce[0], 8), 0
        for address, here in self._spans(self.produce, tail, length):
            self.driver.vm.write_memory(address, data[done : done + here])
            done += here
        self.set_number(self.produce[0], 8, (tail + length) % self.size)
        if length and (self.old or self.used() == length):
            self.tell(WROTE)
        if self.old and length < len(data):
            self.tell(WAITING_WRITE)
        return length

    def read(self, limit: int = 1 << 30) -> bytes:
        length = min(self.ready(), limit)
        head = self._number(self.produce[0], 16)
        spans = self._spans(self.consume, head, length)
        data = b"".join(self.driver.vm.read_memory(address, here) for address, here in spans)
        self.set_number(self.produce[0], 16, (head + length) % self.size)
        # Whether it was full: the host may have written until the head had moved.
        if length and (self.old or self.size - 1 - self.ready() == length):
            self.tell(READ)
        if self.old and not length:
            self.tell(WAITING_READ)
        return data

    def read_all(self, length: int) -> bytes:
        data, end = b"", time.monotonic() + LIMIT_S
        while len(data) < length:
            if not (more := self.read(length - len(data))):
                assert time.monotonic() < end, f"of {length} bytes {len(data)} have come"
                time.sleep(0.001)
            data += more
        return data

    def close(self) -> int:
        return self.driver.detach(self.handle)
