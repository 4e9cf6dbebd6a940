"""Unix sockets of our own: where private ones lie, and those that others connect to."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final

from tetrarch._files import ScratchDirectory
from tetrarch.errors import HostError

__all__ = ["ListeningSocket", "remove_dead_socket", "socket_directory", "socket_place"]

#: What a path has, of the 107 bytes that an address holds (unix(7)), before our names.
_PLACE_MAX: Final = 64
_BACKLOG: Final = 16


def socket_directory() -> ScratchDirectory:
    """A private directory for sockets."""
    return ScratchDirectory(prefix="tetrarch-", dir=socket_place())


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
