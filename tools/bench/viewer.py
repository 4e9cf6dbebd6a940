"""``python -m tools.bench.viewer ADDRESS SECONDS``: a viewer (RFC 6143) that counts what it gets.

It says "ready" when it has the whole screen, waits for a line, and prints the updates and bytes
that came in so many seconds. It is a process of its own, as viewers are.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import Final

__all__ = ["Counter"]

ZRLE: Final = 16
_LIMIT_S: Final = 60.0


class Counter:
    """At a server without a password; points are as the server has them."""

    def __init__(self, address: str) -> None:
        if address.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
        self._socket.settimeout(_LIMIT_S)
        self._stream = self._socket.makefile("rb")
        self._begin()

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def _begin(self) -> None:
        self._read(12)
        self._socket.sendall(b"RFB 003.008\n")
        self._read(self._read(1)[0])
        self._socket.sendall(b"\1")  # no authentication
        self._read(4)
        self._socket.sendall(b"\1")  # others may watch too
        self.width, self.height = struct.unpack(">HH16x", self._read(20))
        self._read(int.from_bytes(self._read(4)))
        self._socket.sendall(struct.pack(">BxHi", 2, 1, ZRLE))
        self.update(incremental=False)

    def _read(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise EOFError("the server has hung up")
        return data

    def update(self, *, incremental: bool = True) -> int:
        """Asks for an update and waits for it: its bytes."""
        whole = (0, 0, self.width, self.height)
        self._socket.sendall(struct.pack(">BB4H", 3, incremental, *whole))
        _, parts = struct.unpack(">BxH", self._read(4))
        taken = 4
        for _ in range(parts):
            length = int.from_bytes(self._read(16)[12:])  # behind place and encoding
            self._read(length)
            taken += 16 + length
        return taken

    def count(self, seconds: float) -> tuple[float, float]:
        """Updates and bytes a second."""
        begun = time.monotonic()
        updates, taken, now = 0, 0, begun
        while now < begun + seconds:
            taken += self.update()
            updates, now = updates + 1, time.monotonic()
        return updates / (now - begun), taken / (now - begun)


def main(address: str, seconds: float) -> None:
    counter = Counter(address)
    print("ready", flush=True)
    sys.stdin.readline()
    print(*counter.count(seconds), flush=True)
    counter.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
