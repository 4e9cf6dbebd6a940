"""Shows a machine to viewers: the remote framebuffer protocol (RFC 6143) on a socket.

The server listens until the machine has ended. No thread of the machine waits for a viewer; a
viewer has two of its own (session.py).
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Final, NamedTuple

from tetrarch._files import read_bounded
from tetrarch._seldom import Seldom
from tetrarch.display.display import Display
from tetrarch.endpoint import listen
from tetrarch.errors import ConfigError, HostError
from tetrarch.machine.log import MachineLog
from tetrarch.vnc.hands import Hands, ViewerHands
from tetrarch.vnc.handshake import PASSWORD_BYTES, WrongPassword
from tetrarch.vnc.messages import NotRfb
from tetrarch.vnc.session import Gone, Session
from tetrarch.vnc.spec import DisplaySpec

__all__ = ["Viewer", "VncServer"]

#: Who opens more has forgotten to close them.
_VIEWERS_MAX: Final = 16
#: Of those that have not been let in: who guesses passwords waits for each.
_WAITING_MAX: Final = 4


class Viewer(NamedTuple):
    """Who watches: a host and a port, or nothing where it came by a Unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.host else "the Unix socket"


class VncServer:
    def __init__(self, name: str, display: Display, hands: Hands, spec: DisplaySpec) -> None:
        """Listens from now on; ``name`` is the machine's. Raises HostError where it cannot, and
        ConfigError for a password that is none."""
        self.spec = spec
        self._password = _password(spec)
        self._listener, address = listen(spec.place)
        self.address = address
        """Where viewers find it: HOST:PORT, or a path."""
        self._log = MachineLog(name)
        self._complaint = Seldom()
        self._name = name
        self._display = display
        self._hands = hands
        # Guards the rest.
        self._lock = threading.Lock()
        self._waiting: set[Session] = set()
        self._viewers: dict[Session, Viewer] = {}
        self._closed = False
        threading.Thread(target=self._accept, name="vnc", daemon=True).start()

    @property
    def viewers(self) -> list[Viewer]:
        """Who watches at the moment."""
        with self._lock:
            return list(self._viewers.values())

    @property
    def has_password(self) -> bool:
        return self._password is not None

    def close(self) -> None:
        """Hangs up on all viewers, and listens no more."""
        with self._lock:
            self._closed = True
            sessions = [*self._waiting, *self._viewers]
        self._listener.close()
        for session in sessions:
            session.end()

    def _accept(self) -> None:
        while not self._listener.closed:
            if (connection := self._listener.accept()) is not None:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            waiting = len(self._waiting)
            full = waiting >= _WAITING_MAX or waiting + len(self._viewers) >= _VIEWERS_MAX
            if not full and not self._closed:
                session = Session(
                    connection, self._name, self._display.watch(), ViewerHands(self._hands)
                )
                with suppress(RuntimeError):  # the host gives no thread
                    threading.Thread(
                        target=self._serve,
                        args=(session, connection),
                        name="vnc-viewer",
                        daemon=True,
                    ).start()
                    self._waiting.add(session)
                    return
        connection.close()

    def _serve(self, session: Session, connection: socket.socket) -> None:
        viewer = _viewer(connection)
        try:
            with connection:
                session.let_in(self._password)
                with self._lock:
                    self._waiting.discard(session)
                    if self._closed:
                        return
                    self._viewers[session] = viewer
                session.run()
        except WrongPassword:
            if self._complaint.due():
                self._log.warning("a viewer at %s gave a wrong password", viewer)
        except (Gone, NotRfb, OSError) as error:
            self._log.debug("a viewer at %s is gone: %s", viewer, error)
        finally:
            with self._lock:
                self._waiting.discard(session)
                self._viewers.pop(session, None)


def _viewer(connection: socket.socket) -> Viewer:
    with suppress(OSError):
        address = connection.getpeername()
        if isinstance(address, tuple):
            return Viewer(address[0], address[1])
    return Viewer("", 0)


def _password(spec: DisplaySpec) -> bytes | None:
    """The first line of its file."""
    if spec.password_file is None:
        return None
    try:
        data = read_bounded(spec.password_file)
    except OSError as error:
        raise HostError(
            f"cannot read the password of the display, {spec.password_file}: {error.strerror}",
            mend="name another file",
        ) from error
    password = data.split(b"\n", 1)[0].rstrip(b"\r")
    if not 1 <= len(password) <= PASSWORD_BYTES:
        raise ConfigError(
            f"the password in {spec.password_file} has {len(password)} bytes, and viewers take 1"
            f" to {PASSWORD_BYTES}",
            mend="write a shorter one" if password else "write one into its first line",
        )
    return password
