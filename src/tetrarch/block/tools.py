"""What is done with images beside running them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

from tetrarch._native import Disk, DiskSource, disk_check, disk_create, disk_info
from tetrarch.block.disk import disk_errors
from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from tetrarch._native import CheckReport, DiskInfo

__all__ = [
    "SUBFORMATS",
    "Subformat",
    "check",
    "convert",
    "create",
    "format_by_name",
    "info",
    "resize",
]

ImagePath: TypeAlias = str | os.PathLike[str]

_SECTOR = 512


#: What names of images say that are not made here.
_NOT_MADE = (".qcow", ".qed", ".vdi", ".vhd", ".vhdx")
_MADE: Final[dict[str, DiskFormat]] = {".qcow2": "qcow2", ".vmdk": "vmdk"}

Subformat = Literal["monolithicSparse", "streamOptimized"]
SUBFORMATS: Final[tuple[Subformat, ...]] = get_args(Subformat)


def format_by_name(path: ImagePath) -> DiskFormat:
    """What a new image is by its name: qcow2, vmdk or raw. Raises ConfigError for other formats."""
    suffix = Path(path).suffix.lower()
    if suffix in _NOT_MADE:
        raise ConfigError(
            f"{path}: {suffix[1:]} images are not written",
            mend="name it *.qcow2 or *.img, or say what it is to be: --format raw|qcow2|vmdk",
        )
    return _MADE.get(suffix, "raw")


def _check_size(path: ImagePath, size: int) -> None:
    if not 0 < size < 1 << 63 or size % _SECTOR:
        raise ConfigError(
            f"{path}: a disk of {size} bytes", mend="give a multiple of 512, from 512 to 2^63"
        )


def create(
    path: ImagePath,
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
    if size is not None:
        _check_size(path, size)
    if cluster_size is not None and kind != "qcow2":
        raise ConfigError(f"{path}: a {kind} image has no clusters", mend="leave their size out")
    if backing_format is not None and backing is None:
        raise ConfigError(f"{path}: its backing file has no name", mend="give it, or no format")
    with disk_errors():
        return disk_create(path, kind, size, backing, backing_format, cluster_size)


def info(path: ImagePath, image_format: DiskFormat | None = None) -> DiskInfo:
    with disk_errors():
        return disk_info(path, image_format)


def check(path: ImagePath, *, repair: bool = False) -> CheckReport:
    """Compares the refcounts of a qcow2 image with what it refers to."""
    with disk_errors():
        return disk_check(path, repair)


def convert(
    source: ImagePath,
    target: ImagePath,
    *,
    image_format: DiskFormat | None = None,
    source_format: DiskFormat | None = None,
    subformat: Subformat | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copies a disk into a new image, with all of its backing files and without its zeroes.

    A VMDK image is monolithicSparse, which grows, or streamOptimized: packed, to be read alone.
    """
    with disk_errors():
        chosen = image_format or format_by_name(target)
        if subformat is not None and chosen != "vmdk":
            raise ConfigError(
                f"{target}: a {chosen} image has no {subformat}", mend="leave it out, or take vmdk"
            )
        opened = DiskSource(source, source_format)
        size = opened.size
        if size == 0:
            raise ImageError(f"{source}: is empty", mend="get the file again")
        opened.copy(
            target,
            chosen,
            lambda done: progress(done, size),
            stream=subformat == "streamOptimized",
        )


def resize(
    path: ImagePath, size: int, *, shrink: bool = False, image_format: DiskFormat | None = None
) -> int:
    """Gives an image's disk another size; what it had before."""
    with disk_errors():
        disk = Disk(path, image_format=image_format)
        before = disk.size
        _check_size(path, size)
        if size < before and not shrink:
            raise ConfigError(
                f"{path}: {size} bytes are less than its {before}; what lies beyond would be lost",
                mend="add --shrink, after the guest's file systems have been made smaller",
            )
        disk.resize(size)
        return before
