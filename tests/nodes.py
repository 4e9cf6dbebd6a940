"""When Linux lets a disk be used."""

from __future__ import annotations


def can_be_opened(device: str) -> str:
    """Shell words for a condition: that /dev/``device`` can be opened.

    That its node is there is too little: Linux makes it before it enters the disk where open(2)
    looks for it, and an open between the two ends with ENXIO (block/genhd.c, device_add_disk:
    device_add, then bdev_add).
    """
    return f"(: </dev/{device}) 2>/dev/null"
