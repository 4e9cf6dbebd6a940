"""A vhost-user back end in Python: one that serves, and one that does what it must not."""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

VERSION_1: Final = 1 << 32
PROTOCOL_FEATURES: Final = 1 << 30
MQ, REPLY_ACK, CONFIG = 1 << 0, 1 << 3, 1 << 9

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 15, 16, 17
SET_VRING_ENABLE, GET_CONFIG = 18, 24

_HEADER: Final = struct.Struct("<III")


@dataclass
class Region:
    """Memory of the front end's."""

    guest: int
    length: int
    memory: mmap.mmap
    offset: int


@dataclass
class Ring:
    """A split ring of the front end's."""

    size: int = 0
    base: int = 0
    used: int = 0
    descriptors: int = 0
    available: int = 0
    used_at: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False


@dataclass
class Request:
    """A chain: what is read, and where the answer goes."""

    ring: int
    head: int
    readable: bytes
    writable: list[tuple[int, int]]


@dataclass
class BackEnd:
    """Listens at ``path``, and serves one front end after the other on a thread."""

    path: Path
    features: int = VERSION_1 | PROTOCOL_FEATURES
    protocol: int = MQ | REPLY_ACK | CONFIG
    queues: int = 8
    config: bytes = bytes(60)
    answer: Callable[[Request], bytes | None] = lambda request: b""
    """What is written into a chain; None: it stays with the back end."""
    say: dict[int, bytes | None] = field(default_factory=dict)
    """Answers to messages in place of right ones; None: none, and b"" hangs up."""
    messages: list[int] = field(default_factory=list)
    agreed: int = 0
    """The feature bits that were set."""
    kept: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.stream: socket.socket | None = None
        self.rings: dict[int, Ring] = {}
        self._regions: list[Region] = []
        self._lock = threading.RLock()
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._stopper)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._listener.close()
        os.close(self._stop)

    def hang_up(self) -> None:
        """As one that is killed."""
        with self._lock:
            assert self.stream is not None
            self.stream.shutdown(socket.SHUT_RDWR)

    # Messages

    def _run(self) -> None:
        while self._ready(self._listener.fileno()):
            stream, _ = self._listener.accept()
            with stream:
                self.stream = stream
                self._serve(stream)
                self.stream = None
            self._forget()

    def _ready(self, *descriptors: int) -> list[int]:
        """Those that are; none when it is to end."""
        kicks = [ring.kick for ring in self.rings.values() if ring.kick >= 0]
        found, _, _ = select.select([*descriptors, *kicks, self._stop], [], [])
        return [] if self._stop in found else found

    def _serve(self, stream: socket.socket) -> None:
        try:
            while ready := self._ready(stream.fileno()):
                if stream.fileno() in ready and not self._message(stream):
                    return
                with self._lock:
                    for index, ring in list(self.rings.items()):
                        if ring.kick in ready:
                            os.read(ring.kick, 8)
                            self._look(index)
        except OSError:  # it hung up
            return

    def _message(self, stream: socket.socket) -> bool:
        data, ancillary, _, _ = stream.recvmsg(_HEADER.size, socket.CMSG_SPACE(8 * 4))
        descriptors = array.array("i")
        for _, _, body in ancillary:
            descriptors.frombytes(body[: len(body) - len(body) % 4])
        if not data:
            return False
        request, flags, size = _HEADER.unpack(data)
        payload = stream.recv(size, socket.MSG_WAITALL) if size else b""
        with self._lock:
            self.messages.append(request)
            answer = self._handle(request, payload, list(descriptors))
        if request in self.say:
            told = self.say[request]
            if told:
                stream.sendall(told)
            return told != b""
        if answer is None and flags & 8:
            answer = bytes(8)
        if answer is not None:
            stream.sendall(message(request, answer))
        return True

    def _handle(self, request: int, payload: bytes, descriptors: list[int]) -> bytes | None:
        def ring() -> Ring:
            return self.rings.setdefault(payload[0], Ring())

        match request:
            case 1:  # GET_FEATURES
                return self.features.to_bytes(8, "little")
            case 2:  # SET_FEATURES
                self.agreed = int.from_bytes(payload, "little")
            case 5:  # SET_MEM_TABLE
                self._map(payload, descriptors)
            case 8:  # SET_VRING_NUM
                ring().size = int.from_bytes(payload[4:], "little")
            case 9:  # SET_VRING_ADDR
                one = ring()
                _, one.descriptors, one.used_at, one.available, _ = struct.unpack("<5Q", payload)
            case 10:  # SET_VRING_BASE
                ring().base = ring().used = int.from_bytes(payload[4:], "little")
            case 11:  # GET_VRING_BASE
                one = self.rings.pop(payload[0], Ring())
                _close(one)
                return payload[:4] + one.base.to_bytes(4, "little")
            case 12:  # SET_VRING_KICK
                (ring().kick,) = descriptors
            case 13:  # SET_VRING_CALL
                (ring().call,) = descriptors
            case 15:  # GET_PROTOCOL_FEATURES
                return self.protocol.to_bytes(8, "little")
            case 17:  # GET_QUEUE_NUM
                return self.queues.to_bytes(8, "little")
            case 18:  # SET_VRING_ENABLE
                ring().enabled = bool(payload[4])
            case 24:  # GET_CONFIG
                length = int.from_bytes(payload[4:8], "little")
                return payload[:12] + self.config[:length].ljust(length, b"\0")
        return None

    # Memory

    def _map(self, payload: bytes, descriptors: list[int]) -> None:
        self._unmap()
        for index, descriptor in enumerate(descriptors):
            guest, length, _, offset = struct.unpack_from("<4Q", payload, 8 + 32 * index)
            memory = mmap.mmap(descriptor, offset + length)
            os.close(descriptor)
            self._regions.append(Region(guest, length, memory, offset))

    def _unmap(self) -> None:
        for region in self._regions:
            region.memory.close()
        self._regions.clear()

    def _forget(self) -> None:
        with self._lock:
            for ring in self.rings.values():
                _close(ring)
            self.rings.clear()
            self._unmap()
            self.kept.clear()

    def _place(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for region in self._regions:
            if region.guest <= address and address + length <= region.guest + region.length:
                return region.memory, region.offset + address - region.guest
        raise AssertionError(f"{length} bytes at {address:#x} are in no region")

    def read(self, address: int, length: int) -> bytes:
        memory, at = self._place(address, length)
        return memory[at : at + length]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self._place(address, len(data))
        memory[at : at + len(data)] = data

    def number(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    # Rings

    def _look(self, index: int) -> None:
        ring = self.rings[index]
        while ring.enabled and ring.base != self.number(ring.available + 2):
            head = self.number(ring.available + 4 + 2 * (ring.base % ring.size))
            ring.base = (ring.base + 1) & 0xFFFF
            request = Request(index, head, *self._chain(ring, head))
            data = self.answer(request)
            if data is None:
                self.kept.append(request)
            else:
                self.finish(request, data)

    def _chain(self, ring: Ring, head: int) -> tuple[bytes, list[tuple[int, int]]]:
        readable, writable = b"", []
        for address, length, flags in self._descriptors(ring, head):
            if flags & 2:
                writable.append((address, length))
            else:
                readable += self.read(address, length)
        return readable, writable

    def _descriptors(self, ring: Ring, head: int) -> Iterator[tuple[int, int, int]]:
        flags = 1
        while flags & 1:
            raw = self.read(ring.descriptors + 16 * head, 16)
            address, length, flags, head = struct.unpack("<QIHH", raw)
            yield address, length, flags

    def finish(self, request: Request, data: bytes, *, quiet: bool = False) -> None:
        """Writes the answer and gives the chain back; ``quiet``: without saying so."""
        with self._lock:
            left = data
            for address, length in request.writable:
                self.write(address, left[:length])
                left = left[length:]
            self.give_back(request.ring, request.head, len(data))
            if not quiet:
                self.call(request.ring)

    def give_back(self, index: int, head: int, written: int) -> None:
        ring = self.rings[index]
        at = ring.used_at + 4 + 8 * (ring.used % ring.size)
        self.write(at, struct.pack("<II", head, written))
        ring.used = (ring.used + 1) & 0xFFFF
        self.write(ring.used_at + 2, ring.used.to_bytes(2, "little"))

    def call(self, index: int) -> None:
        os.write(self.rings[index].call, (1).to_bytes(8, "little"))


def message(request: int, payload: bytes) -> bytes:
    """An answer as it is to be."""
    return _HEADER.pack(request, 5, len(payload)) + payload


def _close(ring: Ring) -> None:
    for descriptor in (ring.kick, ring.call):
        if descriptor >= 0:
            os.close(descriptor)
