"""Frames to and from the agent, over the socket of a machine's vsock device.

The form is that of ``crates/agent/src/protocol.rs``: a byte that says what it is, four of its
length (little-endian), and the rest. Input is sent as far as the agent has room for it.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from tetrarch._readiness import readable
from tetrarch.errors import TetrarchError

__all__ = [
    "ERROR",
    "EXIT",
    "INPUT_WINDOW",
    "OUTPUT",
    "PORT",
    "RUN",
    "AgentError",
    "AgentStream",
    "connect",
    "encode_run",
    "encode_window",
]

#: Where the agent listens.
PORT: Final = 1024

HELLO: Final = b"H"
RUN: Final = b"R"
INPUT: Final = b"I"
WINDOW: Final = b"W"
SIGNAL: Final = b"S"
OUTPUT: Final = b"O"
ERROR: Final = b"E"
EXIT: Final = b"X"
TAKEN: Final = b"T"
SIGNALLED: Final = b"G"

VERSION: Final = 1
#: Input that may be on its way to the command, in bytes.
INPUT_WINDOW: Final = 256 << 10

_HEAD: Final = struct.Struct("<cI")
#: What is sent in one frame at most; the agent takes up to 1 MiB.
_CHUNK: Final = 64 << 10
_LONGEST: Final = 1 << 20
_RETRY_S: Final = 0.05
_ANSWER_S: Final = 5.0
_ANSWER_S_LEAST: Final = 0.5


class AgentError(TetrarchError):
    """The agent in the guest cannot be reached, or has gone."""


class AgentStream:
    """One command's connection. Sending is for any thread but a signal handler, reading for one."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._room = INPUT_WINDOW
        self._waiting_since: float | None = None
        self.gone = False
        """It has ended: nothing more can be read."""
        self.on_room: Callable[[], object] = lambda: None
        """Called by the reader when the agent has taken input."""
        self.signalled = 0
        """How many signals the agent has delivered."""

    @property
    def room(self) -> int:
        """Bytes of input that can be sent without waiting."""
        with self._changed:
            return self._room

    @property
    def stalled(self) -> float:
        """Seconds since the agent has last taken any of the input that is under way; 0 without."""
        with self._changed:
            since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._sending:
            self._stream.sendall(_HEAD.pack(kind, len(body)) + body)

    def send_input(self, data: bytes) -> None:
        """Input of the command; an empty one is its end.

        Waits while the command does not take it and another thread reads what the agent says.
        """
        sent = 0
        while sent < len(data):
            with self._changed:
                self._changed.wait_for(lambda: self._room > 0 or self.gone)
                if self.gone:
                    raise BrokenPipeError
                chunk = data[sent : sent + min(self._room, _CHUNK)]
                self._room -= len(chunk)
                if self._waiting_since is None:
                    self._waiting_since = time.monotonic()
            self.send(INPUT, chunk)
            sent += len(chunk)
        if not data:
            self.send(INPUT)

    def send_window(self, rows: int, columns: int) -> None:
        self.send(WINDOW, encode_window(rows, columns))

    def send_signal(self, number: int) -> None:
        self.send(SIGNAL, bytes([number]))

    def ready(self, timeout: float) -> bool:
        """Whether there is something to read, within so many seconds."""
        return bool(readable(self._stream, timeout=timeout))

    def read(self) -> tuple[bytes, bytes]:
        """The next frame that is the command's. Raises AgentError where there is none any more."""
        while True:
            kind, data = self._read_frame()
            if kind == TAKEN:
                with self._changed:
                    self._room = min(self._room + int.from_bytes(data[:4], "little"), INPUT_WINDOW)
                    full = self._room == INPUT_WINDOW
                    self._waiting_since = None if full else time.monotonic()
                    self._changed.notify_all()
                self.on_room()
            elif kind == SIGNALLED:
                self.signalled += 1
            else:
                return kind, data

    def greet(self) -> None:
        """Raises AgentError where the agent speaks another protocol, or none."""
        kind, data = self._read_frame()
        version = int.from_bytes(data[:4], "little")
        if kind != HELLO or version != VERSION:
            raise AgentError(
                f"the agent in the guest is of another version of tetrarch ({version})",
                "build the guest anew, or use that version",
            )

    def _read_frame(self) -> tuple[bytes, bytes]:
        kind, length = _HEAD.unpack(self._read(_HEAD.size))
        if length > _LONGEST:
            raise self._end("the agent in the guest sends nonsense", "look into the guest")
        return kind, self._read(length)

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                more = self._stream.recv(length - len(data))
            except OSError as error:
                raise self._end() from error
            if not more:
                raise self._end()
            data += more
        return bytes(data)

    def _end(
        self,
        cause: str = "the guest has ended, or its agent has",
        mend: str = "see what the guest says on its console",
    ) -> AgentError:
        with self._changed:
            self.gone = True
            self._changed.notify_all()
        return AgentError(cause, mend)

    def close(self) -> None:
        self._end()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def connect(
    path: Path,
    timeout: float,
    alive: Callable[[], bool] = lambda: True,
    paused: Callable[[], bool] = lambda: False,
) -> AgentStream:
    """Waits for the agent behind a vsock socket: until then the guest is booting.

    Raises AgentError after ``timeout`` seconds, with another mend where ``paused`` says that the
    machine is, or when ``alive`` says no.
    """
    deadline = time.monotonic() + timeout
    while alive():
        wait = min(_ANSWER_S, max(deadline - time.monotonic(), _ANSWER_S_LEAST))
        if (stream := _try(path, alive, wait)) is not None:
            return stream
        if time.monotonic() >= deadline:
            cause = f"no agent answers in the guest after {timeout:g} s"
            if paused():
                raise AgentError(f"{cause}: the machine is paused", "let it run: resume")
            raise AgentError(
                cause, "run a guest that has one: debian, or a disk of tetrarch image build"
            )
        time.sleep(_RETRY_S)
    raise AgentError("the guest ended before its agent answered", "see what it says on its console")


