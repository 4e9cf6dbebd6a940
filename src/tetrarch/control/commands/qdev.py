"""Devices and networks that come and go (QEMU, qapi/qdev.json and qapi/net.json)."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tetrarch.control.command import command
from tetrarch.control.commands.machine import CPU_DRIVER
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.hotplug import HotPlug
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.machine import Machine
from tetrarch.net.spec import Forward, NetSpec

__all__ = ["Rule", "SocketAddress", "device_add", "device_del", "netdev_add", "netdev_del"]

#: tcp:[HOST]:PORT-[GUEST]:PORT.
_FORWARD = re.compile(r"(?:tcp)?:([^:]*):([0-9]{1,5})-[^:]*:([0-9]{1,5})")


class Rule(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    str: str


class SocketAddress(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["unix"]
    path: str


@command("device_add", open_end="properties")
def device_add(
    monitor: Monitor,
    driver: str,
    properties: dict[str, Any],
    id_: str | None = None,
    bus: str | None = None,
) -> None:
    """Plugs a device in, or a CPU, and tells the guest."""
    if driver == CPU_DRIVER:
        _plug_cpu(monitor.machine, id_, properties)
        return
    if bus not in (None, "pci.0", "pcie.0"):
        raise QmpError(f"Bus '{bus}' not found")
    announce = monitor.machine.phase is not Phase.MADE
    _hotplug(monitor).add(driver, properties, id_, announce=announce)


@command("device_del")
def device_del(monitor: Monitor, id_: str) -> None:
    """Asks the guest to give it up; that it is out is the event DEVICE_DELETED."""
    pc, name = monitor.machine.pc, id_.removeprefix("/machine/peripheral/")
    try:
        if name in pc.vcpus.names.values():
            pc.vcpus.request_unplug(name)
        else:
            pc.plugged.request_unplug(name)
    except LookupError as error:
        raise QmpError(str(error), "DeviceNotFound") from None


def _plug_cpu(machine: Machine, name: str | None, properties: dict[str, Any]) -> None:
    """``properties``: where it lies, as query-hotpluggable-cpus tells; all of that, or nothing."""
    given = dict(properties)
    place = tuple(given.pop(f"{level}-id", None) for level in ("socket", "core", "thread"))
    for left in given:
        raise QmpError(f"Property '{CPU_DRIVER}.{left}' not found")
    number = None
    if place != (None, None, None):
        cpus = machine.config.cpus
        found = [number for number in range(cpus.max) if cpus.place(number) == place]
        if not found:
            raise QmpError("there is no such CPU; query-hotpluggable-cpus lists them")
        number = found[0]
    if name is not None and name in machine.pc.plugged.slots.values():
        raise QmpError(f"Duplicate device ID '{name}'")
    machine.pc.vcpus.plug(number, name)


@command("netdev_add")
def netdev_add(
    monitor: Monitor,
    type_: Literal["user", "tap", "stream"],
    id_: str,
    hostfwd: list[Rule] | None = None,
    ifname: str | None = None,
    br: str | None = None,
    script: str | None = None,
    downscript: str | None = None,
    addr: SocketAddress | None = None,
) -> None:
    """Opens a network for a card: of passt, of a tap device, or of the machines at a socket."""
    given = {"hostfwd": hostfwd, "ifname": ifname, "br": br, "addr": addr}
    taken = {"user": {"hostfwd"}, "tap": {"ifname", "br"}, "stream": {"addr"}}[type_]
    for name, value in given.items():
        if value is not None and name not in taken:
            raise QmpError(f"Parameter '{name}' is unexpected")
    # Ours runs none: only their absence can be asked for.
    for name, value in (("script", script), ("downscript", downscript)):
        if value not in (None, "no", ""):
            raise QmpError(f"Parameter '{name}' can only be 'no'")
    match type_:
        case "user":
            spec = NetSpec("user", forward=tuple(_forward(rule.str) for rule in hostfwd or ()))
        case "tap":
            if ifname is None:
                raise QmpError("Parameter 'ifname' is missing")
            spec = NetSpec("tap", ifname, bridge=br)
        case "stream":
            if addr is None:
                raise QmpError("Parameter 'addr' is missing")
            spec = NetSpec("socket", addr.path)
    _hotplug(monitor)
    monitor.machine.pc.netdevs.add(id_, spec)


@command("netdev_del")
def netdev_del(monitor: Monitor, id_: str) -> None:
    try:
        monitor.machine.pc.netdevs.remove(id_)
    except LookupError as error:
        raise QmpError(str(error), "DeviceNotFound") from None


def _hotplug(monitor: Monitor) -> HotPlug:
    if monitor.machine.config.replay is not None:
        raise QmpError("the machine replays: nothing that devices do comes to its guest")
    hotplug = monitor.machine.pc.hotplug
    if hotplug is None:
        raise QmpError("this machine has a stand-in for an engine, and no devices")
    return hotplug


def _forward(rule: str) -> Forward:
    match = _FORWARD.fullmatch(rule)
    if match is None:
        raise QmpError(f"Invalid host forwarding rule '{rule}'")
    host, port, guest = match.groups()
    # Which numbers can be ports is said there.
    return NetSpec.parse(f"user,forward={host or '127.0.0.1'}:{port}:{guest}").forward[0]
