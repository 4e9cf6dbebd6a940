"""Unified kernel images: an EFI program with a Linux kernel, its initrd and its command line as
sections (UAPI Group specification 5, "Unified Kernel Image"; Microsoft PE and COFF Specification).

Firmware runs the program; without it the sections are taken as the files that they were.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.source import Source
from tetrarch.errors import BootError

__all__ = ["KernelFile", "embedded_cmdline", "open_kernel"]

MZ: Final = b"MZ"
PE: Final = b"PE\0\0"
PE_OFFSET_AT: Final = 0x3C
#: Machine, sections, time, symbols and their number, bytes of the optional header, flags.
COFF: Final = struct.Struct("<HHIIIHH")
AMD64, I386 = 0x8664, 0x014C
#: Name, bytes in memory and address there, bytes in the file and their offset.
SECTION: Final = struct.Struct("<8sIIII")
SECTION_BYTES: Final = 40
#: A stub has a dozen.
SECTIONS_MAX: Final = 96
CMDLINE_MAX: Final = 1 << 16


@dataclass(frozen=True)
class KernelFile:
    kernel: Source
    initrd: Source | None = None
    cmdline: str | None = None
    unified: bool = False


@contextmanager
def open_kernel(path: str | os.PathLike[str]) -> Iterator[KernelFile]:
    """A kernel's file, or what is in a unified one. Raises BootError."""
    with Source.open(path, "kernel") as source:
        sections = _sections(source)
        if sections is None or ".linux" not in sections:
            yield KernelFile(source)
            return
        initrd, cmdline = sections.get(".initrd"), sections.get(".cmdline")
        yield KernelFile(
            source.part(*sections[".linux"], "kernel in"),
            source.part(*initrd, "initrd in") if initrd is not None and initrd[1] else None,
            None if cmdline is None else _text(source, *cmdline),
            unified=True,
        )


def embedded_cmdline(path: str | os.PathLike[str]) -> str | None:
    """Of a unified kernel image that has one. Raises BootError."""
    with open_kernel(path) as file:
        return file.cmdline


def _text(source: Source, offset: int, size: int) -> str:
    if size > CMDLINE_MAX:
        raise source.error(
            f"has a command line of {size} bytes", mend="build it with a shorter one"
        )
    return source.read(offset, size).rstrip(b"\0\n").decode("utf-8", "surrogateescape")


def _sections(source: Source) -> Mapping[str, tuple[int, int]] | None:
    """Offset and size of each in the file, the first of its name; None for what is no PE file."""
    start = source.read(0, min(source.size, PE_OFFSET_AT + 4))
    if not start.startswith(MZ) or len(start) < PE_OFFSET_AT + 4:
        return None
    (at,) = struct.unpack_from("<I", start, PE_OFFSET_AT)
    if at + len(PE) + COFF.size > source.size or source.read(at, len(PE)) != PE:
        return None
    machine, count, _, _, _, optional, _ = COFF.unpack(source.read(at + len(PE), COFF.size))
    table = at + len(PE) + COFF.size + optional
    if machine not in (AMD64, I386) or count > SECTIONS_MAX:
        return None
    if table + count * SECTION_BYTES > source.size:
        raise _damaged(source, "in its table of sections")
    found: dict[str, tuple[int, int]] = {}
    for index in range(count):
        head = source.read(table + index * SECTION_BYTES, SECTION.size)
        name, memory_size, _, file_size, offset = SECTION.unpack(head)
        size = min(memory_size, file_size)
        if size and offset + size > source.size:
            raise _damaged(source, f"in a section that ends at {offset + size}")
        found.setdefault(name.rstrip(b"\0").decode("latin-1"), (offset, size))
    return found


def _damaged(source: Source, where: str) -> BootError:
    return source.error(
        f"is an EFI program that is cut short {where}; it has {source.size} bytes",
        mend="get the file again",
    )
