"""Devices whose queues another process serves: a back end, by vhost-user.

Chains go to it, and back, in Rust (``crates/virtio/src/vhost_user``). The back end sees all of
the guest's memory; what a device of its is, is here.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tetrarch._native import VhostUserBackEnd, VhostUserDevice
from tetrarch.errors import HostError, StateError
from tetrarch.virtio import blk, net
from tetrarch.virtio.kind import QUEUE_SIZE

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["VhostUserBlk", "VhostUserFs", "VhostUserNet", "connect"]

_CONNECT_S = 5.0

# Feature bits of the block device that are the back end's to offer (virtio 1.2, 5.2.3).
_SIZE_MAX: Final = 1 << 1
_GEOMETRY: Final = 1 << 4
_BLK_FEATURES: Final = (
    _SIZE_MAX | blk.SEG_MAX | _GEOMETRY | blk.RO | blk.BLK_SIZE | blk.FLUSH | blk.TOPOLOGY
    | blk.DISCARD | blk.WRITE_ZEROES
)  # fmt: skip
#: Its configuration up to the fields of write zeroes (5.2.4), and where some of them are.
_BLK_CONFIG: Final = 60
_SEGMENTS: Final = slice(12, 16)
_QUEUES: Final = slice(34, 36)

# Of the network device (5.1.3), without those that need a control queue.
_GUEST_UFO: Final = 1 << 10
_HOST_UFO: Final = 1 << 14
_NET_FEATURES: Final = (
    net.CSUM | net.GUEST_CSUM | net.GUEST_TSO4 | net.GUEST_TSO6 | net.GUEST_ECN | _GUEST_UFO
    | net.HOST_TSO4 | net.HOST_TSO6 | net.HOST_ECN | _HOST_UFO | net.MRG_RXBUF
)  # fmt: skip
_LINK_UP: Final = 1

#: What the path to the back end has room for (crates/virtio/src/vhost_user/ring.rs).
_FS_QUEUE: Final = 1024
#: struct virtio_fs_config (5.11.4): a tag of so many bytes, and the number of request queues.
TAG_BYTES: Final = 36

Made = TypeVar("Made")


def connect(path: Path) -> socket.socket:
    """The socket to a back end that listens at ``path``. Raises HostError."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(_CONNECT_S)
        stream.connect(str(path))
    except OSError as error:
        stream.close()
        raise HostError(
            f"cannot connect to the vhost-user back end at {path}: {error.strerror or error}",
            mend="start it first, and name the socket where it listens",
        ) from error
    return stream


@contextmanager
def _speaking(where: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise HostError(
            f"{where}: {error}", mend="see what it says itself, and whether it speaks vhost-user"
        ) from error


class _VhostUserKind:
    """What all of them have in common."""

    data_path: VhostUserDevice
    queue_sizes: Sequence[int]

    def __init__(self, name: str, stream: socket.socket, where: str) -> None:
        """Takes the socket over. ``where`` names the back end in errors."""
        self.name = name
        self._where = where
        with stream, _speaking(where):
            self.back_end = VhostUserBackEnd(stream.fileno())

    def _ask(self, question: Callable[[], Made]) -> Made:
        with _speaking(self._where):
            return question()

    def _require_queues(self, count: int) -> None:
        if self.back_end.queues < count:
            raise HostError(
                f"{self._where}: the back end has {self.back_end.queues} queues, not {count}",
                mend="start it with more, or name one for this kind of device",
            )

    def write_config(self, offset: int, data: bytes) -> None:
        pass  # nothing that could be written is offered

    def negotiated(self, features: int) -> None:
        pass

    def close(self) -> None:
        """Hangs up: the device is out, or the machine has ended."""
        self.data_path.close()

    def save(self) -> dict[str, Any]:
        raise StateError(
            f"{self.name} cannot be saved: its state is that of another process ({self._where})",
            mend="detach it first, or make the machine without it",
        )

    def load(self, state: dict[str, Any]) -> None:
        self.save()


class VhostUserBlk(_VhostUserKind):
    """A disk of a back end, such as qemu-storage-daemon's; what it is, the back end says."""

    device_id: Final = 2

    def __init__(self, vm: Vm, path: Path, name: str, queues: int) -> None:
        """``queues`` at most. Raises HostError."""
        super().__init__(name, connect(path), str(path))
        config = bytearray(self._ask(lambda: self.back_end.config(_BLK_CONFIG)))
        offered = self.back_end.features
        if offered & blk.MQ:
            queues = min(queues, int.from_bytes(config[_QUEUES], "little"))
        queues = max(1, min(queues, self.back_end.queues)) if offered & blk.MQ else 1
        segments = int.from_bytes(config[_SEGMENTS], "little")
        config[_SEGMENTS] = min(segments, QUEUE_SIZE - 2).to_bytes(4, "little")
        config[_QUEUES] = queues.to_bytes(2, "little")
        self.config = bytes(config)
        self.features = offered & _BLK_FEATURES | (blk.MQ if queues > 1 else 0)
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self.data_path = VhostUserDevice(vm, name, "blk", self.back_end, queues)

    def retry(self) -> None:
        """The machine goes on; a back end's errors are the guest's at once."""


class VhostUserNet(_VhostUserKind):
    """A network card of a back end: one pair of queues."""

    device_id: Final = 1

    def __init__(self, vm: Vm, path: Path, name: str, mac: bytes, mtu: int | None) -> None:
        """Raises HostError."""
        super().__init__(name, connect(path), str(path))
        self._require_queues(2)
        self._mac = mac
        self._mtu = mtu
        self.features = self.back_end.features & _NET_FEATURES | net.MAC | net.STATUS
        self.features |= 0 if mtu is None else net.MTU
        self.queue_sizes = (QUEUE_SIZE,) * 2
        self.data_path = VhostUserDevice(vm, name, "net", self.back_end, 2)

    @property
    def config(self) -> bytes:
        status = _LINK_UP if self.data_path.alive else 0
        return net.CONFIG.pack(self._mac, status, 1, self._mtu or 0)

    def stats(self) -> dict[str, int]:
        """Nothing: the back end counts its frames."""
        return {}


class VhostUserFs(_VhostUserKind):
    """A file system (5.11) of a back end, virtiofsd."""

    device_id: Final = 26
    features: Final = 0

    def __init__(self, vm: Vm, stream: socket.socket, name: str, tag: str, where: str) -> None:
        """``tag`` is the name to mount it by. Raises HostError."""
        super().__init__(name, stream, where)
        self._require_queues(2)
        # One for what cannot wait, and one for requests.
        self.queue_sizes = (_FS_QUEUE,) * 2
        self.config = tag.encode().ljust(TAG_BYTES, b"\0") + (1).to_bytes(4, "little")
        self.data_path = VhostUserDevice(vm, name, "fs", self.back_end, 2)
