"""The network cards that a machine's configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tetrarch.machine.config import MachineConfig
from tetrarch.machine.log import MachineLog
from tetrarch.net.mac import random_mac, stable_mac
from tetrarch.virtio.net import NetKind
from tetrarch.virtio.vhost_user import VhostUserNet

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.cards import NetworkCard
    from tetrarch.net.network import OpenNetwork
    from tetrarch.net.spec import NetModel

__all__ = ["MachineNet", "machine_nets"]

#: A card, and what is behind it.
MachineNet: TypeAlias = "NetKind | VhostUserNet | NetworkCard"


def machine_nets(
    vm: Vm, config: MachineConfig, end: Callable[[BaseException], None]
) -> Iterator[MachineNet]:
    """Opens them one by one; ``end`` is called with what a filter raises."""
    if config.net:
        from tetrarch.net.network import open_network
    log = MachineLog(config.name)
    # Machines of one network that nobody named are not to have the same addresses.
    named = "name" in config.model_fields_set
    for index, spec in enumerate(config.net):
        name = f"net{index}"

        def cut_off(cause: str, name: str = name) -> None:
            log.warning("%s: %s; the link is down until the machine starts anew", name, cause)

        mac = spec.mac or (stable_mac(config.name, index) if named else random_mac())
        if spec.kind == "vhost-user":
            yield VhostUserNet(vm, Path(spec.target), name, mac, spec.mtu)
            continue
        network = open_network(spec, cut_off, end)
        yield _open_card(vm, spec.model, network, name, mac)


def _open_card(
    vm: Vm, model: NetModel, network: OpenNetwork, name: str, mac: bytes
) -> NetKind | NetworkCard:
    """A card that has the network, which is closed where there is none."""
    try:
        if model == "virtio":
            return NetKind(vm, network, name, mac)
        from tetrarch.cards import make_card

        return make_card(model, vm, network, name, mac)
    except BaseException:
        network.close()
        raise
