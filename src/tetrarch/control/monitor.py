"""What a command works on."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO, Final, Literal, NotRequired, TypedDict

from tetrarch.control.protocol import QmpError
from tetrarch.machine.breakpoints import Breakpoint
from tetrarch.machine.machine import Machine

__all__ = ["Descriptors", "FdInfo", "Monitor", "as_file"]


#: How a file of a set is named where a path is.
_SET_PREFIX: Final = "/dev/fdset/"
_NUMBER: Final = re.compile("[0-9]{1,20}")
_BUFFER: Final = 1 << 20


def as_file(descriptor: int, mode: Literal["rb", "wb"], name: str) -> BinaryIO:
    """One that a client has sent, which is the file's from now on. Raises QmpError."""
    refused = os.O_RDONLY if mode == "wb" else os.O_WRONLY
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        if flags & os.O_PATH or flags & os.O_ACCMODE == refused:
            raise QmpError(f"File descriptor named '{name}' is not open for that")
        return os.fdopen(descriptor, mode, buffering=_BUFFER)
    except OSError as error:
        os.close(descriptor)
        raise QmpError(f"File descriptor named '{name}': {error.strerror}") from error
    except QmpError:
        os.close(descriptor)
        raise


class FdInfo(TypedDict):
    """FdsetFdInfo (QEMU, qapi/misc.json)."""

    fd: int
    opaque: NotRequired[str]


class Descriptors:
    """File descriptors that a client has sent (SCM_RIGHTS), those that it has named, and its sets:
    each of a file, which is then named /dev/fdset/N."""

    def __init__(self) -> None:
        self._sent: list[int] = []
        self._named: dict[str, int] = {}
        self.sets: dict[int, list[FdInfo]] = {}

    def take(self, sent: list[int]) -> None:
        """They came with what was read. Those that came before and no command has taken go, as with
        QEMU: else the next command would take another's."""
        if sent:
            for descriptor in self._sent:
                os.close(descriptor)
            self._sent = sent

    def name(self, name: str) -> None:
        """Gives the next that was sent a name, and closes one that had it."""
        sent = self._next()
        before = self._named.get(name)
        self._named[name] = sent
        if before is not None:
            os.close(before)

    def add(self, number: int | None, opaque: str | None) -> tuple[int, int]:
        """Puts the next that was sent into a set, a new one without ``number``: that, and it."""
        sent = self._next()
        if number is None:
            number = next(free for free in count() if free not in self.sets)
        info: FdInfo = {"fd": sent}
        if opaque is not None:
            info["opaque"] = opaque
        self.sets.setdefault(number, []).append(info)
        return number, sent

    def remove(self, number: int, descriptor: int | None) -> None:
        """Closes one of a set, or all."""
        gone = [info for info in self.sets.get(number, []) if descriptor in (None, info["fd"])]
        if not gone:
            raise QmpError(f"File descriptor named 'fdset-id:{number}' not found")
        for info in gone:
            self.sets[number].remove(info)
            os.close(info["fd"])
        if not self.sets[number]:
            del self.sets[number]

    def in_set(self, path: str) -> FdInfo | None:
        """The first of the set that a path names; None where it is the path of a file."""
        if not path.startswith(_SET_PREFIX):
            return None
        number = path.removeprefix(_SET_PREFIX)
        found = self.sets.get(int(number), []) if _NUMBER.fullmatch(number) else []
        if not found:
            raise QmpError(f"File descriptor named 'fdset-id:{number}' not found")
        return found[0]

    def _next(self) -> int:
        if not self._sent:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self._sent.pop(0)

    def pop(self, name: str) -> int:
        """It is the caller's from now on."""
        if name not in self._named:
            raise QmpError(f"File descriptor named '{name}' not found")
        return self._named.pop(name)

    @contextmanager
    def target(self, protocol: str) -> Iterator[str | BinaryIO]:
        """Where a command writes: the path of ``file:PATH``, or the open file of ``fd:NAME``."""
        kind, _, name = protocol.partition(":")
        if kind not in ("file", "fd") or not name:
            raise QmpError("Parameter 'protocol' expects 'file:PATH' or 'fd:NAME'")
        if kind == "file":
            yield name
            return
        file = as_file(self.pop(name), "wb", name)
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # what could not be written before cannot be now
                file.close()
            raise
        file.close()

    def close(self) -> None:
        in_sets = [info["fd"] for infos in self.sets.values() for info in infos]
        for descriptor in (*self._sent, *self._named.values(), *in_sets):
            os.close(descriptor)
        self._sent.clear()
        self._named.clear()
        self.sets.clear()


@dataclass
class Monitor:
    """A machine and the client that steers it."""

    machine: Machine
    descriptors: Descriptors
    points: dict[str, Breakpoint]
    """The client's breakpoints."""
    tell: Callable[[str, Mapping[str, Any]], None]
    """An event by its name, with its data, for the client alone; from any thread."""
