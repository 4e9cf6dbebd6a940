"""What a saved machine had of its host: disks, networks, sockets, firmware.

The file tells what they were, for the user to read; none is opened because a file names it.
They are given anew, as many and in the same order; those of devices that were plugged in while
the machine ran come behind the others of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeGuard

from tetrarch.block.spec import LATER_DRIVERS, CdromSpec, DiskSpec
from tetrarch.errors import StateError, ValueProblem
from tetrarch.machine.config import MachineConfig
from tetrarch.net.spec import NET_DRIVERS, NetSpec

if TYPE_CHECKING:
    from tetrarch.machine.pc import Pc

__all__ = ["Later", "Outside"]

_KINDS: Final = {
    "disk": "disk",
    "cdrom": "CD-ROM drive",
    "floppy": "floppy drive",
    "net": "network",
    "virtio_console": "virtio console",
    "vsock": "vsock socket",
    "firmware": "firmware",
}
#: Drivers of devices that are plugged in later, and what each has of the host.
_BUSES: Final = {driver: bus for bus, driver in LATER_DRIVERS.items()}
_NETS: Final = tuple(NET_DRIVERS.values())
_NOTHING: Final = ("virtio-rng-pci",)


@dataclass(frozen=True)
class Later:
    """A device that was plugged in while the machine ran."""

    name: str
    driver: str
    behind: str
    """The name of its image or network; empty where it has neither."""
    properties: Mapping[str, Any]


@dataclass(frozen=True)
class Outside:
    options: Mapping[str, tuple[str, ...]]
    """As they are written down, by the option's name."""
    later: tuple[Later, ...]

    @classmethod
    def of(cls, config: MachineConfig, pc: Pc) -> Self:
        options: dict[str, list[str]] = {
            "disk": [str(disk) for disk in config.disk],
            "cdrom": [str(cd) for cd in config.cdrom],
            "floppy": [str(floppy) for floppy in config.floppy],
            "net": [str(net) for net in config.net],
            "virtio_console": [_text(port) for port in config.virtio_console],
            "vsock": [str(config.vsock)] if pc.vsock is not None else [],
            "firmware": [str(config.firmware)] if config.firmware is not None else [],
        }
        later = []
        for name, added in pc.hotplug.added.items() if pc.hotplug is not None else ():
            later.append(Later(name, added.driver, added.behind, added.properties))
            if added.driver in _BUSES and (node := pc.blocks.get(added.behind)) is not None:
                options["disk"].append(str(replace(node.spec, bus=_BUSES[added.driver])))
            elif added.driver in _NETS:
                specs = {netdev.name: netdev.spec for netdev in pc.netdevs.all()}
                options["net"].append(str(specs[added.behind]))
        return cls({name: tuple(texts) for name, texts in options.items()}, tuple(later))

    def to_json(self) -> dict[str, Any]:
        later = [
            {
                "name": one.name,
                "driver": one.driver,
                "behind": one.behind,
                "properties": dict(one.properties),
            }
            for one in self.later
        ]
        return {"options": {name: list(texts) for name, texts in self.options.items()}} | {
            "later": later
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises ValueError for what to_json() has not made."""
        if not isinstance(value, dict) or value.keys() != {"options", "later"}:
            raise ValueError(value)
        options, later = value["options"], value["later"]
        if not isinstance(options, dict) or options.keys() != _KINDS.keys():
            raise ValueError(options)
        if not all(_texts(texts) for texts in options.values()) or not isinstance(later, list):
            raise ValueError(options)
        made = cls(
            {name: tuple(texts) for name, texts in options.items()},
            tuple(_later(one) for one in later),
        )
        if any(made._cold(name) < 0 for name in ("disk", "net")):
            raise ValueError(later)
        return made

    def _cold(self, option: str) -> int:
        """How many of an option's were there from the start."""
        drivers: tuple[str, ...] = {"disk": tuple(_BUSES), "net": _NETS}.get(option, ())
        return len(self.options[option]) - sum(one.driver in drivers for one in self.later)

    def require(self, config: MachineConfig) -> None:
        """Raises StateError where ``config`` does not give what the machine had."""
        for option, what in _KINDS.items():
            had, given = self.options[option], getattr(config, option)
            if option == "vsock":  # one too many is not used
                given = had if given is not None else ()
            elif option == "firmware":
                given = (given,) if given is not None else ()
            if len(had) != len(given):
                many = f"{len(had)} {what}{'s' if len(had) != 1 else ''}"
                listed = f", {', '.join(had)}" if had else ""
                raise StateError(
                    f"the saved machine had {many}{listed}; {len(given)} given",
                    mend=f"give as many of {option.replace('_', '-')}, in that order, as they were"
                    if had
                    else f"leave {option.replace('_', '-')} out",
                )
        for kind, option in ((DiskSpec, "disk"), (CdromSpec, "cdrom")):
            for text, spec in zip(self.options[option], getattr(config, option), strict=True):
                bus = _bus(kind, text)
                if bus != spec.bus:
                    raise StateError(
                        f"the saved machine had {text} at {bus}, and is given {spec.path} at"
                        f" {spec.bus}",
                        mend=f"give it with bus={bus}",
                    )

        for text, net in zip(self.options["net"], config.net, strict=True):
            model = NetSpec.parse(text).model
            if model != net.model:
                raise StateError(
                    f"the saved machine had a {model} card with {text}, and is given a {net.model}"
                    " one",
                    mend=f"give it with model={model}",
                )

    def images(self, config: MachineConfig) -> dict[str, Path]:
        """Where the image of each node is."""
        cold = self._cold("disk")
        named = {f"disk{index}": disk for index, disk in enumerate(config.disk[:cold])}
        later = (one.behind for one in self.later if one.driver in _BUSES)
        named |= dict(zip(later, config.disk[cold:], strict=True))
        images = {name: disk.path for name, disk in named.items() if not disk.vhost_user}
        images |= {f"cdrom{index}": cd.path for index, cd in enumerate(config.cdrom)}
        return images | {f"floppy{index}": one.path for index, one in enumerate(config.floppy)}

    def from_the_start(self, config: MachineConfig) -> MachineConfig:
        """``config`` with what the machine was made with: without what devices have that were
        plugged in later, or a vsock that it had not."""
        changes = {name: getattr(config, name)[: self._cold(name)] for name in ("disk", "net")}
        if not self.options["vsock"]:
            changes["vsock"] = None
        return config.model_copy(update=changes)

    def plug_later(self, pc: Pc, config: MachineConfig) -> None:
        """Makes the devices anew that were plugged in later, with the rest of ``config``."""
        if pc.hotplug is None:
            return  # a stand-in for the engine had none
        disks = iter(config.disk[self._cold("disk") :])
        nets = iter(config.net[self._cold("net") :])
        for one in self.later:
            properties = dict(one.properties)
            if one.driver in _BUSES:
                pc.blocks.open(one.behind, next(disks), kept=True)
                properties["drive"] = one.behind
            elif one.driver in _NETS:
                pc.netdevs.add(one.behind, next(nets))
                properties["netdev"] = one.behind
            pc.hotplug.add(one.driver, properties, one.name, announce=False)


def _text(port: Any) -> str:
    """A port whose other end is an object in Python has no text."""
    text = str(port.console)
    return text if not text.startswith("<") else type(port.console).__name__


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _later(value: object) -> Later:
    if not isinstance(value, dict) or value.keys() != {"name", "driver", "behind", "properties"}:
        raise ValueError(value)
    one = Later(**value)
    texts = isinstance(one.name, str) and isinstance(one.behind, str)
    if not texts or not isinstance(one.properties, dict):
        raise ValueError(value)
    if not one.properties.keys() <= {"serial", "mac"} or not all(
        isinstance(text, str) for text in one.properties.values()
    ):
        raise ValueError(value)
    if one.driver not in (*_BUSES, *_NETS, *_NOTHING):
        raise ValueError(one.driver)
    return one


def _bus(kind: type[DiskSpec] | type[CdromSpec], text: str) -> str:
    try:
        return kind.parse(text).bus
    except ValueProblem as problem:
        raise StateError(
            f"the saved machine had {text!r}, which is no disk", mend="save it again: it is damaged"
        ) from problem
