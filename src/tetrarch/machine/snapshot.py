"""What of a machine is saved, and in which order it is taken up again.

The interrupt controllers come before the devices, both ways: a device that is
loaded drives its line to where it was, and a controller that knows the line high
already sees no edge in that. What changes a device meanwhile, typed input, comes
into the device's state and then is an edge, as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrarch._native import EngineError
from tetrarch.errors import ConfigError, HostError, StateError
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.config import MachineConfig, make_config
from tetrarch.machine.engine_vm import EngineVcpu, EngineVm, engine_cause, engine_mend
from tetrarch.machine.pc import Pc
from tetrarch.machine.saved import SavedReader, read_ram, write_ram, writing_saved

__all__ = ["About", "MachineParts", "read_about", "restore_machine", "save_machine"]

# Count up when a section means something else than before. The engine's sections have
# versions of their own inside.
_ABOUT_VERSION = 1
_ABOUT_OPTIONS = {
    "name",
    "engine",
    "memory",
    "cpus",
    "debug_exit",
    "virtio",
    "rng",
    "balloon",
    "input",
}
_DEVICES_VERSION = 1


@dataclass(frozen=True)
class MachineParts:
    """What a saved machine is made of."""

    config: MachineConfig
    engine: str
    platform: str
    uptime: float
    vm: EngineVm
    vcpus: Sequence[EngineVcpu]
    pc: Pc
    attached: AttachedDevices


@dataclass(frozen=True)
class About:
    """What the machine has to be like to take the rest up."""

    config: MachineConfig
    uptime: float


def save_machine(parts: MachineParts, path: Path) -> None:
    """Of a machine that is held."""
    # First what may refuse: then no file is begun.
    attached = parts.attached.save()
    plugged = parts.pc.plugged.save()
    with writing_saved(path) as writer:
        about = {
            "name": parts.config.name,
            "engine": parts.engine,
            "platform": parts.platform,
            "memory": f"{parts.config.memory >> 10}K",
            "cpus": parts.config.cpus,
            "debug_exit": parts.config.debug_exit,
            "virtio": parts.config.virtio,
            "rng": parts.config.rng,
            "balloon": parts.config.balloon,
            "input": parts.config.input,
            "uptime": parts.uptime,
        }
        writer.json("machine", _ABOUT_VERSION, about)
        write_ram(parts.vm, writer)
        try:
            writer.section("vm", 1, parts.vm.save_state())
            for index, vcpu in enumerate(parts.vcpus):
                writer.section(f"vcpu{index}", 1, vcpu.save_state())
        except EngineError as error:
            raise HostError(
                f"the engine cannot save the machine: {engine_cause(error)}",
                mend=engine_mend(error, "please report it"),
            ) from error
        writer.json("devices", _DEVICES_VERSION, parts.pc.save())
        writer.json("pci", _DEVICES_VERSION, plugged)
        writer.json("attached", _DEVICES_VERSION, attached)


def read_about(reader: SavedReader, platform: str) -> About:
    about = _mapping(reader, "machine", _ABOUT_VERSION)
    uptime = about.pop("uptime", None)
    found = about.pop("platform", None)
    if found != platform:
        raise StateError(
            f"the saved machine has the platform {found!r}", mend=f"give it, not {platform!r}"
        )
    if not about.keys() <= _ABOUT_OPTIONS:
        # Nothing of a file of somebody else names files of ours.
        raise reader.damaged("describes no machine")
    if about.get("engine") not in ("bt", "kvm"):
        about["engine"] = "auto"  # of a stand-in for an engine
    try:
        config = make_config(about)
    except ConfigError as error:
        raise reader.damaged(f"describes no machine: {error.cause}") from error
    if not isinstance(uptime, (int, float)) or not 0 <= uptime < 1e10:
        raise reader.damaged("does not say how long the machine ran")
    return About(config, float(uptime))


def restore_machine(parts: MachineParts, reader: SavedReader) -> dict[str, Any]:
    """Into a new machine that is held. Gives the states of devices that are still to come."""
    read_ram(parts.vm, reader)
    try:
        parts.vm.load_state(reader.section("vm", 1))
        for index, vcpu in enumerate(parts.vcpus):
            vcpu.load_state(reader.section(f"vcpu{index}", 1))
    except EngineError as error:
        raise StateError(
            f"the engine {parts.engine} cannot take the machine up: {engine_cause(error)}",
            mend=engine_mend(
                error, "restore it on the engine and the kind of host where it was saved"
            ),
        ) from error
    devices = _mapping(reader, "devices", _DEVICES_VERSION)
    plugged = _mapping(reader, "pci", _DEVICES_VERSION)
    attached = _mapping(reader, "attached", _DEVICES_VERSION)
    reader.end()
    parts.pc.load(devices)
    parts.pc.plugged.load(plugged)
    return attached


def _mapping(reader: SavedReader, name: str, version: int) -> dict[str, Any]:
    value = reader.json(name, version)
    if not isinstance(value, Mapping):
        raise reader.damaged(f"has a section {name!r} that is no object")
    return dict(value)
