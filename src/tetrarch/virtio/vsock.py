"""Socket device (virtio 1.2, 5.10): vsock ports of the guest and Unix sockets of the host.

The bytes are Rust's (``crates/virtio/src/vsock.rs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioVsock
from tetrarch.vsock import VsockSocket

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["VsockKind"]

#: The guest's address: the least that is not taken (vsock(7)). Each machine has a bus of its own.
GUEST_CID: Final = 3


class VsockKind:
    device_id: Final = 19
    features: Final = 0
    queue_sizes: Final[Sequence[int]] = (128, 128, 64)
    name: Final = "vsock"

    def __init__(self, vm: Vm, path: Path, cid: int = GUEST_CID) -> None:
        self.config = cid.to_bytes(8, "little")
        self._socket = VsockSocket(path)
        descriptor = self._socket.listener.fileno()
        self.data_path = VirtioVsock(vm, self.name, cid, str(path), descriptor)
        self._socket.taken()

    def close(self) -> None:
        """Ends all connections, and removes the socket if it is still ours."""
        self.data_path.close()
        self._socket.remove()

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def negotiated(self, features: int) -> None:
        pass

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        # The programs at the other ends are not part of the machine.
        self.data_path.reset_transport()
