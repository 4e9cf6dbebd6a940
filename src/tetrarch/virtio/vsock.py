"""Socket device (virtio 1.2, 5.10): vsock ports of the guest and Unix sockets of the host.

A program of the host connects to PATH and writes ``CONNECT port``; a program of the guest that
connects to port N of the host (CID 2) meets who listens at PATH_N. The bytes are Rust's
(``crates/virtio/src/vsock.rs``).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioVsock
from tetrarch.errors import HostError

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["VsockKind", "listen"]

#: The guest's address: the least that is not taken (vsock(7)). Each machine has a bus of its own.
GUEST_CID: Final = 3


class VsockKind:
    device_id: Final = 19
    features: Final = 0
    queue_sizes: Final[Sequence[int]] = (128, 128, 64)
    name: Final = "vsock"

    def __init__(self, vm: Vm, path: Path, cid: int = GUEST_CID) -> None:
        self.path = path
        self.config = cid.to_bytes(8, "little")
        with listen(path) as listener:
            self.data_path = VirtioVsock(vm, self.name, cid, str(path), listener.fileno())
        self._inode = _inode(path)

    def close(self) -> None:
        """Ends all connections, and removes the socket if it is still ours."""
        self.data_path.close()
        if self._inode is not None and _inode(self.path) == self._inode:
            self.path.unlink(missing_ok=True)

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def negotiated(self, features: int) -> None:
        pass

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        # The programs at the other ends are not part of the machine.
        self.data_path.reset_transport()


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
