"""A driver of a network card that knows no more than the specification (5.1)."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack
from typing import Self

from tests.virtio.driver import Driver, Mmio

from tetrarch._native import Network, Vm
from tetrarch.net import NetSpec
from tetrarch.net.network import OpenNetwork
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.net import NetKind

MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
#: A header that leaves nothing to the device.
PLAIN = bytes(12)

# Where the driver has its buffers.
SENT, COMMAND, ANSWER, RECEIVED = 0x40_0000, 0x48_0000, 0x48_8000, 0x50_0000
ROOM = 0x1_1000


class Wire:
    gsi = 20

    def set(self, level: bool) -> None:
        pass

    def pulse(self) -> None:
        pass


class Card(Driver):
    """Sends and receives one frame at a time."""

    def __init__(self, network: OpenNetwork, mac: bytes = MAC) -> None:
        vm = Vm("bt", 8 << 20)
        self.kind = NetKind(vm, network, "net0", mac)
        self.mmio = VirtioMmio(self.kind, Wire())
        super().__init__(vm, Mmio(self.mmio))
        self._rooms = 0

    def send(self, frame: bytes, header: bytes = PLAIN, queue: int = 1) -> None:
        self.vm.write_memory(SENT, header + frame)
        assert self.ask(queue, [(SENT, len(header + frame), False)]) == 0

    def offer_room(self, queue: int = 0) -> None:
        self.offer(queue, [(RECEIVED + ROOM * (self._rooms % 16), ROOM, True)])
        self._rooms += 1

    def has_used(self, queue: int) -> bool:
        return self.used_index(queue) != self._used[queue]

    def receive(self, queue: int = 0) -> tuple[bytes, bytes]:
        """Header and frame of the next; there is to be room, one at a time."""
        _, written = self.wait(queue)
        data = self.vm.read_memory(RECEIVED + ROOM * ((self._rooms - 1) % 16), written)
        return data[:12], data[12:]

    def command(self, data: bytes, queue: int = 2) -> int:
        self.vm.write_memory(COMMAND, data)
        assert self.ask(queue, [(COMMAND, len(data), False), (ANSWER, 1, True)]) == 1
        return self.vm.read_memory(ANSWER, 1)[0]


class Program:
    """The other end of a stream."""

    def __init__(self) -> None:
        self._theirs, self.socket = socket.socketpair()
        self.socket.settimeout(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._theirs.close()
        self.socket.close()

    def network(self, spec: NetSpec | None = None) -> OpenNetwork:
        native = Network.stream("a test", self._theirs.fileno())
        self._theirs.close()
        return OpenNetwork(spec or NetSpec("user"), native, ExitStack(), threading.Event())

    def send(self, frame: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(frame)) + frame)

    def receive(self) -> bytes:
        (length,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            assert more, "the card has closed the stream"
            data += more
        return data


def udp(source: tuple[str, int], destination: tuple[str, int], data: bytes) -> bytes:
    """A frame from OTHER to MAC by IPv4, whose datagram has no checksum."""
    segment = struct.pack(">HHHH", source[1], destination[1], 8 + len(data), 0) + data

    def header(checksum: int) -> bytes:
        return struct.pack(
            ">BBHHHBBH4s4s",
            *(0x45, 0, 20 + len(segment), 0, 0, 64, 17, checksum),
            socket.inet_aton(source[0]),
            socket.inet_aton(destination[0]),
        )

    total = sum(struct.unpack(">10H", header(0)))
    total = (total & 0xFFFF) + (total >> 16)
    return MAC + OTHER + b"\x08\x00" + header(~total & 0xFFFF) + segment
