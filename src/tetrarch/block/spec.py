"""Disks as they are written down: ``PATH[,format=raw|qcow2|vmdk][,readonly][,iops=N]…``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tetrarch._words import one_of, options, shown, split
from tetrarch.errors import ValueProblem

__all__ = [
    "BUSES",
    "FORMATS",
    "LATER_DRIVERS",
    "Bus",
    "CdromSpec",
    "DiskFormat",
    "DiskSpec",
    "FloppySpec",
    "later_device",
    "parse_bytes",
]

DiskFormat = Literal["raw", "qcow2", "vmdk"]
Bus = Literal["virtio", "nvme", "pvscsi", "ahci", "ide"]
CdromBus = Literal["ahci", "ide", "pvscsi"]
CacheMode = Literal["writeback", "none"]
OnWriteError = Literal["report", "stop"]

FORMATS: tuple[DiskFormat, ...] = get_args(DiskFormat)
BUSES: tuple[Bus, ...] = get_args(Bus)
#: The buses where a disk can come to a machine that runs, and QEMU's names of its devices there.
LATER_DRIVERS: Mapping[Bus, str] = {
    "virtio": "virtio-blk-pci",
    "nvme": "nvme",
    "pvscsi": "pvscsi",
}
_NVME_SERIAL_MAX = 20

_BYTES = re.compile(r"([0-9]{1,19})\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_RATE_MAX = 1 << 50
_VHOST_USER = "vhost-user="


def parse_bytes(text: str) -> int:
    """Bytes in "8G", "512M", or a bare number."""
    match = _BYTES.fullmatch(text.strip())
    size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not match or size >= 1 << 63:
        raise ValueProblem(f"{text!r} is no size", mend="write 8G, 512M or a number of bytes")
    return size


def later_device(bus: Bus, node: str) -> dict[str, str]:
    """The properties of a device for an image that has come later (NVMe 2.0, 5.17.2.1: 20 bytes
    of serial number)."""
    return {"drive": node} | ({"serial": node[:_NVME_SERIAL_MAX]} if bus == "nvme" else {})


@dataclass(frozen=True)
class DiskSpec:
    """One disk of a machine. The image's format is found by its first bytes if not given."""

    path: Path
    format: DiskFormat | None = None
    bus: Bus = "virtio"
    readonly: bool = False
    snapshot: bool = False
    """What the guest writes is gone at the end."""
    iops: int | None = None
    """Requests a second, at most."""
    bps: int | None = None
    """Bytes a second, at most."""
    cache: CacheMode = "writeback"
    """``none`` goes past the host's page cache."""
    werror: OnWriteError = "report"
    """A write that the host fails is an error to the guest, or pauses the machine."""
    vhost_user: bool = False
    """``path`` is the socket of who serves the disk by vhost-user, and says what it is like."""

    def __post_init__(self) -> None:
        if self.vhost_user and replace(self, vhost_user=False) != DiskSpec(self.path):
            raise ValueProblem(
                "a disk by vhost-user has no options here", mend="give them to its back end"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueProblem. A comma in the path is written twice."""
        served = text.startswith(_VHOST_USER)
        path, values = _parse(text.removeprefix(_VHOST_USER), _OPTIONS, "a disk")
        return cls(path, vhost_user=served, **values)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        return replace(self, path=directory / self.path)

    def __str__(self) -> str:
        words = [(_VHOST_USER if self.vhost_user else "") + str(self.path).replace(",", ",,")]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name != "vhost_user":
                words.append(f"{field.name}={'on' if value is True else value}")
        return ",".join(words)


@dataclass(frozen=True)
class CdromSpec:
    """A CD-ROM drive of a machine, with a disc: an ISO image."""

    path: Path
    bus: CdromBus = "ahci"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueProblem. A comma in the path is written twice."""
        path, values = _parse(text, {"bus": _one_of(*get_args(CdromBus))}, "a CD-ROM drive")
        return cls(path, **values)

    @property
    def disk(self) -> DiskSpec:
        """The disc as a disk: its bytes are what they are."""
        return DiskSpec(self.path, format="raw", readonly=True)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        return replace(self, path=directory / self.path)

    def __str__(self) -> str:
        path = str(self.path).replace(",", ",,")
        return path if self.bus == "ahci" else f"{path},bus={self.bus}"


@dataclass(frozen=True)
class FloppySpec:
    """A floppy drive of a machine, with a disk."""

    path: Path
    readonly: bool = False
    """The disk's tab is open."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueProblem. A comma in the path is written twice."""
        path, values = _parse(text, {"readonly": _switch}, "a floppy drive")
        return cls(path, **values)

    @property
    def disk(self) -> DiskSpec:
        """The same as a disk: its bytes are what they are."""
        return DiskSpec(self.path, format="raw", readonly=self.readonly)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        return replace(self, path=directory / self.path)

    def __str__(self) -> str:
        path = str(self.path).replace(",", ",,")
        return f"{path},readonly=on" if self.readonly else path


_Options = Mapping[str, Callable[[str, str | None], Any]]


def _parse(text: str, known: _Options, what: str) -> tuple[Path, dict[str, Any]]:
    """A path and the options behind it."""
    path, *words = split(text)
    if not path or "\0" in text:
        raise ValueProblem(f"{text!r} names no image", mend="write PATH[,OPTION=VALUE]...")
    values = {name: known[name](name, value) for name, value in options(words, known, what)}
    return Path(path), values


def _one_of(*choices: str) -> Callable[[str, str | None], str]:
    return lambda name, value: one_of(name, value, choices)


def _switch(name: str, value: str | None) -> bool:
    if value not in (None, "on", "off"):
        raise ValueProblem(f"{name} is {value!r}", mend="write on or off")
    return value != "off"


def _rate(name: str, value: str | None) -> int:
    rate = parse_bytes(value) if value else 0
    if not 0 < rate <= _RATE_MAX:
        mend = "give a number a second, such as 500 or 10M"
        raise ValueProblem(f"{name} is {shown(value)}", mend=mend)
    return rate


_OPTIONS: _Options = {
    "format": _one_of(*FORMATS),
    "bus": _one_of(*BUSES),
    "readonly": _switch,
    "snapshot": _switch,
    "iops": _rate,
    "bps": _rate,
    "cache": _one_of(*get_args(CacheMode)),
    "werror": _one_of(*get_args(OnWriteError)),
}
