"""A machine in a file, and a machine made of one or of several: which sections there are."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from tetrarch._native import EngineError
from tetrarch.errors import ConfigError, HostError, StateError
from tetrarch.machine.config import MachineConfig, make_config
from tetrarch.machine.cpu import GuestCpu, maker
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.flush_points import flush_disks, require_kept
from tetrarch.machine.outside import Outside
from tetrarch.machine.saved import SavedReader, SavedWriter, open_saved, read_ram
from tetrarch.machine.state import MachineParts, MachineState, load_state, save_state
from tetrarch.platforms.named import PLATFORMS

__all__ = [
    "About",
    "Parent",
    "Saved",
    "about_of",
    "opened",
    "parent_of",
    "restore_machine",
    "save_machine",
]

# Count up when a section means something else than before. The engine's sections have
# versions of their own inside.
_ABOUT_VERSION: Final = 7
_ABOUT_OPTIONS: Final = {
    "name",
    "engine",
    "platform",
    "memory",
    "cpus",
    "debug_exit",
    "vga",
    "screen",
    "vsock_model",
    "hpet",
    "virtio",
    "rng",
    "balloon",
    "input",
}
_DEVICES_VERSION: Final = 1
_RAM_VERSION: Final = 1
_NUMBER: Final = re.compile("[0-9]{1,3}")
#: Files of one machine that lie upon each other.
_LAYERS_MAX: Final = 64


@dataclass(frozen=True)
class Parent:
    """The file that another one lies upon; it is beside it."""

    identity: str
    file: str


@dataclass(frozen=True)
class About:
    """What the machine has to be like to take the rest up."""

    config: MachineConfig
    uptime: float
    outside: Outside
    identity: str
    """Of this file, and no other."""
    parent: Parent | None
    cpu: GuestCpu
    """What the guest has found of its CPU."""
    vcpus: Mapping[int, str]
    """Those that were in the machine: what they were called, by number."""
    disks: Mapping[str, Any]
    """Where the images stood, by the names of their nodes."""


@dataclass(frozen=True)
class Saved:
    """A saved machine whose files are open."""

    about: About
    reader: SavedReader
    layers: Sequence[tuple[SavedReader, bytes]]
    """Each with its table of RAM, the undermost first."""


def save_machine(parts: MachineParts, file: BinaryIO, parent: Parent | None = None) -> str:
    """Of a machine that is held, into an empty file; with a parent only what was written since.
    Gives the file's identity."""
    # First what may refuse.
    require_kept(parts.pc.blocks)
    state = save_state(parts)
    identity = secrets.token_hex(16)
    config = parts.config
    about = {
        "name": config.name,
        "engine": parts.engine,
        "platform": parts.platform,
        "memory": f"{config.memory >> 10}K",
        "cpus": str(config.cpus),
        "vcpus": parts.pc.vcpus.names,
        "debug_exit": config.debug_exit,
        "vga": config.vga,
        "screen": config.screen,
        "vsock_model": config.vsock_model,
        "hpet": config.hpet,
        "virtio": config.virtio,
        "rng": config.rng,
        "balloon": config.balloon,
        "input": config.input,
        "uptime": parts.uptime,
        "outside": Outside.of(config, parts.pc).to_json(),
        "identity": identity,
        "parent": None if parent is None else {"identity": parent.identity, "file": parent.file},
        "cpu": asdict(GuestCpu.of(parts.vm)),
        "disks": flush_disks(parts.pc.blocks),
    }
    writer = SavedWriter(file)
    try:
        table = writer.ram(parts.vm, written=parent is not None)
    except EngineError as error:
        raise HostError(
            f"the machine's memory cannot be saved: {engine_cause(error)}",
            mend=engine_mend(error, "save it without a parent"),
        ) from error
    writer.json("machine", _ABOUT_VERSION, about)
    writer.section("ram", _RAM_VERSION, table)
    writer.section("vm", 1, state.vm)
    for number, vcpu in state.vcpus.items():
        writer.section(f"vcpu{number}", 1, vcpu)
    writer.json("devices", _DEVICES_VERSION, state.devices)
    writer.json("pci", _DEVICES_VERSION, state.pci)
    writer.json("attached", _DEVICES_VERSION, state.attached)
    writer.end()
    return identity


def parent_of(parent: Path, child: Path | None) -> Parent:
    """What a child of a file says of it. Raises ConfigError where they are not in one directory,
    as a file names no other of the host, and where nobody could restore the child."""
    if child is not None and child.parent.resolve() != parent.parent.resolve():
        raise ConfigError(
            f"{child} and its parent {parent} are in two directories",
            mend="write it beside its parent",
        )
    path, about = parent, about_of(parent)
    said = Parent(about.identity, parent.name)
    for _ in range(_LAYERS_MAX - 1):
        if child is not None and _same_file(child, path):
            raise ConfigError(
                f"{child} would replace a file that it lies upon", mend="name another file"
            )
        if about.parent is None:
            return said
        above, path = path, path.with_name(about.parent.file)
        below = about_of(path)
        _require_parent(above, about.parent, path, below)
        about = below
    raise ConfigError(
        f"{parent} lies upon so many files that no other can lie upon it: {_LAYERS_MAX} at most",
        mend="save without a parent",
    )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # it is not there, or cannot be: who writes it says so
        return False


def _require_parent(child: Path, wanted: Parent, path: Path, found: About) -> None:
    if found.identity != wanted.identity:
        raise StateError(
            f"{path} is not the file that {child} was saved upon", mend="put that one there"
        )


def about_of(path: Path) -> About:
    with open_saved(path) as reader:
        return _read_about(reader, None)