def _try(path: Path, alive: Callable[[], bool], wait: float) -> AgentStream | None:
    """None where nobody listens yet, or ever will."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(wait)
        stream.connect(str(path))
        stream.sendall(b"CONNECT %d\n" % PORT)
        answer = b""
        _await_word(stream, alive, wait)
        while not answer.endswith(b"\n"):
            byte = stream.recv(1)
            if not byte:
                raise ConnectionError
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionError
        _await_word(stream, alive, wait)
    except OSError:
        stream.close()
        return None
    agent = AgentStream(stream)
    try:
        agent.greet()
    except AgentError:
        silent = agent.gone
        agent.close()
        if silent:  # it did not say a word in time, or hung up
            return None
        raise
    stream.settimeout(None)
    return agent


def _await_word(stream: socket.socket, alive: Callable[[], bool], wait: float) -> None:
    """Waits until there is something to read. Raises ConnectionError where nothing comes."""
    deadline = time.monotonic() + wait
    while not readable(stream, timeout=_RETRY_S):
        if not alive() or time.monotonic() >= deadline:
            raise ConnectionError


def encode_window(rows: int, columns: int) -> bytes:
    """What WINDOW takes."""
    return struct.pack("<HH", rows & 0xFFFF, columns & 0xFFFF)


def encode_run(
    arguments: Sequence[str],
    *,
    environment: Sequence[str] = (),
    directory: str = "",
    terminal: tuple[int, int] | None = None,
) -> bytes:
    """What RUN takes. ``terminal`` is (rows, columns) of one that the command gets."""
    rows, columns = terminal or (0, 0)
    body = bytearray([terminal is not None]) + encode_window(rows, columns)
    for texts in ([directory], arguments, environment):
        body += struct.pack("<I", len(texts))
        for text in texts:
            data = text.encode("utf-8", "surrogateescape")
            body += struct.pack("<I", len(data)) + data
    return bytes(body)
