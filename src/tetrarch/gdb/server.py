"""Serves gdb over a socket: one client at a time, and one after the other.

The server's thread is the only one that touches the machine for gdb. It sleeps in one place, for
the client, for a vCPU that stops, and for the end of the machine. It stops the
machine for a client, and lets it run on without breakpoints when the client goes, however that is.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch._readiness import readable
from tetrarch.endpoint import listen
from tetrarch.errors import MachineStateError
from tetrarch.gdb.monitor import Monitor
from tetrarch.gdb.packets import PacketReader, Signal, frame
from tetrarch.gdb.session import Leave, Session
from tetrarch.gdb.spec import GdbSpec
from tetrarch.machine.debugger import Debugger, DebuggerPort
from tetrarch.machine.log import MachineLog

if TYPE_CHECKING:
    from tetrarch.machine.machine import Machine

__all__ = ["GdbServer"]

_READ_BYTES = 1 << 16
# A client that takes nothing for this long is hung up on.
_SEND_TIMEOUT_S = 10.0


class _Gone(Exception):
    """The client has hung up, or the machine has ended."""


class GdbServer:
    """Listens until the machine has ended."""

    def __init__(
        self, machine: Machine, port: DebuggerPort, spec: GdbSpec, *, wait: bool = False
    ) -> None:
        """``wait`` holds the machine until a client lets it run. Raises HostError where it
        cannot listen there."""
        self._log = MachineLog(machine.config.name)
        # Not the machine itself: one that its user forgot is to be collected.
        self._machine = weakref.ref(machine)
        self._listener, self.address = listen(spec)
        """``address`` is what gdb's ``target remote`` takes."""
        self._port = port
        self._waiting: Debugger | None = None
        """Of the machine that is held for the first client."""
        try:
            if wait:
                self._waiting = self._port.take("gdb")
                self._waiting.stop()
        except BaseException:
            if self._waiting is not None:
                self._port.release(self._waiting)
            self._listener.close()
            raise
        # Readable once the machine has ended.
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    def close(self, exit_code: int = 0) -> None:
        """Ends it, and tells a client that the machine has ended so."""
        self._exit_code = exit_code
        os.eventfd_write(self._end, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        try:
            while True:
                client = self._accept()
                if client is None:
                    return
                with client:
                    self._attend(client)
        finally:
            self._listener.close()
            if self._waiting is not None:
                self._port.release(self._waiting)
            os.close(self._end)

    def _accept(self) -> socket.socket | None:
        while True:
            ready = readable(self._listener, self._end)
            if self._end in ready:
                return None
            client = self._listener.accept()
            if client is not None:
                client.settimeout(_SEND_TIMEOUT_S)
                return client

    def _attend(self, client: socket.socket) -> None:
        try:
            debugger, self._waiting = self._waiting or self._port.take("gdb"), None
        except MachineStateError as error:
            self._log.warning("gdb is hung up on: %s", error)
            return
        try:
            self._debug(client, debugger)
        finally:
            self._port.release(debugger)

    def _debug(self, client: socket.socket, debugger: Debugger) -> None:
        try:
            debugger.stop()
        except EngineError as error:
            self._log.warning("gdb cannot stop the machine: %s", error)
            return
        session = Session(debugger, Monitor(self._machine))
        try:
            _Connection(client, session, debugger, self._end).serve()
        except _Gone:
            if self._exit_code is not None:
                with suppress(OSError):
                    client.sendall(frame(b"W%02x" % (self._exit_code & 0xFF)))
        except OSError as error:
            self._log.debug("gdb hung up: %s", error)
        finally:
            self._let_go(debugger, kill=session.left is Leave.KILL)

    def _let_go(self, debugger: Debugger, *, kill: bool) -> None:
        try:
            debugger.detach()
        except EngineError as error:
            self._log.warning("gdb's breakpoints could not all be taken away: %s", error)
        machine = self._machine()
        if kill and machine is not None:
            machine.request_stop("by kill in gdb")


class _Connection:
    """One client on the wire."""

    def __init__(
        self, client: socket.socket, session: Session, debugger: Debugger, end: int
    ) -> None:
        self._client = client
        self._session = session
        self._debugger = debugger
        self._end = end
        self._reader = PacketReader()
        self._sent = b""

    def serve(self) -> None:
        """Until the client takes its leave; raises _Gone or OSError where it does not."""
        while self._session.left is None:
            watched: list[socket.socket | int] = [self._client, self._end]
            if not self._debugger.stopped:
                watched.append(self._debugger.alert)
            ready = readable(*watched)
            if self._end in ready:
                raise _Gone
            if self._debugger.alert in ready:
                self._vcpu_stopped()
            if self._client.fileno() in ready:
                self._read()

    def _read(self) -> None:
        data = self._client.recv(_READ_BYTES)
        if not data:
            raise _Gone
        for item in self._reader.feed(data):
            if isinstance(item, Signal):
                self._signal(item)
            else:
                self._packet(item)
            if self._session.left is not None:
                return

    def _signal(self, signal: Signal) -> None:
        match signal:
            case Signal.INTERRUPT:
                self._interrupt()
            case Signal.AGAIN if self._sent and not self._session.no_acks:
                self._client.sendall(self._sent)
            case Signal.DAMAGED if not self._session.no_acks:
                self._client.sendall(b"-")

    def _packet(self, payload: bytes) -> None:
        if not self._session.no_acks:
            self._client.sendall(b"+")
        if not self._debugger.stopped:
            # Nothing but Ctrl-C makes sense now; QEMU takes anything for that.
            self._interrupt()
            return
        reply = self._session.answer(payload)
        if reply is not None:
            self._send(reply)

    def _interrupt(self) -> None:
        if not self._debugger.stopped and self._stop():
            self._send(self._session.interrupted())

    def _vcpu_stopped(self) -> None:
        if not self._stop():
            return
        told = self._session.stopped()
        if told is None:
            self._debugger.resume()
        else:
            self._send(told)

    def _stop(self) -> bool:
        try:
            self._debugger.stop()
        except EngineError as error:
            self._send(b"O" + f"tetrarch: {error}\n".encode().hex().encode())
            return False
        return True

    def _send(self, payload: bytes) -> None:
        self._sent = frame(payload)
        self._client.sendall(self._sent)
