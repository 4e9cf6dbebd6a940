"""Devices of the machine's own kinds that come and go while it runs.

A device is named as QEMU's ``-device`` names it. What is behind it, an image or a network, was
opened before and has a name too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.blocks import BlockNode, BlockNodes
from tetrarch.machine.netdevs import Netdevs
from tetrarch.machine.plugged import PciDevice, PluggedDevices
from tetrarch.net.mac import parse_mac, random_mac
from tetrarch.net.spec import NET_DRIVERS
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.net import NetKind
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.rng import RngKind

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.cards import NetworkCard
    from tetrarch.net.network import OpenNetwork

__all__ = ["Added", "HotPlug"]

Properties = dict[str, Any]
_ALIASES = {"virtio-blk": "virtio-blk-pci", "virtio-net": "virtio-net-pci"}


class _Closing(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True)
class Added:
    """A device as it was added."""

    driver: str
    behind: str
    """The name of its image or network, where it has one."""
    properties: Mapping[str, Any]


class HotPlug:
    """Lock: ``_adding``, held while a device is put in: of two of one name one comes in."""

    def __init__(
        self, vm: Vm, plugged: PluggedDevices, blocks: BlockNodes, netdevs: Netdevs
    ) -> None:
        self._vm = vm
        self._plugged = plugged
        self._blocks = blocks
        self._netdevs = netdevs
        self._adding = threading.Lock()
        self._closing: dict[str, _Closing] = {}
        self.added: dict[str, Added] = {}
        """Those that are in, by name."""
        self._count = 0
        self._drivers: Mapping[str, Callable[[str, Properties], PciDevice]] = {
            "virtio-blk-pci": self._virtio_blk,
            "nvme": self._nvme,
            "pvscsi": self._pvscsi,
            "virtio-net-pci": self._virtio_net,
            "vmxnet3": partial(self._card, "vmxnet3"),
            "e1000": partial(self._card, "e1000"),
            "virtio-rng-pci": self._virtio_rng,
        }

    @contextmanager
    def steady(self) -> Iterator[None]:
        """No device comes meanwhile, and no image comes or goes. Of a machine that is held: then
        its guest gives none up."""
        with self._adding, self._blocks.steady():
            yield

    def add(
        self, driver: str, properties: Mapping[str, Any], name: str | None, *, announce: bool
    ) -> None:
        """Plugs one in. Raises ConfigError for what there is not; ``addr`` is its slot."""
        driver = _ALIASES.get(driver, driver)
        if driver not in self._drivers:
            known = ", ".join(self._drivers)
            raise ConfigError(
                f"'{driver}' is not a valid device model name", mend=f"there are {known}"
            )
        with self._adding:
            self._add(driver, properties, name, announce)

    def _add(
        self, driver: str, properties: Mapping[str, Any], name: str | None, announce: bool
    ) -> None:
        if name is None:
            self._count += 1
            name = f"{driver}.{self._count}"
        if _has_surrogates(name):
            raise ConfigError("Parameter 'id' expects text", mend="name it in Unicode")
        if self._plugged.has(name):
            raise ConfigError(f"Duplicate device ID '{name}'")
        given = dict(properties)
        slot = _slot(given.pop("addr", None))
        try:
            device = self._drivers[driver](name, given)
            for left in given:
                raise ConfigError(f"Property '{driver}.{left}' not found")
            self._plugged.plug(name, device, slot, announce=announce)
        except BaseException:
            if (closing := self._closing.pop(name, None)) is not None:
                closing.close()
            self.released(name)
            raise
        own = {key: properties[key] for key in ("serial", "mac") if key in properties}
        behind = properties.get("drive", properties.get("netdev", ""))
        self.added[name] = Added(driver, behind, own)

    def released(self, name: str) -> None:
        """The device is out."""
        self._closing.pop(name, None)
        self.added.pop(name, None)
        self._blocks.released(name)
        self._netdevs.released(name)

    @property
    def nets(self) -> list[NetKind | NetworkCard]:
        """The network cards that are in."""
        added = {name for name, one in self.added.items() if one.driver in NET_DRIVERS.values()}
        cards = (kind for name, kind in self._closing.items() if name in added)
        return cast("list[NetKind | NetworkCard]", list(cards))

    def close(self) -> None:
        """The machine has ended."""
        for kind in self._closing.values():
            kind.close()

    def _virtio_blk(self, name: str, given: Properties) -> PciDevice:
        node = self._node("virtio-blk-device", name, given)
        kind = BlkKind(self._vm, node.disk.share(), name, 1)
        node.tell_size = kind.data_path.config_changed
        self._closing[name] = kind
        return VirtioPci(self._vm, kind)

    def _nvme(self, name: str, given: Properties) -> PciDevice:
        serial = _serial("nvme", given)
        node = self._node("nvme", name, given)
        from tetrarch.storage.nvme import NvmeController

        controller = NvmeController(self._vm, node.disk.share(), name=name, serial=serial)
        node.tell_size = controller.queues.resized
        self._closing[name] = controller
        return controller

    def _pvscsi(self, name: str, given: Properties) -> PciDevice:
        """A controller of its own, with one disk."""
        serial = _serial("pvscsi", given)
        node = self._node("pvscsi", name, given)
        from tetrarch.storage.drives import ScsiDrive
        from tetrarch.storage.pvscsi import PvscsiController

        drive = ScsiDrive(name, node.disk.share(), serial=serial)
        controller = PvscsiController(self._vm, [drive], name=name)
        node.tell_size = partial(controller.rings.resized, 0)
        self._closing[name] = controller
        return controller

    def _virtio_net(self, name: str, given: Properties) -> PciDevice:
        with self._network("virtio-net-pci", name, given) as (network, mac):
            kind = NetKind(self._vm, network, name, mac)
        self._closing[name] = kind
        return VirtioPci(self._vm, kind)

    def _card(self, model: str, name: str, given: Properties) -> PciDevice:
        from tetrarch.cards import make_card

        with self._network(model, name, given) as (network, mac):
            card = make_card(model, self._vm, network, name, mac)
        self._closing[name] = card
        return card

    @contextmanager
    def _network(
        self, driver: str, name: str, given: Properties
    ) -> Iterator[tuple[OpenNetwork, bytes]]:
        """What a card is made with: what is behind it, and its address."""
        netdev, text = given.pop("netdev", None), given.pop("mac", None)
        if not isinstance(netdev, str):
            raise ConfigError("netdev property not set")
        try:
            mac = random_mac() if text is None else parse_mac(str(text))
        except ValueProblem as problem:
            raise ConfigError(f"Property '{driver}.mac': {problem.cause}") from None
        network = self._netdevs.take(netdev, name, driver)
        try:
            yield network, mac
        except BaseException:
            network.close()
            raise

    def _virtio_rng(self, name: str, given: Properties) -> PciDevice:
        kind = RngKind(self._vm, name)
        self._closing[name] = _Nothing()
        return VirtioPci(self._vm, kind)

    def _node(self, driver: str, name: str, given: Properties) -> BlockNode:
        drive = given.pop("drive", None)
        if drive is None:
            raise ConfigError("drive property not set")
        node = self._blocks.take(drive, name) if isinstance(drive, str) else None
        if node is None:
            raise ConfigError(f"Property '{driver}.drive' can't find value '{drive}'")
        return node


def _serial(driver: str, given: Properties) -> str | None:
    serial = given.pop("serial", None)
    if serial is not None and not isinstance(serial, str):
        raise ConfigError(f"Property '{driver}.serial' expects text")
    return serial


def _has_surrogates(name: str) -> bool:
    """Halves of characters, as JSON may have them; no name outside of Python."""
    return any("\ud800" <= char <= "\udfff" for char in name)


class _Nothing:
    def close(self) -> None:
        pass


def _slot(address: object) -> int | None:
    """As QEMU's ``addr``: a slot, in hex as text."""
    if address is None:
        return None
    try:
        slot = int(str(address).removesuffix(".0"), 16) if isinstance(address, str) else address
    except ValueError:
        slot = None
    if type(slot) is not int or not 0 < slot < 32:
        raise ConfigError(f"Property 'addr' doesn't take value '{address}'")
    return slot
