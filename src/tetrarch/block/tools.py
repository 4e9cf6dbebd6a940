"""What is done with images beside running them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch._native import Disk, DiskSource, disk_check, disk_create, disk_info
from tetrarch.block.disk import disk_errors
from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError

if TYPE_CHECKING:
    from tetrarch._native import CheckReport, DiskInfo

__all__ = ["check", "convert", "create", "format_by_name", "info", "resize"]


def format_by_name(path: Path) -> DiskFormat:
    """What a new image is by its name: qcow2 or raw."""
    return "qcow2" if path.suffix == ".qcow2" else "raw"


def create(
    path: Path,
    size: int | None = None,
    *,
    image_format: DiskFormat | None = None,
    backing: str | None = None,
    backing_format: DiskFormat | None = None,
    cluster_size: int | None = None,
) -> int:
    """Makes an image, over ``backing`` if given; the size of its disk.

    ``backing`` is kept as it is written: relative to the folder of the image.
    """
    kind = image_format or ("qcow2" if backing is not None else format_by_name(path))
    with disk_errors():
        return disk_create(path, kind, size, backing, backing_format, cluster_size)


def info(path: Path, image_format: DiskFormat | None = None) -> DiskInfo:
    with disk_errors():
        return disk_info(path, image_format)


def check(path: Path, *, repair: bool = False) -> CheckReport:
    """Compares the refcounts of a qcow2 image with what it refers to."""
    with disk_errors():
        return disk_check(path, repair)


def convert(
    source: Path,
    target: Path,
    *,
    image_format: DiskFormat | None = None,
    source_format: DiskFormat | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copies a disk into a new image, with all of its backing files and without its zeroes."""
    with disk_errors():
        opened = DiskSource(source, source_format)
        size = opened.size
        chosen = image_format or format_by_name(target)
        opened.copy(target, chosen, lambda done: progress(done, size))


def resize(
    path: Path, size: int, *, shrink: bool = False, image_format: DiskFormat | None = None
) -> int:
    """Gives an image's disk another size; what it had before."""
    with disk_errors():
        disk = Disk(path, image_format=image_format)
        before = disk.size
        if size < before and not shrink:
            raise ConfigError(
                f"{path}: {size} bytes are less than its {before}; what lies beyond would be lost",
                mend="add --shrink, after the guest's file systems have been made smaller",
            )
        disk.resize(size)
        return before
