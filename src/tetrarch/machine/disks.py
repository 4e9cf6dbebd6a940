"""The disks of a machine, each at the controller that its user names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Protocol

from tetrarch.errors import ConfigError
from tetrarch.machine.blocks import BlockNode, BlockNodes
from tetrarch.machine.config import MachineConfig
from tetrarch.storage.drives import AtaDrive, ScsiDrive
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.vhost_user import VhostUserBlk

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.storage import (
        AhciController,
        IdeController,
        NvmeController,
        PvscsiController,
    )

__all__ = ["MachineDisk", "check_images", "machine_disks"]

#: Queues of a disk beyond which more of them gain nothing: they have one I/O thread.
_QUEUES_MAX = 4


class MachineDisk(Protocol):
    """A disk at its controller, or a controller with its disks."""

    def retry(self) -> None:
        """The machine goes on after a hold."""

    def close(self) -> None:
        """Lets go of the images."""


def check_images(config: MachineConfig) -> None:
    """Raises ConfigError where two disks would write to one image: each is refused by the lock of
    the other, which does not tell whose it is."""
    images = [disk for disk in config.disk if not disk.vhost_user]
    images += [cd.disk for cd in config.cdrom]
    images += [floppy.disk for floppy in config.floppy]
    for one, other in combinations(images, 2):
        writes = any(not (disk.readonly or disk.snapshot) for disk in (one, other))
        same = False
        with suppress(OSError, ValueError):  # one that is not there is refused when it is opened
            same = writes and os.path.samefile(one.path, other.path)
        if same:
            raise ConfigError(
                f"{other.path}: two disks of the machine have this image",
                mend="give one of them a copy, or both readonly",
            )


def machine_disks(
    vm: Vm, config: MachineConfig, blocks: BlockNodes
) -> Iterator[
    BlkKind | VhostUserBlk | NvmeController | PvscsiController | AhciController | IdeController
]:
    """What the machine's disks are, in their order; then the controllers that have several."""
    check_images(config)
    queues = min(config.cpus.count, _QUEUES_MAX)
    ahci: list[AtaDrive] = []
    ide: list[AtaDrive] = []
    scsi: list[tuple[BlockNode, ScsiDrive]] = []
    for index, spec in enumerate(config.disk):
        name = f"disk{index}"
        if spec.vhost_user:
            yield VhostUserBlk(vm, spec.path, name, queues)
            continue
        node = blocks.open(name, spec)
        disk = node.disk.share()
        match spec.bus:
            case "virtio":
                kind = BlkKind(vm, disk, name, queues)
                node.device, node.tell_size = name, kind.data_path.config_changed
                yield kind
            case "nvme":
                from tetrarch.storage.nvme import NvmeController

                controller = NvmeController(vm, disk, name=name, queues=queues)
                node.device, node.tell_size = name, controller.queues.resized
                yield controller
            case "ahci":
                node.device = "ahci"
                ahci.append(AtaDrive(name, disk))
            case "pvscsi":
                scsi.append((node, ScsiDrive(name, disk)))
            case "ide":
                node.device = "ide"
                ide.append(AtaDrive(name, disk))
    for index, cd in enumerate(config.cdrom):
        name = f"cdrom{index}"
        node = blocks.open(name, cd.disk, removable=True)
        node.device = cd.bus
        disk = node.disk.share()
        match cd.bus:
            case "ahci":
                ahci.append(AtaDrive(name, disk, cd=True))
            case "ide":
                ide.append(AtaDrive(name, disk, cd=True))
            case "pvscsi":
                scsi.append((node, ScsiDrive(name, disk, cd=True)))
    yield from _pvscsi(vm, scsi)
    if ahci:
        from tetrarch.storage.ahci import AhciController

        yield AhciController(vm, ahci)
    if ide:
        from tetrarch.storage.ide import IdeController

        yield IdeController(vm, ide)


def _pvscsi(vm: Vm, drives: Sequence[tuple[BlockNode, ScsiDrive]]) -> Iterator[PvscsiController]:
    """As many controllers as the drives need: ``pvscsi``, ``pvscsi1`` and on."""
    if not drives:
        return
    from tetrarch.storage.pvscsi import PvscsiController

    for first in range(0, len(drives), PvscsiController.TARGETS):
        some = drives[first : first + PvscsiController.TARGETS]
        number = first // PvscsiController.TARGETS
        name = f"pvscsi{number or ''}"
        controller = PvscsiController(vm, [drive for _, drive in some], name=name)
        for target, (node, drive) in enumerate(some):
            node.device = name
            if not drive.cd:
                node.tell_size = partial(controller.rings.resized, target)
        yield controller
