"""The guest's serial line for any number of clients of a Unix socket, who come and go.

A client gets what the guest has said so far, as far as it is kept, then what it says. What a
client sends is typed into the guest; one that ends that (shutdown(2)) gets what there is and is
hung up on. Nobody waits for a client: the guest's output goes into one
buffer, in which each client has a place. One that falls behind the buffer's start misses what is
no longer there, and is told so.

The socket carries the bytes as they are, so any program that speaks to Unix sockets can be a
client. Where the line has another end too, this process's terminal, that one comes first.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from tetrarch.console.backend import ConsoleBackend, ConsoleError, Leave, Receive, Resize
from tetrarch.errors import HostError
from tetrarch.sockets import ListeningSocket

__all__ = ["SharedConsole"]

#: What is kept of the output: several boot logs.
_KEPT_BYTES: Final = 1 << 20
#: More clients than a user has terminals; each costs a descriptor and, when it comes, a copy of
#: what is kept.
_CLIENTS_MAX: Final = 64
#: What may be on its way from clients to a guest that does not read.
_TYPED_BYTES_MAX: Final = 64 << 10
_CHUNK: Final = 64 << 10
_FULL: Final = b"tetrarch: the console has too many clients\r\n"
#: What a client that comes late must not be shown of the past: questions to a terminal, which
#: would answer them into the guest (ECMA-48 DSR and DA, xterm's OSC and DECRQSS queries).
_QUESTIONS: Final = re.compile(
    rb"\x1b\[[?>=]?[0-9;]*[cn]|\x1bZ|\x1b\][0-9;]*;\?(?:\x07|\x1b\\)|\x1bP\$q[^\x1b]*\x1b\\"
)


@dataclass(eq=False)
class _Client:
    socket: socket.socket
    place: int
    """Of the next byte for it, counted from the first that the guest sent."""
    pending: bytes = b""
    """What it gets before that."""
    waits: bool = False
    """Its socket is full."""
    leaving: bool = False
    """It sends no more: it gets what there is, and is hung up on."""


class SharedConsole:
    """Lock: ``_lock`` guards the buffer, the eventfd and the count of what is typed; it is held for
    copies in memory alone."""

    def __init__(self, path: Path, inner: ConsoleBackend | None = None) -> None:
        """Listens at ``path``. ``inner`` is the line's other end in this process.

        Raises ConsoleError where it cannot.
        """
        self._inner = inner
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._end = 0
        self._closing = False
        self._started = False
        self._clients: set[_Client] = set()
        self._typed: SimpleQueue[bytes | None] = SimpleQueue()
        self._typed_bytes = 0
        try:
            self._listener = ListeningSocket(path, "console")
        except HostError as error:
            raise ConsoleError(error.cause, mend=error.mend) from error
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads: list[threading.Thread] = []

    @property
    def interactive(self) -> bool:
        return bool(getattr(self._inner, "interactive", False))

    @property
    def guest_terminal(self) -> str:
        """Of clients nothing is known: the guest is told nothing."""
        return str(getattr(self._inner, "guest_terminal", ""))

    def watch_size(self, resize: Resize) -> None:
        watch = getattr(self._inner, "watch_size", None)
        if callable(watch):
            watch(resize)

    def start(self, receive: Receive, leave: Leave) -> None:
        if self._inner is not None:
            self._inner.start(receive, leave)
        self._started = True
        for name, target in (
            ("console-clients", self._serve),
            ("console-typed", lambda: self._type(receive)),
        ):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def write(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.write(data)
        with self._lock:
            self._kept += data
            self._end += len(data)
            # In large steps, so that the buffer is not moved for each byte.
            if len(self._kept) > 2 * _KEPT_BYTES:
                del self._kept[:-_KEPT_BYTES]
        if self._clients:
            self._ring()

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
        if self._closing:
            return
        self._closing = True
        self._ring()
        self._typed.put(None)
        if not self._started:
            self._release()
        # A guest that does not read may keep the other one: it is a daemon.
        elif threading.current_thread() not in self._threads:
            self._threads[0].join()

    @property
    def text(self) -> str:
        """What is kept of the output."""
        with self._lock:
            return self._kept.decode("utf-8", "replace")

    def _ring(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # The clients' thread.

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            selector.register(self._wake, selectors.EVENT_READ, self._woken)
            while not self._closing:
                for client in self._clients:
                    self._watch(selector, client)
                for key, events in selector.select():
                    if isinstance(client := key.data, _Client):
                        self._attend(selector, client, events)
                    else:
                        key.data()
                self._send_all(selector)
        self._send_last()
        self._release()

    def _woken(self) -> None:
        os.eventfd_read(self._wake)

    def _watch(self, selector: selectors.BaseSelector, client: _Client) -> None:
        """Room to send where it waits for it; what it types as long as the guest reads."""
        events = selectors.EVENT_WRITE if client.waits else 0
        if self._typed_bytes < _TYPED_BYTES_MAX and not client.leaving:
            events |= selectors.EVENT_READ
        known = selector.get_map().get(client.socket)
        if known is None:
            if events:
                selector.register(client.socket, events, client)
        elif not events:
            selector.unregister(client.socket)
        elif known.events != events:
            selector.modify(client.socket, events, client)

    def _accept(self) -> None:
        stream = self._listener.accept()
        if stream is None:
            return
        stream.setblocking(False)
        if len(self._clients) >= _CLIENTS_MAX:
            with stream:
                stream.send(_FULL)
            return
        with self._lock:
            history, place = bytes(self._kept), self._end
        self._clients.add(_Client(stream, place, _QUESTIONS.sub(b"", history)))

    def _attend(self, selector: selectors.BaseSelector, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            client.waits = False
        if events & selectors.EVENT_READ:
            try:
                data = client.socket.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                client.leaving = True
                return
            with self._lock:
                self._typed_bytes += len(data)
            self._typed.put(data)

    def _send_all(self, selector: selectors.BaseSelector) -> None:
        for client in list(self._clients):
            try:
                while not client.waits and self._send_some(client):
                    pass
                if client.leaving and not client.waits:
                    self._drop(selector, client)
            except BlockingIOError:
                client.waits = True
            except OSError:
                self._drop(selector, client)

    def _send_some(self, client: _Client) -> bool:
        """False: it has all."""
        if not client.pending:
            client.pending = self._next(client)
        if not client.pending:
            return False
        sent = client.socket.send(client.pending[:_CHUNK])
        client.pending = client.pending[sent:]
        return True

    def _next(self, client: _Client) -> bytes:
        with self._lock:
            start = self._end - len(self._kept)
            missed = start - client.place
            client.place = max(client.place, start)
            at = client.place - start
            data = bytes(self._kept[at : at + _CHUNK])
            client.place += len(data)
        if missed > 0:
            return b"\r\n[tetrarch: %d bytes are missing here]\r\n" % missed + data
        return data

    def _drop(self, selector: selectors.BaseSelector, client: _Client) -> None:
        if client.socket in selector.get_map():
            selector.unregister(client.socket)
        client.socket.close()
        self._clients.discard(client)

    def _send_last(self) -> None:
        """What clients have room for at once: those that do not read are not waited for."""
        for client in self._clients:
            try:
                while self._send_some(client):
                    pass
            except OSError:
                pass

    def _release(self) -> None:
        for client in self._clients:
            client.socket.close()
        self._clients.clear()
        self._listener.close()
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    # The thread that types.

    def _type(self, receive: Receive) -> None:
        while (data := self._typed.get()) is not None:
            with suppress(BrokenPipeError):  # the guest has ended
                receive(data)
            with self._lock:
                full = self._typed_bytes >= _TYPED_BYTES_MAX
                self._typed_bytes -= len(data)
            if full:
                self._ring()
