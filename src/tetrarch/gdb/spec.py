"""Where gdb finds a machine, as it is written down: ``PORT``, ``HOST:PORT`` or a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tetrarch.errors import ValueProblem

__all__ = ["GdbSpec"]

_TCP = re.compile(r"(?:(\[[^\]]*\]|[^:/]*):)?(-?[0-9]+)")
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class GdbSpec:
    """A TCP port, or a Unix socket."""

    path: Path | None = None
    host: str = _LOCALHOST
    port: int = 0

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem."""
        if isinstance(value, cls):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, str, os.PathLike)):
            raise ValueProblem(f"{value!r} is no place for gdb", mend="write PORT or PATH")
        match = None if isinstance(value, os.PathLike) else _TCP.fullmatch(str(value))
        if match is None:
            text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
            if not text or "\0" in text:
                raise ValueProblem(f"{value!r} is no place for gdb", mend="write PORT or PATH")
            return cls(path=Path(text))
        # Compared as text: a number can have more digits than int() takes.
        port = match[2].lstrip("0") or "0"
        if len(port) > 5 or not 0 <= int(port) <= 0xFFFF:
            raise ValueProblem(f"{match[2]} is no TCP port", mend="give one up to 65535")
        return cls(host=(match[1] or _LOCALHOST).strip("[]"), port=int(port))

    def relative_to(self, directory: Path) -> Self:
        """With its path as it is written in a file of that directory."""
        return self if self.path is None else replace(self, path=directory / self.path)

    def __str__(self) -> str:
        """As ``parse`` takes it."""
        if self.path is not None:
            text = str(self.path)
            return f"./{text}" if _TCP.fullmatch(text) else text
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
