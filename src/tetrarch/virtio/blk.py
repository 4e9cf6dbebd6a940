"""Block device (virtio 1.2, 5.2): a disk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioBlk
from tetrarch.errors import StateError
from tetrarch.virtio.kind import QUEUE_SIZE

if TYPE_CHECKING:
    from tetrarch._native import Disk, Vm

__all__ = ["BlkKind"]

# Feature bits (5.2.3).
SEG_MAX: Final = 1 << 2
RO: Final = 1 << 5
BLK_SIZE: Final = 1 << 6
FLUSH: Final = 1 << 9
TOPOLOGY: Final = 1 << 10
MQ: Final = 1 << 12
DISCARD: Final = 1 << 13
WRITE_ZEROES: Final = 1 << 14

_SECTOR: Final = 512
#: A request is a header and a status beside its data, whose segments have a descriptor each.
_SEGMENTS: Final = QUEUE_SIZE - 2
#: What the data path takes of a discard (blk.rs): segments, and sectors of each.
_DISCARD_SEGMENTS: Final = 32
_DISCARD_SECTORS: Final = 1 << 22
#: Hosts' disks and file systems have blocks of this size, whatever they show.
_PHYSICAL: Final = 4096

#: struct virtio_blk_config (5.2.4): capacity; size_max; seg_max; geometry; blk_size; topology;
#: writeback; num_queues; discard; write zeroes and whether it may unmap.
_CONFIG: Final = struct.Struct("<QII HBB I BBHI BxH III IIB3x")


class BlkKind:
    device_id: Final = 2

    def __init__(self, vm: Vm, disk: Disk, name: str, queues: int) -> None:
        self.name = name
        self.disk = disk
        self.queue_sizes: Sequence[int] = (QUEUE_SIZE,) * queues
        self.data_path = VirtioBlk(vm, name, disk, name, queues)
        self._block_size = disk.block_size
        self.features = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | (MQ if queues > 1 else 0)
        self.features |= RO if disk.readonly else DISCARD | WRITE_ZEROES

    @property
    def config(self) -> bytes:
        physical = max(_PHYSICAL // self._block_size, 1).bit_length() - 1
        alignment = max(self.disk.discard_granularity // _SECTOR, 1)
        return _CONFIG.pack(
            self.disk.size // _SECTOR,
            *(0, _SEGMENTS),
            *(0, 0, 0),
            self._block_size,
            *(physical, 0, 1, 0),
            *(1, len(self.queue_sizes)),
            *(_DISCARD_SECTORS, _DISCARD_SEGMENTS, alignment),
            *(_DISCARD_SECTORS, _DISCARD_SEGMENTS, 1),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        pass  # the cache mode alone could be written, which is not offered

    def negotiated(self, features: int) -> None:
        pass

    def resize(self, size: int) -> None:
        """Gives the disk another size, and the driver word of it."""
        self.disk.resize(size)
        self.data_path.config_changed()

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        self.disk.retry()

    def close(self) -> None:
        """Lets go of the image: the device is out, or the machine has ended."""
        self.data_path.close()
        self.disk.close()

    def save(self) -> dict[str, Any]:
        if self.data_path.stopped:
            raise StateError(
                f"{self.name}: writes wait for room on the host",
                mend="make room, let the machine go on, and save it then",
            )
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
