"""Disks that are put into a machine that runs, and taken out, by QMP."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tetrarch._native import disk_info
from tetrarch.block.disk import disk_errors
from tetrarch.block.spec import FORMATS, LATER_DRIVERS, DiskFormat, DiskSpec, later_device
from tetrarch.control.client import Client, ControlError
from tetrarch.errors import ConfigError, HostError

__all__ = ["attach_disk", "detach"]

_Layer = tuple[Path, str]
"""Path and format of a file of an image."""
#: As deep as chains may be (crates/block).
_LAYERS_MAX: Final = 64
# A guest that boots has seen the device and not yet that it is to be given up.
_ASK_AGAIN_S: Final = 2.0


def attach_disk(client: Client, spec: DiskSpec, name: str) -> None:
    """Puts a disk into a slot, as the device ``name``; its guest is told.

    Raises ConfigError for what a disk that comes later cannot be, HostError for an image that
    the machine may not open, ControlError for what else it refuses: then nothing is left of it.
    """
    if spec.bus not in LATER_DRIVERS:
        raise ConfigError(
            f"a disk at {spec.bus} cannot be put into a machine that runs",
            mend="take bus=virtio, bus=nvme or bus=pvscsi",
        )
    plain = DiskSpec(spec.path, spec.format, spec.bus, readonly=spec.readonly, cache=spec.cache)
    if spec != plain:
        raise ConfigError(
            "a disk that comes later has format, bus, readonly and cache alone",
            mend="give the others to tetrarch run",
        )
    layers = _layers(spec)
    try:
        _add_by_path(client, spec, layers, name)
    except ControlError as error:
        if "permission denied" not in str(error).lower():
            raise
        # A confined machine opens no path, and takes what is open.
        if not _can_be_handed(spec, layers):
            raise HostError(
                f"the machine may not open {spec.path}, and takes no descriptor of a vmdk image or"
                " with cache=none",
                mend=f"start it with --allow {spec.path.absolute().parent}",
            ) from error
        _add_by_descriptor(client, spec, layers, name)
    device = {"driver": LATER_DRIVERS[spec.bus], "id": name, **later_device(spec.bus, name)}
    try:
        client.execute("device_add", device)
    except ControlError:
        client.execute("blockdev-del", {"node-name": name})
        raise


def _layers(spec: DiskSpec) -> list[_Layer]:
    """The image and its backing files, from the top down. The machine's process may have another
    directory: their paths are absolute."""
    layers: list[_Layer] = []
    path, kind = spec.path.absolute(), spec.format
    while len(layers) < _LAYERS_MAX:
        with disk_errors():
            about = disk_info(path, kind)
        layers.append((path, about["format"]))
        if (below := about.get("backing_path")) is None:
            break
        path, kind = Path(below), _format(about.get("backing_format"))
    return layers


def _format(name: str | None) -> DiskFormat | None:
    return next((known for known in FORMATS if known == name), None)


def _can_be_handed(spec: DiskSpec, layers: Sequence[_Layer]) -> bool:
    return spec.cache == "writeback" and all(kind != "vmdk" for _, kind in layers)


def _add_by_path(client: Client, spec: DiskSpec, layers: Sequence[_Layer], name: str) -> None:
    path, kind = layers[0]
    node: dict[str, Any] = {"driver": kind, "node-name": name, "read-only": spec.readonly}
    node["file"] = {"driver": "file", "filename": str(path)}
    node["cache"] = {"direct": spec.cache == "none"}
    client.execute("blockdev-add", node)


def _add_by_descriptor(client: Client, spec: DiskSpec, layers: Sequence[_Layer], name: str) -> None:
    """Opens each file here, and hands it over. The machine has copies of its own then."""
    sets, nodes = [], []
    try:
        for index, (path, kind) in enumerate(layers):
            writes = index == 0 and not spec.readonly
            descriptor = _open(path, os.O_RDWR if writes else os.O_RDONLY)
            try:
                given = {"opaque": str(path)}
                added = client.execute("add-fd", given, descriptors=[descriptor])
            finally:
                os.close(descriptor)
            sets.append(added["fdset-id"])
            file = {"driver": "file", "filename": f"/dev/fdset/{sets[-1]}"}
            nodes.append({"driver": kind, "file": file})
        for above, below in pairwise(nodes):
            above["backing"] = below
        top = {**nodes[0], "node-name": name, "read-only": spec.readonly}
        client.execute("blockdev-add", top)
    finally:
        for number in sets:
            client.execute("remove-fd", {"fdset-id": number})


def _open(path: Path, flags: int) -> int:
    try:
        # A pipe is not waited for; what it is, is looked at there.
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"{path}: cannot open the image: {error.strerror}", mend="check path and permissions"
        ) from error


def _deleted(client: Client, name: str, timeout: float) -> bool:
    """Whether the device goes within so many seconds."""
    end = time.monotonic() + timeout
    try:
        while True:
            event = client.next_event("DEVICE_DELETED", timeout=max(0.0, end - time.monotonic()))
            if event["data"].get("device") == name:
                return True
    except TimeoutError:
        return False


def detach(client: Client, name: str, timeout: float) -> None:
    """Takes a device out when its guest has given it up, and lets go of its image or network.

    Raises HostError where the guest has not after ``timeout`` seconds; it may still do it.
    """
    end = time.monotonic() + timeout
    client.execute("device_del", {"id": name})
    while not _deleted(client, name, min(_ASK_AGAIN_S, max(0.0, end - time.monotonic()))):
        if time.monotonic() >= end:
            raise HostError(
                f"the guest has not given {name} up within {timeout:g} s",
                mend="end what uses it there; it is taken out as soon as the guest lets go",
            )
        with suppress(ControlError):  # it has gone just now
            client.execute("device_del", {"id": name})
    # What was behind it, where that has come later: else it went with its device.
    for command, key in (("blockdev-del", "node-name"), ("netdev_del", "id")):
        with suppress(ControlError):
            client.execute(command, {key: name})
