"""Frames to and from the agent, over the socket of a machine's vsock device.

The form is that of ``crates/agent/src/protocol.rs``: a byte that says what it is, four of its
length (little-endian), and the rest.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from tetrarch.errors import TetrarchError

__all__ = [
    "ERROR",
    "EXIT",
    "OUTPUT",
    "PORT",
    "AgentError",
    "AgentStream",
    "connect",
    "encode_run",
]

#: Where the agent listens.
PORT: Final = 1024

RUN: Final = b"R"
INPUT: Final = b"I"
WINDOW: Final = b"W"
SIGNAL: Final = b"S"
OUTPUT: Final = b"O"
ERROR: Final = b"E"
EXIT: Final = b"X"

_HEAD: Final = struct.Struct("<cI")
#: What is sent in one frame at most; the agent takes up to 1 MiB.
_CHUNK: Final = 64 << 10
_LONGEST: Final = 1 << 20
_RETRY_S: Final = 0.05


class AgentError(TetrarchError):
    """The agent in the guest cannot be reached, or has gone."""


class AgentStream:
    """One command's connection. Sending is for any thread, reading for one."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._sending = threading.Lock()

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._sending:
            self._stream.sendall(_HEAD.pack(kind, len(body)) + body)

    def send_input(self, data: bytes) -> None:
        """Input of the command; an empty one is its end."""
        for start in range(0, len(data), _CHUNK):
            self.send(INPUT, data[start : start + _CHUNK])
        if not data:
            self.send(INPUT)

    def send_window(self, rows: int, columns: int) -> None:
        self.send(WINDOW, struct.pack("<HH", rows & 0xFFFF, columns & 0xFFFF))

    def send_signal(self, number: int) -> None:
        self.send(SIGNAL, bytes([number]))

    def read(self) -> tuple[bytes, bytes]:
        """The next frame. Raises AgentError where there is none any more."""
        kind, length = _HEAD.unpack(self._read(_HEAD.size))
        if length > _LONGEST:
            raise AgentError("the agent in the guest sends nonsense", "look into the guest")
        return kind, self._read(length)

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                more = self._stream.recv(length - len(data))
            except OSError as error:
                raise _gone() from error
            if not more:
                raise _gone()
            data += more
        return bytes(data)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _gone() -> AgentError:
    return AgentError(
        "the guest has ended, or its agent has", "see what the guest says on its console"
    )


def connect(path: Path, timeout: float, alive: Callable[[], bool] = lambda: True) -> AgentStream:
    """Waits for the agent behind a vsock socket: until then the guest is booting.

    Raises AgentError after ``timeout`` seconds, or when ``alive`` says no.
    """
    deadline = time.monotonic() + timeout
    while alive():
        if (stream := _try(path)) is not None:
            return AgentStream(stream)
        if time.monotonic() >= deadline:
            raise AgentError(
                f"no agent answers in the guest after {timeout:g} s",
                "run a guest that has one: debian, or a disk of tetrarch image build",
            )
        time.sleep(_RETRY_S)
    raise AgentError("the guest ended before its agent answered", "see what it says on its console")


def _try(path: Path) -> socket.socket | None:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(5)
        stream.connect(str(path))
        stream.sendall(b"CONNECT %d\n" % PORT)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = stream.recv(1)
            if not byte:
                raise ConnectionError
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionError
        stream.settimeout(None)
    except OSError:  # nobody listens yet
        stream.close()
        return None
    return stream


def encode_run(
    arguments: Sequence[str],
    *,
    environment: Sequence[str] = (),
    directory: str = "",
    terminal: tuple[int, int] | None = None,
) -> bytes:
    """What RUN takes. ``terminal`` is (rows, columns) of one that the command gets."""
    rows, columns = terminal or (0, 0)
    body = bytearray(struct.pack("<BHH", terminal is not None, rows & 0xFFFF, columns & 0xFFFF))
    for texts in ([directory], arguments, environment):
        body += struct.pack("<I", len(texts))
        for text in texts:
            data = text.encode("utf-8", "surrogateescape")
            body += struct.pack("<I", len(data)) + data
    return bytes(body)
