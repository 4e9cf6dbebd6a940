"""Network cards that are put into a machine that runs, by QMP."""

from __future__ import annotations

from typing import Any

from tetrarch.control.client import Client, ControlError
from tetrarch.errors import ConfigError
from tetrarch.net.mac import format_mac
from tetrarch.net.spec import NET_DRIVERS, NetSpec

__all__ = ["attach_net"]


def attach_net(client: Client, spec: NetSpec, name: str) -> None:
    """Puts a card into a slot, as the device ``name``; its guest is told.

    Raises ConfigError for what a card that comes later cannot be, ControlError for what the machine
    refuses: then nothing is left of it.
    """
    plain = NetSpec(
        spec.kind, spec.target, spec.forward, spec.bridge, model=spec.model, mac=spec.mac
    )
    if spec.kind == "vhost-user" or spec != plain or spec.filter is not None:
        raise ConfigError(
            "a card that comes later has forward=, bridge=, model= and mac= alone",
            mend="give the others to tetrarch run",
        )
    client.execute("netdev_add", {"id": name, **_network(spec)})
    device = {"driver": NET_DRIVERS[spec.model], "id": name, "netdev": name}
    if spec.mac is not None:
        device["mac"] = format_mac(spec.mac)
    try:
        client.execute("device_add", device)
    except ControlError:
        client.execute("netdev_del", {"id": name})
        raise


def _network(spec: NetSpec) -> dict[str, Any]:
    match spec.kind:
        case "tap":
            bridge = {} if spec.bridge is None else {"br": spec.bridge}
            return {"type": "tap", "ifname": spec.target, **bridge}
        case "socket":
            return {"type": "stream", "addr": {"type": "unix", "path": spec.target}}
    rules = [f"tcp:{one.host}:{one.port}-:{one.guest}" for one in spec.forward]
    return {"type": "user", "hostfwd": [{"str": rule} for rule in rules]}
