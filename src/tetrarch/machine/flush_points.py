"""The disks of a saved machine: where they stood, and whether they still do.

What the guest was told is written is on the image when a machine is saved, and the file says what
the image was then. A guest that went on with another disk than it left would destroy its file
system: it has half of it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from stat import S_ISBLK
from typing import TYPE_CHECKING, Any

from tetrarch.errors import HostError, StateError

if TYPE_CHECKING:
    from tetrarch.machine.blocks import BlockNode, BlockNodes

__all__ = ["FlushPoint", "check_flush_points", "flush_disks", "require_kept"]

FlushPoint = dict[str, Any]
"""``file_bytes`` and ``mtime_ns`` of an image; None of a block device, which does not tell."""


def require_kept(blocks: BlockNodes) -> None:
    """Raises StateError for a disk whose writes are in no file that stays."""
    for node in blocks.all():
        counted = node.disk.stats()
        if node.spec.snapshot and (counted["wr_operations"] or counted["unmap_operations"]):
            raise StateError(
                f"{node.name} ({node.spec.path}) cannot be saved: what its guest wrote is"
                " forgotten at the end (snapshot=on)",
                mend="give the machine an overlay: tetrarch disk create --backing",
            )


def flush_disks(blocks: BlockNodes) -> dict[str, FlushPoint]:
    """Of a machine that is held: nothing is in flight, and then all is on the images."""
    return {node.name: _flush(node) for node in blocks.all()}


def _flush(node: BlockNode) -> FlushPoint:
    try:
        if not node.spec.readonly:
            node.disk.flush()
        return _point(node.spec.path)
    except OSError as error:
        raise HostError(
            f"{node.name} ({node.spec.path}) cannot be flushed: {error.strerror or error}",
            mend="see to its file system",
        ) from error


def _point(path: Path) -> FlushPoint:
    stat = path.stat()
    if S_ISBLK(stat.st_mode):
        return {"file_bytes": None, "mtime_ns": None}
    return {"file_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def check_flush_points(points: Mapping[str, object], images: Mapping[str, Path]) -> None:
    """Raises StateError for an image that is not as it was. One that is missing is left to who
    opens it."""
    for name, path in images.items():
        saved = points.get(name)
        try:
            now = _point(path)
        except OSError:
            continue
        if saved != now:
            raise StateError(
                f"{name} ({path}) has changed since the machine was saved",
                mend="give the image as it was then, or a copy of that by cp -p; if the guest has"
                " nothing of it in use: --allow-changed-disks",
            )
