"""A disk with a GUID partition table and one root file system, in a file of its own.

sfdisk writes the table into the file, which is no block device; nobody has to be root.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from tetrarch.images.ext4 import write_ext4
from tetrarch.images.tool import find_tool, run_tool
from tetrarch.images.tree import Tree

__all__ = ["make_disk", "partition_uuid"]

_MIB = 1 << 20
#: The type of a root file system for x86-64 (UAPI group, Discoverable Partitions).
ROOT_PARTITION = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
_NAMESPACE = uuid.UUID("6f1d5a52-0a5b-4e0f-9e6e-7c1f0f2c5a11")


def partition_uuid(name: str, what: str) -> str:
    """The same for the same name of a disk, so that a build can be repeated."""
    return str(uuid.uuid5(_NAMESPACE, f"{name}/{what}"))


def make_disk(tree: Tree, disk: Path, size: int, name: str, time: int) -> str:
    """Writes a disk of ``size`` bytes whose root partition holds the tree; its PARTUUID.

    ``time`` is when its file system was made, in seconds since 1970.
    """
    sfdisk = find_tool("sfdisk", "fdisk")
    # The second copy of the table is at the end.
    first, length = _MIB, size // _MIB * _MIB - 2 * _MIB
    part = partition_uuid(name, "partition")
    with disk.open("wb") as file:
        file.truncate(size)
    table = (
        f"label: gpt\nlabel-id: {partition_uuid(name, 'disk')}\n"
        f"start={first // 512}, size={length // 512}, type={ROOT_PARTITION}, "
        f"uuid={part}, name=root\n"
    )
    run_tool([sfdisk, "--quiet", str(disk)], f"cannot partition {disk}", table)
    uuids = (partition_uuid(name, "root"), partition_uuid(name, "hash"))
    write_ext4(tree, disk, first, length, label="root", uuids=uuids, time=time)
    return part
