"""A machine's firmware as it is written down: ``seabios``, ``ovmf`` or ``PATH``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from tetrarch.errors import ValueProblem

__all__ = ["FirmwareSpec"]

#: Where distributions have them: Debian, Fedora, Arch.
NAMED: Final = {
    "seabios": (
        "/usr/share/seabios/bios-256k.bin",
        "/usr/share/qemu/bios-256k.bin",
    ),
    "ovmf": (
        # All of it is 64-bit code, which engine bt translates.
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
    ),
}


@dataclass(frozen=True)
class FirmwareSpec:
    """Firmware by the name of its package, or in a file."""

    name: str | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value in NAMED:
            return cls(name=value)
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
            raise ValueProblem(f"{value!r} is no firmware", mend="write seabios, ovmf or a path")
        return cls(path=Path(value))

    @property
    def file(self) -> Path:
        """Where it is. Raises ValueProblem where the host has none of that name."""
        if self.path is not None:
            return self.path
        for place in NAMED[str(self.name)]:
            if os.path.exists(place):
                return Path(place)
        raise ValueProblem(
            f"this host has no {self.name}", mend=f"apt install {self.name}, or name its file"
        )

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        return self if self.path is None else replace(self, path=directory / self.path)

    def __str__(self) -> str:
        return str(self.name or self.path)
