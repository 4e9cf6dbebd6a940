"""A console as it is written down: ``stdio``, ``none``, ``file=PATH``, ``socket=PATH``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from tetrarch.console.backend import ConsoleBackend

__all__ = ["ConsoleSpec"]


@dataclass(frozen=True)
class ConsoleSpec:
    """Names the other end of a serial line; ``open`` makes it."""

    kind: Literal["stdio", "none", "file", "socket"]
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None where ``text`` names no console."""
        kind, equals, path = text.partition("=")
        if "\0" in path:
            return None
        match kind:
            case "stdio" | "none" if not equals:
                return cls(kind)
            case "file" | "socket" if path:
                return cls(kind, Path(path))
        return None

    def __str__(self) -> str:
        return self.kind if self.path is None else f"{self.kind}={self.path}"

    def open(self) -> ConsoleBackend:
        """Raises ConsoleError where it cannot be had."""
        if self.path is not None:
            from tetrarch.console.files import FileConsole, SocketConsole

            return FileConsole(self.path) if self.kind == "file" else SocketConsole(self.path)
        if self.kind == "none":
            from tetrarch.console.backend import NullConsole

            return NullConsole()
        from tetrarch.console.stdio import StdioConsole

        return StdioConsole()
