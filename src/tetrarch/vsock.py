"""Where programs of the host ask for the guest's vsock ports, whatever device has these.

A program of the host connects to PATH and writes ``CONNECT port``; a program of the guest that
connects to port N of the host (CID 2) meets who listens at PATH_N. The bytes are Rust's
(``crates/vsock``).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tetrarch.errors import HostError

__all__ = ["VsockSocket", "listen"]


class VsockSocket:
    """The socket at PATH, for a device to take over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = listen(path)
        self._inode = _inode(path)

    def taken(self) -> None:
        """The device has a descriptor of its own."""
        self.listener.close()

    def remove(self) -> None:
        """Removes it if it is still ours."""
        self.listener.close()
        if self._inode is not None and _inode(self.path) == self._inode:
            self.path.unlink(missing_ok=True)


def listen(path: Path) -> socket.socket:
    """A Unix socket at ``path`` that only its owner may connect to.

    One that a program has left there is replaced. Raises HostError where another listens, or
    nothing can be made there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(os.fspath(path))
                except OSError:
                    path.unlink(missing_ok=True)
                else:
                    raise HostError(
                        f"another program listens at {path}", mend="name another socket"
                    )
        old = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(old)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot make the socket {path}: {error.strerror or error}",
            mend="name a path of less than 108 bytes in a directory that you can write to",
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None
