"""Disks and network cards that are put into a machine after it was made."""

from __future__ import annotations

import secrets
from typing import Any

from tetrarch.block.spec import LATER_DRIVERS, DiskSpec, later_device
from tetrarch.errors import ConfigError, MachineStateError
from tetrarch.machine.blocks import BlockNodes
from tetrarch.machine.hotplug import HotPlug
from tetrarch.machine.netdevs import Netdevs
from tetrarch.machine.pc import Pc
from tetrarch.net.spec import NET_DRIVERS, NetSpec

__all__ = ["add_disk", "add_net"]


def add_disk(pc: Pc, spec: DiskSpec, name: str | None, *, announce: bool) -> str:
    """Gives the device's name. Raises ConfigError for what a disk that comes later cannot be,
    ImageError where the image cannot be used: then nothing is left of it."""
    if spec.bus not in LATER_DRIVERS or spec.vhost_user:
        raise ConfigError(
            "a disk that comes later is a file, at virtio, nvme or pvscsi",
            mend="take bus=virtio, bus=nvme or bus=pvscsi",
        )
    name = name or f"disk-{secrets.token_hex(4)}"
    hotplug, blocks = _places(pc), pc.blocks
    blocks.open(name, spec)
    try:
        driver, properties = LATER_DRIVERS[spec.bus], later_device(spec.bus, name)
        hotplug.add(driver, properties, name, announce=announce)
    except BaseException:
        _drop(blocks, name)
        raise
    return name


def add_net(pc: Pc, spec: NetSpec, name: str | None, *, announce: bool) -> str:
    """Gives the device's name. Raises HostError where the host does not give the network."""
    if spec.kind == "vhost-user":
        raise ConfigError("a card of vhost-user cannot come later", mend="give it to the machine")
    name = name or f"net-{secrets.token_hex(4)}"
    properties: dict[str, Any] = {"netdev": name}
    if spec.mac is not None:
        properties["mac"] = spec.mac.hex(":")
    hotplug, netdevs = _places(pc), pc.netdevs
    netdevs.add(name, spec, kept=False)
    try:
        hotplug.add(NET_DRIVERS[spec.model], properties, name, announce=announce)
    except BaseException:
        _drop(netdevs, name)
        raise
    return name


def _places(pc: Pc) -> HotPlug:
    if pc.hotplug is None:
        raise MachineStateError("a stand-in for the engine has no devices", mend="take an engine")
    return pc.hotplug


def _drop(things: BlockNodes | Netdevs, name: str) -> None:
    """Unless it went with its device."""
    if any(thing.name == name for thing in things.all()):
        things.remove(name)
