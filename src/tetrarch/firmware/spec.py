"""A machine's firmware as it is written down: ``seabios``, or ``ovmf|PATH[,variables=FILE]``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from tetrarch._words import options, split
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


#: By this two files of a build of OVMF are a pair.
CODE, VARIABLES = "CODE", "VARS"


@dataclass(frozen=True)
class FirmwareSpec:
    """Firmware by the name of its package, or in a file."""

    name: str | None = None
    path: Path | None = None
    variables: Path | None = None
    """Where its variables are kept; it is made where it is not there."""

    def __post_init__(self) -> None:
        if self.name == "seabios" and self.variables is not None:
            raise ValueProblem("SeaBIOS has no variables to keep", mend="leave variables= out")

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem. A comma in a path is written twice."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
            raise ValueProblem(f"{value!r} is no firmware", mend="write seabios, ovmf or a path")
        if not isinstance(value, str):
            return cls(path=Path(value))
        which, *words = split(value)
        variables = None
        for _, file in options(words, ["variables"], "firmware"):
            if not file:
                raise ValueProblem("variables is nothing", mend="name a file for them")
            variables = Path(file)
        if which in NAMED:
            return cls(name=which, variables=variables)
        return cls(path=Path(which), variables=variables)

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

    @property
    def variables_template(self) -> Path | None:
        """What its variables begin as, where that lies beside it. Raises ValueProblem."""
        file = self.file
        beside = file.with_name(file.name.replace(CODE, VARIABLES))
        return beside if beside != file and beside.exists() else None

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        path = None if self.path is None else directory / self.path
        variables = None if self.variables is None else directory / self.variables
        return replace(self, path=path, variables=variables)

    def __str__(self) -> str:
        text = self.name or str(self.path).replace(",", ",,")
        kept = str(self.variables).replace(",", ",,")
        return text if self.variables is None else f"{text},variables={kept}"
