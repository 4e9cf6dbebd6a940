"""The Multiboot2 protocol (Multiboot2 Specification 2.0).

A kernel says by tags in a header near its start what it wants; it is an ELF file, or a flat one
with a tag that has the addresses. It is entered in 32-bit protected mode and finds tags again at
EBX.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.cpustate import protected_mode_state
from tetrarch.boot.e820 import memory_map, pack_pvh
from tetrarch.boot.elf import MAGIC as ELF_MAGIC
from tetrarch.boot.elf import Segment, parse_elf
from tetrarch.boot.initrd import initrd_files
from tetrarch.boot.layout import (
    EBDA_BASE,
    HIGH_MEMORY,
    MULTIBOOT_BASE,
    MULTIBOOT_END,
    GuestMemory,
    align_up,
    low_ram_top,
)
from tetrarch.boot.multiboot_image import (
    LOADER_NAME,
    Addresses,
    Module,
    flat_segment,
    load_image,
    load_modules,
)
from tetrarch.boot.source import Source
from tetrarch.errors import BootError

__all__ = ["HEADER_WITHIN", "Header", "find_header", "load_multiboot2"]

#: The header lies within this many bytes, at a multiple of eight (3.1).
HEADER_WITHIN: Final = 32768
ALIGNMENT: Final = 8
MAGIC: Final = 0xE852_50D6
BOOT_MAGIC: Final = 0x36D7_6289
#: Architecture: 32-bit protected mode of i386.
I386: Final = 0
FIXED: Final = struct.Struct("<4I")
TAG: Final = struct.Struct("<HHI")

# Tags of the header (3.1.3 to 3.1.14).
END: Final = 0
REQUEST: Final = 1
ADDRESS: Final = 2
ENTRY: Final = 3
CONSOLE: Final = 4
FRAMEBUFFER: Final = 5
MODULE_ALIGN: Final = 6
RELOCATABLE: Final = 10
#: Of a tag: a loader that does not know it may go on.
OPTIONAL: Final = 1
#: Of ADDRESS: the kernel begins where its file does.
FROM_START: Final = 0xFFFF_FFFF
#: Of CONSOLE: one of those that the kernel supports has to be there.
CONSOLE_REQUIRED: Final = 1

# Tags of the information (3.6).
INFO_CMDLINE: Final = 1
INFO_LOADER_NAME: Final = 2
INFO_MODULE: Final = 3
INFO_MEMORY: Final = 4
INFO_MAP: Final = 6
INFO_FRAMEBUFFER: Final = 8
INFO_RSDP_1: Final = 14
INFO_RSDP_2: Final = 15
INFO_LOAD_BASE: Final = 21
MAP_ENTRY: Final = 24
#: Address, bytes of a line, columns, lines, bits; EGA text.
TEXT_SCREEN: Final = (0xB_8000, 160, 80, 25, 16, 2, 0)
RSDP_BYTES: Final = (20, 36)


@dataclass(frozen=True)
class Header:
    """Where a kernel has it, and its bytes."""

    offset: int
    data: bytes


def find_header(start: bytes) -> Header | None:
    """The header in a file's first bytes, if there is one."""
    within = min(len(start), HEADER_WITHIN)
    for offset in range(0, within - FIXED.size + 1, ALIGNMENT):
        magic, architecture, length, checksum = FIXED.unpack_from(start, offset)
        total = magic + architecture + length + checksum
        if magic == MAGIC and total & 0xFFFF_FFFF == 0 and architecture == I386:
            return Header(offset, start[offset : min(offset + length, within)])
    return None


def load_multiboot2(
    vm: GuestMemory,
    source: Source,
    header: Header,
    initrd: str | os.PathLike[str] | None,
    cmdline: str,
    acpi_rsdp: int,
    *,
    vga: bool,
) -> dict[str, int]:
    """Raises BootError for what cannot be loaded as its header asks."""
    tags = _tags(source, header)
    information = _machine_tags(vm, acpi_rsdp, vga)
    known = {*information, INFO_CMDLINE, INFO_LOADER_NAME, INFO_MODULE, INFO_LOAD_BASE}
    _check_wishes(source, tags, known, vga)
    entry, segments = _image(source, header, tags)
    end = load_image(vm, source, segments, entry)
    modules = load_modules(vm, initrd_files(initrd), end)
    if RELOCATABLE in tags:
        base = min(segment.physical for segment in segments)
        information[INFO_LOAD_BASE] = struct.pack("<I", base)
    command = " ".join(filter(None, (source.path, cmdline)))
    _write_information(vm, command, modules, information)
    regs = protected_mode_state(vm, entry)
    regs |= {"rax": BOOT_MAGIC, "rbx": MULTIBOOT_BASE}
    return regs


_Tags = Mapping[int, tuple[bool, bytes]]
"""Of each type whether it is optional, and what is behind its head."""


