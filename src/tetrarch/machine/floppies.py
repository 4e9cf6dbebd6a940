"""The floppy drives of a machine, with their controller and its DMA."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tetrarch.devices.dma8237 import Dma8237
from tetrarch.devices.fdc82077 import FORMATS, GSI, Fdc82077, FloppyDrive, FloppyFormat
from tetrarch.errors import ImageError

if TYPE_CHECKING:
    from tetrarch._native import DiskBytes, Vm
    from tetrarch.block.spec import FloppySpec
    from tetrarch.machine.blocks import BlockNodes

__all__ = ["MachineFloppies", "check_floppy", "drive_types"]


def check_floppy(spec: FloppySpec, size: int | None = None) -> FloppyFormat:
    """How its sectors lie, by the image's size in bytes. Raises ImageError for what is no disk."""
    try:
        info = spec.path.stat()
    except OSError as error:
        raise _no_image(spec, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        is_directory = stat.S_ISDIR(info.st_mode)
        raise _no_image(spec, f"is {'a directory' if is_directory else 'no regular file'}")
    size = info.st_size if size is None else size
    if size not in FORMATS:
        sizes = ", ".join(f"{known >> 10}" for known in sorted(FORMATS))
        raise ImageError(
            f"{spec.path}: has {size} bytes, which no floppy disk has",
            mend=f"give an image of {sizes} KiB",
        )
    return FORMATS[size]


def _no_image(spec: FloppySpec, cause: str) -> ImageError:
    return ImageError(f"{spec.path}: {cause}", mend="name an image of a floppy disk")


def drive_types(specs: Sequence[FloppySpec]) -> list[int]:
    """As the CMOS memory has them."""
    return [check_floppy(spec).drive for spec in specs]


class MachineFloppies:
    def __init__(self, vm: Vm, specs: Sequence[FloppySpec], blocks: BlockNodes) -> None:
        """Raises ImageError where an image cannot be used."""
        self._images: list[DiskBytes] = []
        drives = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for index, spec in enumerate(specs):
                node = blocks.open(f"floppy{index}", spec.disk, removable=True)
                node.device = "fdc"
                form = check_floppy(spec, node.disk.size)
                image = node.disk.access()
                self._images.append(image)
                drives.append(FloppyDrive(image, form, spec.readonly))
            undo.pop_all()
        self.dma = Dma8237(vm)
        self.controller = Fdc82077(vm.irq_source(GSI).set, drives, self.dma)

    def retry(self) -> None:
        """What the host failed has failed."""

    def close(self) -> None:
        """Lets go of the images."""
        for image in self._images:
            image.close()
