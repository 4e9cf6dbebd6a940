"""What ``initrd`` names: a file, or several with a comma between them.

Multiboot takes them as modules, each with the words behind its first blank. Linux gets them behind
each other, as it takes archives
(Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tetrarch.boot.layout import align_up
from tetrarch.boot.source import Source

__all__ = ["InitrdFile", "initrd_files", "initrd_relative_to", "open_initrd"]

#: Where an archive may begin.
ALIGNMENT: Final = 4


class InitrdFile(NamedTuple):
    path: Path
    arguments: str = ""


def initrd_files(initrd: str | os.PathLike[str] | None) -> list[InitrdFile]:
    """The files of an option's value. The name of one that is there may hold anything."""
    if initrd is None:
        return []
    text = os.fspath(initrd)
    if "\0" in text or os.path.exists(text) or not {" ", ","} & set(text):
        return [InitrdFile(Path(text))]
    parts = (part.partition(" ") for part in text.split(","))
    return [InitrdFile(Path(path), arguments) for path, _, arguments in parts]


def initrd_relative_to(initrd: Path, directory: Path) -> Path:
    """With paths as they are written in a file of that directory."""
    if (directory / initrd).exists():
        return directory / initrd
    return Path(",".join(str(directory / part) for part in str(initrd).split(",")))


@contextmanager
def open_initrd(
    initrd: str | os.PathLike[str] | None, first: Source | None = None
) -> Iterator[Source]:
    """All files as one, each at a multiple of four bytes, without their arguments; ``first``
    comes before them. One of both is there."""
    with ExitStack() as stack:
        files = initrd_files(initrd)
        sources = [] if first is None else [first]
        sources += [stack.enter_context(Source.open(file.path, "initrd")) for file in files]
        if len(sources) == 1:
            yield sources[0]
            return
        joined = _Joined(sources)
        yield Source(
            joined.read_at, joined.size, "initrd", ",".join(source.path for source in sources)
        )


class _Joined:
    """Files behind each other, with zeros between them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._parts: list[tuple[int, Source]] = []
        self.size = 0
        for source in sources:
            start = align_up(self.size, ALIGNMENT)
            self._parts.append((start, source))
            self.size = start + source.size

    def read_at(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        for start, source in self._parts:
            first = max(offset, start)
            end = min(offset + length, start + source.size)
            if first < end:
                data[first - offset : end - offset] = source.read(first - start, end - first)
        return bytes(data)