def _tags(source: Source, header: Header) -> _Tags:
    found: dict[int, tuple[bool, bytes]] = {}
    at = FIXED.size
    while at + TAG.size <= len(header.data):
        kind, flags, size = TAG.unpack_from(header.data, at)
        if kind == END:
            return found
        if size < TAG.size or at + size > len(header.data):
            break
        found.setdefault(kind, (bool(flags & OPTIONAL), header.data[at + TAG.size : at + size]))
        at = align_up(at + size, ALIGNMENT)
    raise source.error(
        "has a Multiboot2 header whose tags do not end within it",
        mend="get the file again, it is damaged",
    )


def _words(source: Source, tags: _Tags, kind: int, count: int) -> tuple[int, ...]:
    data = tags[kind][1]
    if len(data) < 4 * count:
        raise source.error(
            f"has a Multiboot2 header with a tag of type {kind} that is too short",
            mend="get the file again, it is damaged",
        )
    return struct.unpack_from(f"<{count}I", data)


def _check_wishes(source: Source, tags: _Tags, known: set[int], vga: bool) -> None:
    loaded = {REQUEST, ADDRESS, ENTRY, CONSOLE, FRAMEBUFFER, MODULE_ALIGN, RELOCATABLE}
    for kind, (optional, data) in tags.items():
        if optional:
            continue
        if kind not in loaded:
            raise source.error(
                f"asks by its Multiboot2 header for what is not there (a tag of type {kind})",
                mend="build it without, or with that tag optional",
            )
        if kind == REQUEST:
            wanted = set(struct.unpack_from(f"<{len(data) // 4}I", data))
            if missing := wanted - known:
                raise source.error(
                    "asks by its Multiboot2 header for information that is not there "
                    f"(type {min(missing)})",
                    mend="build it without, or with that request optional",
                )
        screen = kind == FRAMEBUFFER or (
            kind == CONSOLE and _words(source, tags, kind, 1)[0] & CONSOLE_REQUIRED
        )
        if screen and not vga:
            raise source.error("asks by its Multiboot2 header for a screen", mend="add --vga")


def _image(source: Source, header: Header, tags: _Tags) -> tuple[int, Sequence[Segment]]:
    entry = _words(source, tags, ENTRY, 1)[0] if ENTRY in tags else None
    if ADDRESS in tags:
        header_at, load, *ends = _words(source, tags, ADDRESS, 4)
        at = Addresses(header_at, header_at - header.offset if load == FROM_START else load, *ends)
        segment = flat_segment(source, header.offset, at)
        if entry is None:
            raise source.error(
                "has a Multiboot2 header with addresses, and none to enter it at",
                mend="add a tag of type 3",
            )
        return entry, [segment]
    if source.read(0, min(4, source.size)) != ELF_MAGIC:
        raise source.error(
            "has a Multiboot2 header without addresses, and is no ELF file",
            mend="link it as ELF, or add a tag of type 2",
        )
    elf = parse_elf(source)
    return (elf.physical_entry if entry is None else entry), elf.loads


def _machine_tags(vm: GuestMemory, acpi_rsdp: int, vga: bool) -> dict[int, bytes]:
    """What the machine has to tell, by type."""
    upper = (low_ram_top(vm) - HIGH_MEMORY) >> 10
    tags = {
        INFO_MEMORY: struct.pack("<II", EBDA_BASE >> 10, upper),
        INFO_MAP: struct.pack("<II", MAP_ENTRY, 0) + pack_pvh(memory_map(vm.ram)),
    }
    if vga:
        tags[INFO_FRAMEBUFFER] = struct.pack("<QIIIBBH", *TEXT_SCREEN)
    if acpi_rsdp:
        old, new = RSDP_BYTES
        rsdp = vm.read_memory(acpi_rsdp, new)
        tags |= {INFO_RSDP_1: rsdp[:old], INFO_RSDP_2: rsdp}
    return tags


def _write_information(
    vm: GuestMemory, command: str, modules: Sequence[Module], tags: Mapping[int, bytes]
) -> None:
    def text(words: str) -> bytes:
        return words.encode("utf-8", "surrogateescape") + b"\0"

    listed = [
        (INFO_CMDLINE, text(command)),
        (INFO_LOADER_NAME, LOADER_NAME),
        *((INFO_MODULE, struct.pack("<II", m.start, m.end) + text(m.words)) for m in modules),
        *tags.items(),
        (END, b""),
    ]
    blob = bytearray(8)
    for kind, data in listed:
        blob += struct.pack("<II", kind, 8 + len(data)) + data
        blob += bytes(-len(blob) % ALIGNMENT)
    struct.pack_into("<I", blob, 0, len(blob))
    if len(blob) > MULTIBOOT_END - MULTIBOOT_BASE:
        raise BootError(
            "command line and modules' arguments are too long for Multiboot2", mend="shorten them"
        )
    vm.write_memory(MULTIBOOT_BASE, bytes(blob))
