"""Unix sockets of our own: where private ones lie, and those that others connect to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from tetrarch._files import remove_tree
from tetrarch.errors import HostError

__all__ = [
    "Backlog",
    "ListeningSocket",
    "SocketDirectory",
    "remove_dead_network",
    "remove_dead_socket",
    "socket_place",
]

#: What a path has, of the 107 bytes that an address holds (unix(7)), before our names.
_PLACE_MAX: Final = 64
_BACKLOG: Final = 16
#: Of directories of ours that are locked, and of nothing else.
_PREFIX: Final = "tetrarch-sock-"
#: The host has no descriptor or no memory for a client, who waits (accept(2)).
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_AGAIN_S: Final = 0.02

_LOG: Final = logging.getLogger(__name__)


class SocketDirectory:
    """A private directory for sockets, which goes with the process that has made it.

    It is locked (flock(2)) as long as that process lives: what one that was killed has left goes
    when the next one is made.
    """

    def __init__(self) -> None:
        place = Path(socket_place())
        _remove_what_the_dead_left(place)
        self.path, self._lock = _locked_directory(place)
        self._process = os.getpid()

    def close(self) -> None:
        if os.getpid() == self._process:
            remove_tree(self.path)
            os.close(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _locked_directory(place: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            # Somebody has found it before it was locked, and taken it for left behind.
            os.close(descriptor)


def _remove_what_the_dead_left(place: Path) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or of a process that lives
            descriptor = os.open(path, flags)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(path)
            finally:
                os.close(descriptor)


def socket_place() -> str:
    """TMPDIR, where paths are not too long there."""
    place = tempfile.gettempdir()
    return place if len(os.fsencode(place)) <= _PLACE_MAX else "/tmp"


class Backlog:
    """Those who have connected with a socket that listens, and wait to be served.

    Where the process has no descriptor for one, that one waits, and the log says so once.
    """

    def __init__(self, listener: socket.socket, name: str) -> None:
        self._listener = listener
        self._name = name
        self._told_waiting = False
        self.closed = False

    def accept(self) -> socket.socket | None:
        """The next; None where it is ``closed``, and where there is none to be had at the moment.
        Then it has taken a moment, so that who asks again and again does not spin."""
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if not self.closed and error.errno in _NO_ROOM:
                self._wait(error)
            return None

    def close(self) -> None:
        """Also wakes a thread that waits in accept()."""
        self.closed = True
        # close() alone does not wake it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _wait(self, error: OSError) -> None:
        if not self._told_waiting:
            self._told_waiting = True
            _LOG.warning(
                "who connects to %s waits: %s; raise the limit of open files: ulimit -n",
                self._name,
                error.strerror,
            )
        time.sleep(_AGAIN_S)


class ListeningSocket:
    """A socket at a path, for this user alone (mode 0600).

    That of a process which was killed is replaced; one that answers stays.
    """

    def __init__(self, path: Path, what: str) -> None:
        """Raises HostError; ``what`` names the socket there."""
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            remove_dead_socket(path)
            # Before it has a name: at no time can anybody else connect.
            os.fchmod(self._socket.fileno(), 0o600)
            self._socket.bind(os.fspath(path))
            self._inode = os.stat(path).st_ino
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            raise HostError(
                f"cannot listen on the {what} socket {path}: {error.strerror or error}",
                mend="name another path",
            ) from error
        self._backlog = Backlog(self._socket, str(path))

    def fileno(self) -> int:
        """For who waits for clients among other things."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return self._backlog.closed

    def accept(self) -> socket.socket | None:
        """The next client, as ``Backlog.accept``."""
        return self._backlog.accept()

    def close(self) -> None:
        """Also wakes a thread that waits in accept()."""
        with contextlib.suppress(OSError):
            # Somebody may have put another in its place.
            if os.stat(self.path).st_ino == self._inode:
                self.path.unlink()
        self._backlog.close()


def remove_dead_network(path: Path) -> None:
    """Removes the socket of a network, and its lock, unless a machine that lives has it
    (crates/net/src/switch.rs)."""
    lock = path.with_name(f"{path.name}.lock")
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed the file before it was locked here.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                remove_dead_socket(path)
                lock.unlink()
        finally:
            os.close(descriptor)


def remove_dead_socket(path: Path) -> None:
    """Removes the socket of a process that was killed; any other file stays, and one that lives."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # one that is too busy to accept lives
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
