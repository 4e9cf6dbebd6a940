"""A viewer (RFC 6143) of a machine's screen, which does what it is told and checks what it gets."""

from __future__ import annotations

import socket
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tetrarch._native import vnc_answer

LIMIT_S = 30.0

RAW, ZLIB, ZRLE = 0, 6, 16
DESKTOP_SIZE, CURSOR, QEMU_KEYS, EXTENDED_DESKTOP_SIZE = -223, -239, -258, -308


def open_socket(address: str) -> socket.socket:
    if address.startswith("/"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LIMIT_S)
        connection.connect(address)
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), LIMIT_S)


class Viewer:
    """With points of 32 bits, as the server has them."""

    def __init__(
        self,
        address: str | Path,
        *,
        version: bytes = b"RFB 003.008\n",
        password: bytes | None = None,
        encodings: Sequence[int] = (RAW,),
    ) -> None:
        self.socket = open_socket(str(address))
        try:
            self._begin(version, password)
            self.socket.sendall(b"\1")
            self.width, self.height = struct.unpack(">HH", self.read(4))
            self.format = self.read(16)
            self.name = self.read(int.from_bytes(self.read(4))).decode()
            self.set_encodings(*encodings)
        except BaseException:
            self.socket.close()
            raise
        self.points: dict[tuple[int, int], bytes] = {}
        self.lines = [bytearray(4 * self.width) for _ in range(self.height)]
        self.pseudo: list[tuple[int, tuple[int, int, int, int], bytes]] = []
        """Encodings that are no points, as they came."""
        self.used: set[int] = set()
        self._streams = {ZLIB: zlib.decompressobj(), ZRLE: zlib.decompressobj()}

    def _begin(self, version: bytes, password: bytes | None) -> None:
        assert self.read(12) == b"RFB 003.008\n"
        self.socket.sendall(version)
        if version == b"RFB 003.003\n":
            kind = int.from_bytes(self.read(4))
        else:
            (kind,) = self.read(self.read(1)[0])
            self.socket.sendall(bytes([kind]))
        assert kind == (1 if password is None else 2)
        if password is not None:
            self.socket.sendall(vnc_answer(password, self.read(16)))
        if password is not None or version == b"RFB 003.008\n":
            result = int.from_bytes(self.read(4))
            if result:
                raise PermissionError(
                    self.read(int.from_bytes(self.read(4))).decode()
                    if version == b"RFB 003.008\n"
                    else ""
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            got = self.socket.recv(count - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    # What it asks for

    def set_encodings(self, *encodings: int) -> None:
        self.socket.sendall(struct.pack(f">BxH{len(encodings)}i", 2, len(encodings), *encodings))

    def set_format(self, *fields: int) -> None:
        """Bits, depth, big endian, true colour, three maxima, three shifts."""
        self.socket.sendall(b"\0\0\0\0" + struct.pack(">BBBB3H3B3x", *fields))

    def request(self, *, incremental: bool = True, rect: Sequence[int] | None = None) -> None:
        rect = rect or (0, 0, self.width, self.height)
        self.socket.sendall(struct.pack(">BB4H", 3, incremental, *rect))

    def key(self, keysym: int, down: bool) -> None:
        self.socket.sendall(struct.pack(">BB2xI", 4, down, keysym))

    def type(self, *keysyms: int) -> None:
        for keysym in keysyms:
            self.key(keysym, True)
            self.key(keysym, False)

    def scan_code(self, code: int, down: bool, keysym: int = 0) -> None:
        self.socket.sendall(struct.pack(">BBHII", 255, 0, down, keysym, code))

    def point(self, x: int, y: int, buttons: int = 0) -> None:
        self.socket.sendall(struct.pack(">BBHH", 5, buttons, x, y))

    # What it gets

    def update(self) -> list[tuple[int, int, int, int]]:
        """The parts of the next update of the screen."""
        kind, count = struct.unpack(">BxH", self.read(4))
        assert kind == 0
        return [part for _ in range(count) if (part := self._part()) is not None]

    def _part(self) -> tuple[int, int, int, int] | None:
        x, y, width, height, encoding = struct.unpack(">4Hi", self.read(12))
        place = (x, y, width, height)
        if encoding < 0:
            self._pseudo(place, encoding)
            return None
        self.used.add(encoding)
        assert x + width <= self.width
        assert y + height <= self.height
        if encoding == RAW:
            data = self.read(4 * width * height)
        else:
            data = self._streams[encoding].decompress(self.read(int.from_bytes(self.read(4))))
        if encoding == ZRLE:
            self._tiles(place, data)
        else:
            assert len(data) == 4 * width * height
            self._put(place, data)
        return place

    def _pseudo(self, place: tuple[int, int, int, int], encoding: int) -> None:
        _, _, width, height = place
        data = b""
        if encoding == CURSOR:
            data = self.read(4 * width * height + (width + 7) // 8 * height)
        elif encoding == EXTENDED_DESKTOP_SIZE:
            data = self.read(4)
            data += self.read(16 * data[0])
        self.pseudo.append((encoding, place, data))
        if encoding in (DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE) and place[1] == 0:
            self.width, self.height = width, height
            self.lines = [bytearray(4 * width) for _ in range(height)]

    def _put(self, place: tuple[int, int, int, int], data: bytes) -> None:
        x, y, width, height = place
        for line in range(height):
            row = data[4 * width * line : 4 * width * (line + 1)]
            self.lines[y + line][4 * x : 4 * (x + width)] = row

    def _tiles(self, place: tuple[int, int, int, int], data: bytes) -> None:
        left, top, width, height = place
        at = 0

        def take(count: int) -> bytes:
            nonlocal at
            at += count
            return data[at - count : at]

        def length() -> int:
            total = 1
            while True:
                byte = take(1)[0]
                total += byte
                if byte != 255:
                    return total

        for y in range(0, height, 64):
            for x in range(0, width, 64):
                size = min(64, width - x), min(64, height - y)
                points = _tile(take, length, *size)
                self._put((left + x, top + y, *size), b"".join(point + b"\0" for point in points))
        assert at == len(data)

    @property
    def pixels(self) -> bytes:
        """Red, green and blue of each point, as a picture has them."""
        whole = b"".join(self.lines)
        pixels = bytearray(3 * self.width * self.height)
        for part in range(3):
            pixels[part::3] = whole[2 - part :: 4]
        return bytes(pixels)

    def until(self, seen: Callable[[], bool]) -> None:
        """Asks for what is new until it has seen that."""
        end = time.monotonic() + LIMIT_S
        while not seen():
            assert time.monotonic() < end
            self.request()
            self.update()


def _tile(
    take: Callable[[int], bytes], length: Callable[[], int], width: int, height: int
) -> list[bytes]:
    form = take(1)[0]
    count = width * height
    if form == 0:
        return [take(3) for _ in range(count)]
    if form == 1:
        return [take(3)] * count
    palette = [take(3) for _ in range(form & 127 if form != 128 else 0)]
    points: list[bytes] = []
    if form <= 16:
        bits = {2: 1, 3: 2, 4: 2}.get(form, 4)
        for _ in range(height):
            line = int.from_bytes(row := take(-(-width * bits // 8)))
            top = 8 * len(row)
            points += [
                palette[line >> top - bits * (column + 1) & (1 << bits) - 1]
                for column in range(width)
            ]
        return points
    while len(points) < count:
        if form == 128:
            point = take(3)
            points += [point] * length()
        else:
            index = take(1)[0]
            points += [palette[index & 127]] * (length() if index & 128 else 1)
    assert len(points) == count
    return points
