"""Unix sockets of our own: where private ones lie, and those that others connect to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from tetrarch._files import remove_tree
from tetrarch.errors import HostError

__all__ = ["ListeningSocket", "SocketDirectory", "remove_dead_socket", "socket_place"]

#: What a path has, of the 107 bytes that an address holds (unix(7)), before our names.
_PLACE_MAX: Final = 64
_BACKLOG: Final = 16
#: Of directories of ours that are locked, and of nothing else.
_PREFIX: Final = "tetrarch-sock-"


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

    def fileno(self) -> int:
        """For who waits for clients among other things."""
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """The next client; None once it is closed."""
        try:
            return self._socket.accept()[0]
        except OSError:
            return None

    def close(self) -> None:
        """Also wakes a thread that waits in accept()."""
        with contextlib.suppress(OSError):
            # Somebody may have put another in its place.
            if os.stat(self.path).st_ino == self._inode:
                self.path.unlink()
        # close() alone does not wake it.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


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
