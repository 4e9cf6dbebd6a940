"""A machine in a file, and a machine made of one: which sections there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tetrarch.errors import ConfigError, StateError
from tetrarch.machine.config import MachineConfig, make_config
from tetrarch.machine.outside import Outside
from tetrarch.machine.saved import SavedReader, SavedWriter, read_ram, write_ram, writing_saved
from tetrarch.machine.state import MachineParts, MachineState, load_state, save_state

__all__ = ["About", "read_about", "restore_machine", "save_machine"]

# Count up when a section means something else than before. The engine's sections have
# versions of their own inside.
_ABOUT_VERSION = 2
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
class About:
    """What the machine has to be like to take the rest up."""

    config: MachineConfig
    uptime: float
    outside: Outside


def save_machine(parts: MachineParts, target: Path | BinaryIO) -> None:
    """Of a machine that is held, to a file of that name or into one that is open for writing."""
    # First what may refuse: then no file is begun.
    state = save_state(parts)
    if isinstance(target, Path):
        with writing_saved(target) as writer:
            _write(parts, state, writer)
    else:
        _write(parts, state, SavedWriter(target))


def _write(parts: MachineParts, state: MachineState, writer: SavedWriter) -> None:
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
        "outside": Outside.of(parts.config, parts.pc).to_json(),
    }
    writer.json("machine", _ABOUT_VERSION, about)
    write_ram(parts.vm, writer)
    writer.section("vm", 1, state.vm)
    for index, vcpu in enumerate(state.vcpus):
        writer.section(f"vcpu{index}", 1, vcpu)
    writer.json("devices", _DEVICES_VERSION, state.devices)
    writer.json("pci", _DEVICES_VERSION, state.pci)
    writer.json("attached", _DEVICES_VERSION, state.attached)


def read_about(reader: SavedReader, platform: str) -> About:
    about = _mapping(reader, "machine", _ABOUT_VERSION)
    uptime = about.pop("uptime", None)
    had = about.pop("outside", None)
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
    try:
        outside = Outside.from_json(had)
    except ValueError as error:
        raise reader.damaged("does not say what the machine had of its host") from error
    return About(config, float(uptime), outside)


def restore_machine(parts: MachineParts, reader: SavedReader) -> None:
    """Into a new machine that is held."""
    read_ram(parts.vm, reader)
    vm = reader.section("vm", 1)
    vcpus = [reader.section(f"vcpu{index}", 1) for index in range(len(parts.vcpus))]
    devices = _mapping(reader, "devices", _DEVICES_VERSION)
    plugged = _mapping(reader, "pci", _DEVICES_VERSION)
    attached = _mapping(reader, "attached", _DEVICES_VERSION)
    reader.end()
    load_state(parts, MachineState(vm, vcpus, devices, plugged, attached))


def _mapping(reader: SavedReader, name: str, version: int) -> dict[str, Any]:
    value = reader.json(name, version)
    if not isinstance(value, Mapping):
        raise reader.damaged(f"has a section {name!r} that is no object")
    return dict(value)
