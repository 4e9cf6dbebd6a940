"""The guest's serial line in a file, or on a Unix socket for one client at a time."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

from tetrarch._files import open_to_write
from tetrarch.console.backend import ConsoleError, Leave, Receive
from tetrarch.errors import HostError
from tetrarch.sockets import ListeningSocket

__all__ = ["FileConsole", "SocketConsole"]

_READ_BYTES = 4096
# What a client that comes late still sees of the output: a boot log and more.
_BACKLOG_BYTES_MAX = 256 << 10
# A client that reads nothing for this long is dropped; the guest must not hang on it.
_CLIENT_TIMEOUT_S = 2.0
_IN_USE = b"tetrarch: the console has a client already\r\n"


class FileConsole:
    """Writes the output to a file, which is emptied first. Nothing is typed."""

    guest_terminal = "none"

    def __init__(self, path: Path) -> None:
        try:
            self._file = open_to_write(path)
        except OSError as error:
            raise ConsoleError(
                f"cannot write the console to {path}: {error.strerror}", mend="name another file"
            ) from error
        self._path = path

    def start(self, receive: Receive, leave: Leave) -> None:
        pass

    def write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            raise ConsoleError(
                f"cannot write the console to {self._path}: {error.strerror}", mend="free the space"
            ) from error

    def close(self) -> None:
        self._file.close()


class SocketConsole:
    """Listens on a Unix socket. A client gets what it missed, then what comes.

    There is one at a time; another is told so and hung up on.
    """

    def __init__(self, path: Path) -> None:
        # _lock guards the client and the backlog.
        self._lock = threading.Lock()
        self._client: socket.socket | None = None
        self._backlog = bytearray()
        self._closed = False
        try:
            self._listener = ListeningSocket(path, "console")
        except HostError as error:
            raise ConsoleError(error.cause, mend=error.mend) from error

    def start(self, receive: Receive, leave: Leave) -> None:
        threading.Thread(
            target=self._serve, args=(receive,), name="console-socket", daemon=True
        ).start()

    def write(self, data: bytes) -> None:
        with self._lock:
            self._backlog += data
            if len(self._backlog) > 2 * _BACKLOG_BYTES_MAX:
                del self._backlog[:-_BACKLOG_BYTES_MAX]
            if self._client is not None:
                self._send(self._client, data)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._client is not None:
                _hang_up(self._client)
        self._listener.close()

    def _serve(self, receive: Receive) -> None:
        while not self._listener.closed:
            client = self._listener.accept()
            if client is None:
                continue
            client.settimeout(_CLIENT_TIMEOUT_S)
            with self._lock:
                taken = self._closed or self._client is not None
                if not taken:
                    self._client = client
                    self._send(client, bytes(self._backlog[-_BACKLOG_BYTES_MAX:]))
            if taken:
                self._send(client, _IN_USE)
                _hang_up(client)
                continue
            threading.Thread(
                target=self._attend, args=(client, receive), name="console-client", daemon=True
            ).start()

    def _attend(self, client: socket.socket, receive: Receive) -> None:
        self._read(client, receive)
        with self._lock:
            self._client = None
        _hang_up(client)

    def _read(self, client: socket.socket, receive: Receive) -> None:
        while True:
            try:
                data = client.recv(_READ_BYTES)
            except TimeoutError:
                continue
            except OSError:
                return
            if not data:
                return
            receive(data)

    def _send(self, client: socket.socket, data: bytes) -> None:
        try:
            client.sendall(data)
        except OSError:
            # recv() in _serve sees the end and makes room for the next client.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


def _hang_up(end: socket.socket) -> None:
    # shutdown() wakes a thread that sits in accept() or recv(); close() does not.
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
