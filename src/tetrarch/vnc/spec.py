"""Where a machine's screen is shown, as it is written down:
``vnc=PATH|[HOST:]PORT[,password-file=FILE]``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from tetrarch._words import options, split
from tetrarch.endpoint import Endpoint
from tetrarch.errors import ValueProblem

__all__ = ["DisplaySpec", "VncPlace"]

_VNC = "vnc="
_PASSWORD = "password-file"


@dataclass(frozen=True)
class VncPlace(Endpoint):
    """A TCP port, or a Unix socket."""

    WHO: ClassVar[str] = "viewers"

    @property
    def local(self) -> bool:
        """Whether programs of this host alone come there."""
        if self.path is not None or self.host == "localhost":
            return True
        import ipaddress  # of few machines

        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class DisplaySpec:
    place: VncPlace
    password_file: Path | None = None

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem. A comma in a path is written twice."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or not value.startswith(_VNC) or "\0" in value:
            raise ValueProblem(
                f"{value!r} is no display", mend="write vnc=PORT or vnc=PATH[,password-file=FILE]"
            )
        where, *words = split(value.removeprefix(_VNC))
        place, password_file = VncPlace.parse(where), None
        for _, text in options(words, (_PASSWORD,), "a display"):
            if not text:
                raise ValueProblem(f"{_PASSWORD} names no file", mend="name a file")
            password_file = Path(text)
        if not place.local and password_file is None:
            # Whoever reaches it has the machine's keyboard.
            raise ValueProblem(
                f"anybody who reaches {place} would use the machine",
                mend=f"add {_PASSWORD}=FILE, or leave the host out, and come by ssh -L",
            )
        return cls(place, password_file)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        file = None if self.password_file is None else directory / self.password_file
        return replace(self, place=self.place.relative_to(directory), password_file=file)

    def __str__(self) -> str:
        """As ``parse`` takes it."""
        words = [_VNC + str(self.place)]
        if self.password_file is not None:
            words.append(f"{_PASSWORD}={self.password_file}")
        return ",".join(word.replace(",", ",,") for word in words)
