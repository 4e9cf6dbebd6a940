"""Disks that are put into a machine that runs, and taken out, by QMP."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

from tetrarch._native import disk_info
from tetrarch.block.disk import disk_errors
from tetrarch.block.spec import DiskSpec
from tetrarch.control.client import Client, ControlError
from tetrarch.errors import ConfigError, HostError

__all__ = ["attach_disk", "detach"]

_DRIVERS: Final = {"virtio": "virtio-blk-pci", "nvme": "nvme"}
_SERIAL_MAX: Final = 20
# A guest that boots has seen the device and not yet that it is to be given up.
_ASK_AGAIN_S: Final = 2.0


def attach_disk(client: Client, spec: DiskSpec, name: str) -> None:
    """Puts a disk into a slot, as the device ``name``; its guest is told.

    Raises ConfigError for what a disk that comes later cannot be, HostError for an image that
    the machine may not open, ControlError for what else it refuses: then nothing is left of it.
    """
    if spec.bus not in _DRIVERS:
        raise ConfigError(
            f"a disk at {spec.bus} cannot be put into a machine that runs",
            mend="take bus=virtio or bus=nvme",
        )
    plain = DiskSpec(spec.path, spec.format, spec.bus, readonly=spec.readonly, cache=spec.cache)
    if spec != plain:
        raise ConfigError(
            "a disk that comes later has format, bus, readonly and cache alone",
            mend="give the others to tetrarch run",
        )
    with disk_errors():
        kind = disk_info(spec.path, spec.format)["format"]
    # The machine's process may have another directory.
    file = {"driver": "file", "filename": str(spec.path.absolute())}
    node: dict[str, Any] = {"driver": kind, "node-name": name, "file": file}
    node |= {"read-only": spec.readonly, "cache": {"direct": spec.cache == "none"}}
    try:
        client.execute("blockdev-add", node)
    except ControlError as error:
        if "permission denied" not in str(error).lower():
            raise
        raise HostError(
            f"the machine may not open {spec.path}",
            mend="a confined machine opens what it was started with: start it with --allow"
            f" {spec.path.absolute().parent}",
        ) from error
    device = {"driver": _DRIVERS[spec.bus], "id": name, "drive": name}
    if spec.bus == "nvme":
        device["serial"] = name[:_SERIAL_MAX]
    try:
        client.execute("device_add", device)
    except ControlError:
        client.execute("blockdev-del", {"node-name": name})
        raise


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
    """Takes a device out when its guest has given it up, and lets go of its image.

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
    with suppress(ControlError):  # it was no disk that came later: its image went with it
        client.execute("blockdev-del", {"node-name": name})
