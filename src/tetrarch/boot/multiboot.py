"""The Multiboot protocol, version 1 (Multiboot Specification 0.6.96).

A kernel says by a header near its start that it takes the protocol; it is an ELF file, or a flat
one whose header has the addresses. It is entered in 32-bit protected mode and finds modules,
command line and memory map by a structure at EBX.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.cpustate import protected_mode_state
from tetrarch.boot.e820 import memory_map
from tetrarch.boot.elf import MAGIC as ELF_MAGIC
from tetrarch.boot.elf import Segment, parse_elf
from tetrarch.boot.initrd import initrd_files
from tetrarch.boot.layout import (
    EBDA_BASE,
    HIGH_MEMORY,
    MULTIBOOT_BASE,
    MULTIBOOT_END,
    GuestMemory,
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
#: The size of a map's entry without the field that has it.
MAP_ENTRY: Final = 20


@dataclass(frozen=True)
class Header:
    """Where a kernel has it, and what it says."""

    offset: int
    flags: int
    addresses: Addresses
    entry: int


def find_header(start: bytes) -> Header | None:
    """The header in a file's first bytes, if there is one."""
    for offset in range(0, min(len(start), HEADER_WITHIN) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", start, offset)
        if magic == MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            rest = start[offset + 12 : offset + 32].ljust(20, b"\0")
            *addresses, entry = struct.unpack("<5I", rest)
            return Header(offset, flags, Addresses(*addresses), entry)
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
    segments: Sequence[Segment]
    if header.flags & HAS_ADDRESSES:
        entry = header.entry
        segments = [flat_segment(source, header.offset, header.addresses)]
    elif source.read(0, min(4, source.size)) == ELF_MAGIC:
        elf = parse_elf(source)
        entry, segments = elf.physical_entry, elf.loads
    else:
        raise source.error(
            "has a Multiboot header without addresses, and is no ELF file",
            mend="link it as ELF, or set bit 16 of the header's flags",
        )
    end = load_image(vm, source, segments, entry)
    modules = load_modules(vm, initrd_files(initrd), end)
    command = " ".join(filter(None, (source.path, cmdline)))
    _write_information(vm, command, modules)
    regs = protected_mode_state(vm, entry)
    regs |= {"rax": BOOT_MAGIC, "rbx": MULTIBOOT_BASE}
    return regs


def _write_information(vm: GuestMemory, command: str, modules: Sequence[Module]) -> None:
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