@contextmanager
def opened(path: Path, platform: str | None) -> Iterator[Saved]:
    """A saved machine, and the files that it lies upon. Raises StateError."""
    with ExitStack() as stack:
        reader = stack.enter_context(open_saved(path))
        about = _read_about(reader, platform)
        layers = [(reader, _read_table(reader, about))]
        parent = about.parent
        while parent is not None:
            if len(layers) == _LAYERS_MAX:
                raise reader.damaged(f"lies upon more than {_LAYERS_MAX} others")
            below = stack.enter_context(open_saved(path.with_name(parent.file)))
            other = _read_about(below, platform)
            _require_parent(layers[-1][0].path, parent, below.path, other)
            if other.config.memory != about.config.memory:
                raise below.damaged("has another amount of memory than its child")
            layers.append((below, _read_table(below, other)))
            parent = other.parent
        yield Saved(about, reader, layers[::-1])


def _read_about(reader: SavedReader, platform: str | None) -> About:
    """``platform``: that of the program; else it is one of ours."""
    about = _mapping(reader, "machine", _ABOUT_VERSION)
    uptime = about.pop("uptime", None)
    had = about.pop("outside", None)
    identity, parent = about.pop("identity", None), about.pop("parent", None)
    cpu, disks = about.pop("cpu", None), about.pop("disks", None)
    vcpus = about.pop("vcpus", None)
    found = about.pop("platform", None)
    if platform is not None and found != platform:
        raise StateError(
            f"the saved machine has the platform {found!r}", mend=f"give it, not {platform!r}"
        )
    if platform is None and isinstance(found, str):
        if found not in PLATFORMS:
            raise StateError(
                f"the saved machine has a platform of its own, {found[:64]!r}",
                mend="restore it by a program that has the platform: Machine.restore(platform=...)",
            )
        about["platform"] = found
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
    if not isinstance(identity, str) or not identity:
        raise reader.damaged("does not say which file it is")
    if not isinstance(disks, dict):
        raise reader.damaged("does not say where the machine's disks stood")
    return About(
        config,
        float(uptime),
        outside,
        identity,
        _parent(reader, parent),
        _cpu(reader, cpu),
        _vcpus(reader, vcpus),
        disks,
    )


def _is_word(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _cpu(reader: SavedReader, value: object) -> GuestCpu:
    if isinstance(value, dict) and value.keys() == {"vendor", "signature", "words"}:
        vendor, signature, words = value["vendor"], value["signature"], value["words"]
        named = isinstance(vendor, str) and isinstance(words, dict)
        if named and _is_word(signature) and all(_is_word(bits) for bits in words.values()):
            return GuestCpu(vendor, signature, words)
    raise reader.damaged("does not say what CPU the machine had")


def _vcpus(reader: SavedReader, value: object) -> dict[int, str]:
    entries = value.items() if isinstance(value, dict) else ()
    found = {
        int(number): name
        for number, name in entries
        if _NUMBER.fullmatch(number) and isinstance(name, str)
    }
    if not found or len(found) != len(entries):
        raise reader.damaged("does not say which CPUs the machine had")
    return found


def _parent(reader: SavedReader, value: object) -> Parent | None:
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"identity", "file"}:
        identity, file = value["identity"], value["file"]
        texts = isinstance(identity, str) and isinstance(file, str)
        # A name, and no path.
        if texts and Path(file).name == file and file not in ("", "..") and "\0" not in file:
            return Parent(identity, file)
    raise reader.damaged("does not say what it lies upon")


def _read_table(reader: SavedReader, about: About) -> bytes:
    # An entry of the table is of a page at least; there is firmware, too.
    limit = about.config.memory // 128 + (1 << 20)
    return reader.section("ram", _RAM_VERSION, limit=limit)


def restore_machine(parts: MachineParts, saved: Saved) -> None:
    """Into a new machine that is held."""
    _require_cpu(parts, saved.about.cpu)
    reader = saved.reader
    parts.pc.vcpus.load(saved.about.vcpus)
    vm = reader.section("vm", 1)
    vcpus = {number: reader.section(f"vcpu{number}", 1) for number in parts.vcpus}
    devices = _mapping(reader, "devices", _DEVICES_VERSION)
    plugged = _mapping(reader, "pci", _DEVICES_VERSION)
    attached = _mapping(reader, "attached", _DEVICES_VERSION)
    reader.end()
    read_ram(parts.vm, saved.layers)
    load_state(parts, MachineState(vm, vcpus, devices, plugged, attached))


def _require_cpu(parts: MachineParts, had: GuestCpu) -> None:
    """Raises StateError where the guest's CPU would be another's, or lack what it had: its kernel
    looked once."""
    have = GuestCpu.of(parts.vm)
    if have.vendor != had.vendor:
        raise StateError(
            f"the saved machine's CPU is {maker(had.vendor)}'s, and this host's is "
            f"{maker(have.vendor)}'s",
            mend=f"restore it on a host with a CPU of {maker(had.vendor)}'s",
        )
    missing = {word: bits & ~have.words.get(word, 0) for word, bits in had.words.items()}
    if any(missing.values()):
        from tetrarch.machine.cpu_models import feature_names

        lacking = feature_names(missing)
        raise StateError(
            f"the saved machine's CPU had features that engine {parts.engine} does not have here:"
            f" {', '.join(lacking)}",
            mend="restore it on the engine and the kind of host where it was saved; a machine made"
            " with cpu portable goes from one engine to the other, and one with the name of a model"
            " to any host that has that",
        )


def _mapping(reader: SavedReader, name: str, version: int) -> dict[str, Any]:
    value = reader.json(name, version)
    if not isinstance(value, Mapping):
        raise reader.damaged(f"has a section {name!r} that is no object")
    return dict(value)
