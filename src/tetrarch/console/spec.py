"""A console as it is written down: ``stdio``, ``none``, ``file=PATH``, ``socket=PATH``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tetrarch.errors import ValueProblem

if TYPE_CHECKING:
    from tetrarch.console.backend import ConsoleBackend

__all__ = ["ConsoleSpec", "PortSpec", "no_console", "require_console"]


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

    def relative_to(self, directory: Path) -> Self:
        """With its path as it is written in a file of that directory."""
        return self if self.path is None else replace(self, path=directory / self.path)

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


def no_console(value: object) -> ValueProblem:
    return ValueProblem(
        f"{value!r} is no console", mend="there are stdio, none, file=PATH and socket=PATH"
    )


#: Linux cuts names of ports at a page; sysfs and udev take what a file name can be.
_NAME = re.compile(r"[A-Za-z0-9._:+-]{1,128}")


@dataclass(frozen=True)
class PortSpec:
    """A port of the virtio console; one without a name is a terminal."""

    console: Any
    """A ConsoleSpec, or a ConsoleBackend that is there."""
    name: str = ""

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise ValueProblem(
                f"{self.name!r} is no name of a port",
                mend="use up to 128 letters, digits, '.', '_', ':', '+' and '-'",
            )
        if not isinstance(self.console, ConsoleSpec):
            require_console(self.console)

    @classmethod
    def of(cls, value: object) -> PortSpec:
        """As it is written down, a back end, or one that is made. Raises ValueProblem."""
        if isinstance(value, PortSpec):
            return value
        if not isinstance(value, str):
            return cls(value)
        text, named, name = value.partition(",name=")
        spec = ConsoleSpec.parse(text)
        if spec is None or (named and not name):
            raise no_console(value)
        return cls(spec, name)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        if not isinstance(self.console, ConsoleSpec):
            return self
        return replace(self, console=self.console.relative_to(directory))

    def __str__(self) -> str:
        return f"{self.console},name={self.name}" if self.name else str(self.console)

    def open(self) -> ConsoleBackend:
        """Raises ConsoleError where it cannot be had."""
        backend: ConsoleBackend = (
            self.console.open() if isinstance(self.console, ConsoleSpec) else self.console
        )
        return backend


def require_console(value: object) -> None:
    """Raises ValueProblem where a back end lacks a method."""
    for method in ("start", "write", "close"):
        if not callable(getattr(value, method, None)):
            raise ValueProblem(
                f"{value!r} is no console, it has no method {method}()",
                mend="give a ConsoleBackend, or text as in 'file=PATH'",
            )
