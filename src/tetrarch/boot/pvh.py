"""The PVH boot protocol for an ELF vmlinux (Xen's docs/misc/pvh.pandoc, start_info.h)."""

import os
import struct
from itertools import pairwise
from typing import Final

from tetrarch.boot.cmdline import LINUX_LIMIT, write_cmdline
from tetrarch.boot.cpustate import protected_mode_state
from tetrarch.boot.e820 import memory_map, pack_pvh
from tetrarch.boot.elf import Elf, parse_elf
from tetrarch.boot.initrd_memory import load_initrd, too_little_memory
from tetrarch.boot.layout import (
    HIGH_MEMORY,
    LOW_RAM_MAX,
    START_INFO_BASE,
    GuestMemory,
    low_ram_top,
)
from tetrarch.boot.source import Source, copy_to_guest, zero_guest

__all__ = ["load_pvh", "pvh_entry"]

XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
START_INFO_MAGIC: Final = 0x336E_C578
START_INFO: Final = struct.Struct("<IIIIQQQQII")
MODULE: Final = struct.Struct("<QQQQ")
MODULES_BASE: Final = START_INFO_BASE + 0x40
MEMMAP_BASE: Final = START_INFO_BASE + 0x80
#: Up to the zero page's place.
MEMMAP_MAX: Final = (0x1000 - 0x80) // 24


def pvh_entry(elf: Elf) -> int | None:
    """The 32-bit physical entry point, or None if the file has no such note."""
    entry = elf.find_note(b"Xen", XEN_ELFNOTE_PHYS32_ENTRY)
    if entry is not None and len(entry) not in (4, 8):
        raise elf.source.error(
            "has a PVH note of the wrong size", mend="get the file again, it is damaged"
        )
    return None if entry is None else int.from_bytes(entry, "little")


def load_pvh(
    vm: GuestMemory,
    source: Source,
    initrd: str | os.PathLike[str] | None,
    cmdline: str,
    acpi_rsdp: int,
) -> dict[str, int]:
    elf = parse_elf(source)
    entry = pvh_entry(elf)
    if entry is None:
        raise source.error(
            "is an ELF file without a PVH entry",
            mend="use the bzImage (vmlinuz), or a vmlinux built with CONFIG_PVH",
        )
    loads = elf.loads
    if not any(s.physical <= entry < s.physical + s.memory_size for s in loads):
        raise source.error(
            f"has its entry {entry:#x} outside of what it loads",
            mend="get the file again, it is damaged",
        )
    # Each byte of memory is written once at most, however many segments a hostile file has.
    ordered = sorted(loads, key=lambda s: s.physical)
    for lower, upper in pairwise(ordered):
        if upper.physical < lower.physical + lower.memory_size:
            raise source.error(
                "has segments that overlap in memory", mend="get the file again, it is damaged"
            )
    start = min(s.physical for s in loads)
    end = max(s.physical + s.memory_size for s in loads)
    if start < HIGH_MEMORY or end > LOW_RAM_MAX:
        raise source.error(
            f"asks to lie at {start:#x}-{end:#x}",
            mend=f"link it to lie in {HIGH_MEMORY:#x}-{LOW_RAM_MAX:#x}, where a PC has RAM",
        )
    top = low_ram_top(vm)
    if end > top:
        raise too_little_memory(vm, source, end, initrd)
    cmdline_address = write_cmdline(vm, cmdline, LINUX_LIMIT)
    initrd_address, initrd_size = load_initrd(vm, initrd, end, top)
    for segment in loads:
        copy_to_guest(vm, segment.physical, source, segment.offset, segment.file_size)
        bss = segment.memory_size - segment.file_size
        zero_guest(vm, segment.physical + segment.file_size, bss)

    modules = 1 if initrd is not None else 0
    if modules:
        vm.write_memory(MODULES_BASE, MODULE.pack(initrd_address, initrd_size, 0, 0))
    entries = memory_map(vm.ram)[:MEMMAP_MAX]
    vm.write_memory(MEMMAP_BASE, pack_pvh(entries))
    start_info = START_INFO.pack(
        START_INFO_MAGIC,
        1,
        0,
        modules,
        MODULES_BASE if modules else 0,
        cmdline_address,
        acpi_rsdp,
        MEMMAP_BASE,
        len(entries),
        0,
    )
    vm.write_memory(START_INFO_BASE, start_info)

    regs = protected_mode_state(vm, entry)
    regs["rbx"] = START_INFO_BASE
    return regs
