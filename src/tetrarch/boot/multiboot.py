"""The Multiboot protocol, version 1 (Multiboot Specification 0.6.96).

A kernel says by a header near its start that it takes the protocol; it is an ELF file, or a flat
one whose header has the addresses. It is entered in 32-bit protected mode and finds modules,
command line and memory map by a structure at EBX.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tetrarch.boot.cpustate import protected_mode_state
from tetrarch.boot.e820 import memory_map
from tetrarch.boot.elf import MAGIC as ELF_MAGIC
from tetrarch.boot.elf import PT_LOAD, Segment, parse_elf
from tetrarch.boot.initrd import InitrdFile, initrd_files
from tetrarch.boot.initrd_memory import too_little_memory
from tetrarch.boot.layout import (
    EBDA_BASE,
    HIGH_MEMORY,
    MULTIBOOT_BASE,
    MULTIBOOT_END,
    PAGE_SIZE,
    GuestMemory,
    align_up,
    low_ram_top,
)
from tetrarch.boot.source import Source, copy_to_guest, zero_guest
from tetrarch.errors import BootError

__all__ = ["HEADER_WITHIN", "Header", "find_header", "load_multiboot"]

#: The header lies within this many bytes, at a multiple of four (3.1).
HEADER_WITHIN: Final = 8192
MAGIC: Final = 0x1BAD_B002
BOOT_MAGIC: Final = 0x2BAD_B002

# Flags of the header (3.1.2). A loader that does not know one of the low 16 must refuse.
PAGE_ALIGN: Final = 1 << 0
MEMORY_INFO: Final = 1 << 1
HAS_ADDRESSES: Final = 1 << 16
MUST_KNOW: Final = 0xFFFF
KNOWN: Final = PAGE_ALIGN | MEMORY_INFO

# Flags of the information (3.3).
INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MAP: Final = 1 << 6
INFO_LOADER_NAME: Final = 1 << 9
INFO_BYTES: Final = 120
LOADER_NAME: Final = b"Tetrarch\0"
#: The size of a map's entry without the field that has it.
MAP_ENTRY: Final = 20


@dataclass(frozen=True)
class Header:
    """Where a kernel has it, and what it says."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int]
    """Of the header, of what is loaded, its end, the end of its bss, the entry."""


