"""Disks of an appliance, made into images of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Final

from tetrarch._files import ScratchDirectory
from tetrarch._native import disk_info
from tetrarch.block import convert, create
from tetrarch.block.spec import DiskFormat
from tetrarch.errors import ConfigError
from tetrarch.foreign.ova import Package, Progress
from tetrarch.foreign.ovf import Medium, Ovf, import_ovf

__all__ = ["import_ova"]

#: Gives a title, the bytes of it and a verb, and takes how far it is.
Transfer = Callable[[str, int, str], AbstractContextManager[Progress]]

#: A sparse extent, which names no other files: a text that names some could name any of the host's.
_SPARSE: Final = b"KDMV"
#: An appliance may say its capacity in units of up to a GiB, cut off.
_ROUNDING: Final = 1 << 30


def import_ova(path: Path, directory: Path, image_format: DiskFormat, transfer: Transfer) -> Ovf:
    """Reads an appliance and makes its disks in ``directory``, or none of them.

    Raises ConfigError and ImageError.
    """
    with Package.open(path) as package:
        found = import_ovf(package.text(), directory, image_format)
        package.check_names(found.files)
        if package.is_signed:
            found.carried.lose("the signature", "nobody looks at it; the checksums are compared")
        for medium in found.media:
            _check(package, medium)
        made: list[Path] = []
        try:
            for medium in found.media:
                _make(package, medium, image_format, transfer)
                made.append(medium.path)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise
    return found


def _check(package: Package, medium: Medium) -> None:
    if medium.path.exists() or medium.path.is_symlink():
        raise ConfigError(
            f"{medium.path} is there already", mend="remove it, or name another --disks directory"
        )
    is_disk = medium.kind == "disk" and medium.href
    if is_disk and not package.begin(medium.href).startswith(_SPARSE):
        raise ConfigError(
            f"{medium.href} is no disk that an appliance can have here",
            mend="make it streamOptimized: tetrarch disk convert --subformat streamOptimized",
        )


def _make(package: Package, medium: Medium, image_format: DiskFormat, transfer: Transfer) -> None:
    if not medium.href:
        create(medium.path, medium.capacity, image_format=image_format)
        return
    with ScratchDirectory(prefix=".tetrarch-", dir=medium.path.parent) as folder:
        packed = Path(folder, "file")
        with packed.open("xb") as file:
            _extract(package, medium.href, file, transfer)
        if medium.kind == "disc":
            packed.rename(medium.path)
            return
        _check_size(packed, medium)
        title = medium.path.name
        with transfer(title, medium.capacity or package.size(medium.href), "Writing") as progress:
            convert(
                packed,
                medium.path,
                image_format=image_format,
                source_format="vmdk",
                progress=progress,
            )


def _check_size(disk: Path, medium: Medium) -> None:
    """The user is told the appliance's capacity, and a small file can be a large disk."""
    size = disk_info(disk, "vmdk")["size"]
    if medium.capacity and size > medium.capacity + _ROUNDING:
        raise ConfigError(
            f"{medium.href} is a disk of {size} bytes, and the appliance says {medium.capacity}",
            mend="get the appliance again, or correct the capacity in its description",
        )


def _extract(package: Package, name: str, file: BinaryIO, transfer: Transfer) -> None:
    with transfer(name, package.size(name), "Unpacking") as progress:
        package.extract(name, file, progress)
