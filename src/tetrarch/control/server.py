"""The control socket of a machine: QMP for several clients at once.

A client has two threads, one that reads and executes its commands and one that sends. No
thread of the machine waits for any of them: an event is put into a queue. The socket is there
until the machine has ended and its clients have been told.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tetrarch.control.protocol import QmpError, encode, error_reply
from tetrarch.control.session import Session
from tetrarch.machine.events import MachineEvent
from tetrarch.sockets import ListeningSocket

if TYPE_CHECKING:
    from tetrarch.machine.machine import Machine

__all__ = ["ControlServer"]

# Who opens more has forgotten to close them.
_CLIENTS_MAX: Final = 64
# How long the clients of a machine that has ended may take for the last that they were sent.
_LAST_S: Final = 2.0


class ControlServer:
    def __init__(self, machine: Machine, path: Path) -> None:
        """Listens from now on. Raises HostError where it cannot."""
        # Not the machine itself: one that its user forgot is to be collected.
        self._machine = weakref.ref(machine)
        self._socket = ListeningSocket(path, "control")
        # Guards the two below.
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._closed = False
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    @property
    def path(self) -> Path:
        return self._socket.path

    def tell(self, event: MachineEvent) -> None:
        """An event for all clients; never waits."""
        with self._lock:
            sessions = tuple(self._sessions)
        for session in sessions:
            session.tell(event)

    def close(self) -> None:
        """Hangs up on all clients, when they have what they were sent, and removes the socket."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sessions = tuple(self._sessions)
        self._socket.close()
        deadline = time.monotonic() + _LAST_S
        for session in sessions:
            session.end(deadline)

    def _accept(self) -> None:
        while not self._socket.closed:
            if (connection := self._socket.accept()) is not None:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed or len(self._sessions) >= _CLIENTS_MAX:
                _turn_away(connection, f"the machine has {_CLIENTS_MAX} clients already")
                return
            try:
                session = Session(connection, self._machine)
            except RuntimeError as error:  # the host gives no thread
                _turn_away(connection, str(error))
                return
            self._sessions.add(session)
        try:
            threading.Thread(
                target=self._serve, args=(session,), name="control-client", daemon=True
            ).start()
        except RuntimeError:
            with self._lock:
                self._sessions.discard(session)
            session.end(time.monotonic())

    def _serve(self, session: Session) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.discard(session)


def _turn_away(connection: socket.socket, why: str) -> None:
    """What is sent first never waits."""
    refusal = QmpError(why)
    with suppress(OSError), connection:
        connection.send(encode(error_reply(refusal)))