def find_header(start: bytes) -> Header | None:
    """The header in a file's first bytes, if there is one."""
    for offset in range(0, min(len(start), HEADER_WITHIN) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", start, offset)
        if magic == MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            rest = start[offset + 12 : offset + 32].ljust(20, b"\0")
            addresses: tuple[int, int, int, int, int] = struct.unpack("<5I", rest)
            return Header(offset, flags, addresses)
    return None


def load_multiboot(
    vm: GuestMemory,
    source: Source,
    header: Header,
    initrd: str | os.PathLike[str] | None,
    cmdline: str,
) -> dict[str, int]:
    """Raises BootError for what cannot be loaded as its header asks."""
    if unknown := header.flags & MUST_KNOW & ~KNOWN:
        raise source.error(
            f"asks by its Multiboot header for what is not there (flags {unknown:#x})",
            mend="build it without, such as without a video mode",
        )
    if header.flags & HAS_ADDRESSES:
        entry, segments = _flat(source, header)
    elif source.read(0, min(4, source.size)) == ELF_MAGIC:
        elf = parse_elf(source)
        entry, segments = elf.physical_entry, elf.loads
    else:
        raise source.error(
            "has a Multiboot header without addresses, and is no ELF file",
            mend="link it as ELF, or set bit 16 of the header's flags",
        )
    end = _place(source, segments, entry)
    top = low_ram_top(vm)
    if end > top:
        raise too_little_memory(vm, source, end, None)
    for segment in segments:
        copy_to_guest(vm, segment.physical, source, segment.offset, segment.file_size)
        bss = segment.memory_size - segment.file_size
        zero_guest(vm, segment.physical + segment.file_size, bss)
    modules = _load_modules(vm, initrd_files(initrd), align_up(end, PAGE_SIZE), top)
    command = " ".join(filter(None, (source.path, cmdline)))
    _write_information(vm, command, modules)
    regs = protected_mode_state(vm, entry)
    regs |= {"rax": BOOT_MAGIC, "rbx": MULTIBOOT_BASE}
    return regs


def _flat(source: Source, header: Header) -> tuple[int, Sequence[Segment]]:
    """A kernel whose header has the addresses (3.1.3)."""
    header_at, load, load_end, bss_end, entry = header.addresses
    offset = header.offset - (header_at - load)
    if load > header_at or offset < 0:
        raise _lies(source, f"it lies at {header_at:#x} itself, and the kernel from {load:#x} on")
    load_end = load_end or load + source.size - offset
    size = load_end - load
    if size <= 0 or offset + size > source.size:
        raise _lies(
            source,
            f"the kernel lies at {load:#x}-{load_end:#x}, of which the file has "
            f"{source.size - offset} bytes",
        )
    bss_end = bss_end or load_end
    if bss_end < load_end:
        raise _lies(source, f"its bss ends at {bss_end:#x}, before what is loaded does")
    return entry, [Segment(PT_LOAD, offset, load, load, size, bss_end - load, PAGE_SIZE)]


def _lies(source: Source, cause: str) -> BootError:
    return source.error(
        f"has a Multiboot header with impossible addresses: {cause}",
        mend="get the file again, or link it anew",
    )


def _place(source: Source, segments: Sequence[Segment], entry: int) -> int:
    """The end of what is loaded, which was checked."""
    if not any(s.physical <= entry < s.physical + s.memory_size for s in segments):
        raise _lies(source, f"its entry {entry:#x} is outside of what is loaded")
    ordered = sorted(segments, key=lambda s: s.physical)
    for lower, upper in pairwise(ordered):
        if upper.physical < lower.physical + lower.memory_size:
            raise _lies(source, "its segments overlap in memory")
    if ordered[0].physical < HIGH_MEMORY:
        raise _lies(source, f"it lies at {ordered[0].physical:#x}; free RAM begins at 1 MiB")
    return ordered[-1].physical + ordered[-1].memory_size


@dataclass(frozen=True)
class _Module:
    start: int
    end: int
    words: str


def _load_modules(vm: GuestMemory, files: Sequence[InitrdFile], at: int, top: int) -> list[_Module]:
    """Behind the kernel, each on a page."""
    modules = []
    with ExitStack() as stack:
        for file in files:
            module = stack.enter_context(Source.open(file.path, "module"))
            if at + module.size > top:
                raise module.error(
                    "does not fit into memory behind the kernel", mend="give the machine more"
                )
            copy_to_guest(vm, at, module, 0, module.size)
            words = " ".join(filter(None, (str(file.path), file.arguments)))
            modules.append(_Module(at, at + module.size, words))
            at = align_up(at + module.size, PAGE_SIZE)
    return modules


def _write_information(vm: GuestMemory, command: str, modules: Sequence[_Module]) -> None:
    """The structure (3.3), and behind it what it points to."""
    blob = bytearray(INFO_BYTES)

    def put(data: bytes) -> int:
        blob.extend(bytes(-len(blob) % 4))
        blob.extend(data)
        return MULTIBOOT_BASE + len(blob) - len(data)

    def text(words: str) -> int:
        return put(words.encode("utf-8", "surrogateescape") + b"\0")

    entries = memory_map(vm.ram)
    memory = b"".join(struct.pack("<IQQI", MAP_ENTRY, *entry) for entry in entries)
    listed = [struct.pack("<IIII", m.start, m.end, text(m.words), 0) for m in modules]
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MAP | INFO_LOADER_NAME
    upper = (low_ram_top(vm) - HIGH_MEMORY) >> 10
    fields = {
        0: (flags, EBDA_BASE >> 10, upper),
        16: (text(command), len(modules), put(b"".join(listed))),
        44: (len(memory), put(memory)),
        64: (put(LOADER_NAME),),
    }
    for offset, values in fields.items():
        struct.pack_into(f"<{len(values)}I", blob, offset, *values)
    if len(blob) > MULTIBOOT_END - MULTIBOOT_BASE:
        raise BootError(
            "command line and modules' arguments are too long for Multiboot", mend="shorten them"
        )
    vm.write_memory(MULTIBOOT_BASE, bytes(blob))
