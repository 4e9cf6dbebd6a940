"""The images that a machine has open, by name: at a device, or to be put at one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import disk_info
from tetrarch.block.disk import OnStop, disk_errors, open_disk
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ConfigError, ImageError, MachineStateError
from tetrarch.machine.events import Events

if TYPE_CHECKING:
    from tetrarch._native import Disk

__all__ = ["BlockNode", "BlockNodes"]


#: stat(2): st_blocks counts these.
_STAT_BLOCK: Final = 512


@dataclass
class BlockNode:
    """One image: QEMU calls it a node of the block graph."""

    name: str
    spec: DiskSpec
    disk: Disk
    """A handle of its own beside the controller's."""
    format: str
    layered: bool
    """It has a backing file."""
    kept: bool
    """It stays when its device goes."""
    removable: bool = False
    device: str | None = None
    """Which device has it."""
    tell_size: Callable[[], object] | None = None
    """Gives the driver word of another size; None: the device cannot."""

    @property
    def allocated(self) -> int:
        """What its file takes on the host, in bytes; 0 where it has no path any more."""
        try:
            return os.stat(self.spec.path).st_blocks * _STAT_BLOCK
        except OSError:
            return 0


class BlockNodes:
    """Locks: ``_opening``, held while an image is opened, so that of two of one name one is, and
    while none may go; then ``_lock``, for a change of the list or of who has an image."""

    def __init__(self, stop: OnStop, events: Events) -> None:
        """``stop`` is called with what the machine is to be held for."""
        self._stop = stop
        self._events = events
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._nodes: dict[str, BlockNode] = {}

    def open(
        self,
        name: str,
        spec: DiskSpec,
        *,
        kept: bool = False,
        removable: bool = False,
        files: Sequence[int] | None = None,
    ) -> BlockNode:
        """``files`` are descriptors of the image and its backing files, in place of their paths.

        Raises ImageError where the image cannot be used, ConfigError for a name in use.
        """
        with self._opening:
            if name in self._nodes:
                raise ConfigError(f"Duplicate nodes with node-name='{name}'")
            return self._open(name, spec, kept, removable, files)

    def _open(
        self,
        name: str,
        spec: DiskSpec,
        kept: bool,
        removable: bool,
        files: Sequence[int] | None,
    ) -> BlockNode:
        def stopped(cause: str, waits: Callable[[], bool]) -> None:
            self._tell_error(name, "write", "stop", True, cause)
            self._stop(f"{name} ({spec.path}): {cause}", waits)

        def failed(operation: str, full: bool, cause: str) -> None:
            # QEMU's event knows reads and writes.
            kind = "read" if operation == "read" else "write"
            self._tell_error(name, kind, "report", full, cause)

        kind, layered = _about(spec, files)
        disk = open_disk(spec, stopped, failed, files)
        if disk.size == 0:
            disk.close()
            raise ImageError(
                f"{spec.path}: is empty", mend="get the file again, or: tetrarch disk resize"
            )
        node = BlockNode(name, spec, disk, kind, layered, kept, removable)
        with self._lock:
            self._nodes[name] = node
        return node

    def _tell_error(self, name: str, operation: str, action: str, full: bool, why: str) -> None:
        node = self._nodes.get(name)
        device = node.device if node is not None else None
        self._events.tell(
            "block-io-error",
            device=device or "",
            **{"node-name": name},
            operation=operation,
            action=action,
            nospace=full,
            reason=why,
        )

    def all(self) -> list[BlockNode]:
        with self._lock:
            return list(self._nodes.values())

    def get(self, name: str) -> BlockNode | None:
        return self._nodes.get(name)

    def take(self, name: str, device: str) -> BlockNode | None:
        """For a device, until it is ``released``; None where there is no such image. Raises
        ConfigError where another has it."""
        with self._lock:
            node = self._nodes.get(name)
            if node is not None:
                if node.device is not None:
                    raise ConfigError(f"Drive '{name}' is already in use by {node.device}")
                node.device = device
            return node

    @contextmanager
    def steady(self) -> Iterator[None]:
        """No image comes or goes meanwhile."""
        with self._opening:
            yield

    def remove(self, name: str) -> None:
        """Closes an image that no device has. Raises MachineStateError."""
        with self._opening, self._lock:
            node = self._nodes.get(name)
            if node is None:
                raise MachineStateError(f"Failed to find node with node-name='{name}'")
            if node.device is not None:
                raise MachineStateError(f"Node {name} is in use", mend=f"remove {node.device}")
            del self._nodes[name]
        node.disk.close()

    def resize(self, node: BlockNode, size: int) -> None:
        """Also the driver hears of it. Raises ImageError, or MachineStateError where it cannot."""
        if node.device is not None and node.tell_size is None:
            raise MachineStateError(
                f"the device {node.device} has a disk of one size",
                mend="use virtio, nvme or pvscsi",
            )
        with disk_errors():
            node.disk.resize(size)
        if node.tell_size is not None:
            node.tell_size()

    def released(self, device: str) -> None:
        """The device is out."""
        for node in self.all():
            if node.device == device:
                node.device = node.tell_size = None
                if not node.kept:
                    self.remove(node.name)

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        for node in self.all():
            node.disk.retry()

    def close(self) -> None:
        for node in self.all():
            node.disk.close()


def _about(spec: DiskSpec, files: Sequence[int] | None) -> tuple[str, bool]:
    """An image's format, and whether it has a backing file."""
    if files is not None:
        return spec.format or "raw", len(files) > 1
    with disk_errors():
        about = disk_info(spec.path, spec.format)
    return about["format"], about.get("backing") is not None
