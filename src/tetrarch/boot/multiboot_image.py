"""What both versions of Multiboot have in common: a kernel's place in memory, and its modules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from tetrarch.boot.elf import PT_LOAD, Segment
from tetrarch.boot.initrd import InitrdFile
from tetrarch.boot.initrd_memory import too_little_memory
from tetrarch.boot.layout import (
    EBDA_BASE,
    HIGH_MEMORY,
    LOW_RAM_MAX,
    PAGE_SIZE,
    GuestMemory,
    align_up,
    low_ram_top,
)
from tetrarch.boot.source import Source, copy_to_guest, zero_guest
from tetrarch.errors import BootError

__all__ = [
    "LOADER_NAME",
    "Addresses",
    "Module",
    "flat_segment",
    "lies",
    "load_image",
    "load_modules",
]

#: Of the data that a BIOS keeps at 0x400.
BDA_EBDA_SEGMENT, BDA_MEMORY_KIB = 0x40E, 0x413
LOADER_NAME = b"Tetrarch\0"


@dataclass(frozen=True)
class Addresses:
    """Where a header says that a flat kernel lies; an end of 0 is that of the file, or none."""

    header: int
    load: int
    load_end: int
    bss_end: int


def flat_segment(source: Source, offset: int, at: Addresses) -> Segment:
    """Of a file whose header is at ``offset``. Raises BootError for addresses that cannot be."""
    start = offset - (at.header - at.load)
    if at.load > at.header or start < 0:
        raise lies(source, f"it lies at {at.header:#x} itself, and the kernel from {at.load:#x} on")
    load_end = at.load_end or at.load + source.size - start
    size = load_end - at.load
    if size <= 0 or start + size > source.size:
        raise lies(
            source,
            f"the kernel lies at {at.load:#x}-{load_end:#x}, of which the file has "
            f"{source.size - start} bytes",
        )
    bss_end = at.bss_end or load_end
    if bss_end < load_end:
        raise lies(source, f"its bss ends at {bss_end:#x}, before what is loaded does")
    return Segment(PT_LOAD, start, at.load, at.load, size, bss_end - at.load, PAGE_SIZE)


def lies(source: Source, cause: str) -> BootError:
    return source.error(
        f"has a Multiboot header with impossible addresses: {cause}",
        mend="get the file again, or link it anew",
    )


def load_image(vm: GuestMemory, source: Source, segments: Sequence[Segment], entry: int) -> int:
    """Copies it to memory; where it ends. Raises BootError."""
    if not any(s.physical <= entry < s.physical + s.memory_size for s in segments):
        raise lies(source, f"its entry {entry:#x} is outside of what is loaded")
    ordered = sorted(segments, key=lambda s: s.physical)
    for lower, upper in pairwise(ordered):
        if upper.physical < lower.physical + lower.memory_size:
            raise lies(source, "its segments overlap in memory")
    if ordered[0].physical < HIGH_MEMORY:
        raise lies(source, f"it lies at {ordered[0].physical:#x}; free RAM begins at 1 MiB")
    end = ordered[-1].physical + ordered[-1].memory_size
    if end > LOW_RAM_MAX:
        raise lies(source, f"it ends at {end:#x}; a PC has RAM up to {LOW_RAM_MAX:#x}")
    if end > low_ram_top(vm):
        raise too_little_memory(vm, source, end, None)
    for segment in segments:
        copy_to_guest(vm, segment.physical, source, segment.offset, segment.file_size)
        bss = segment.memory_size - segment.file_size
        zero_guest(vm, segment.physical + segment.file_size, bss)
    _write_bios_data(vm)
    return end


def _write_bios_data(vm: GuestMemory) -> None:
    """Where conventional memory ends: Xen puts its start of further CPUs below the smaller one."""
    vm.write_memory(BDA_EBDA_SEGMENT, (EBDA_BASE >> 4).to_bytes(2, "little"))
    vm.write_memory(BDA_MEMORY_KIB, (EBDA_BASE >> 10).to_bytes(2, "little"))


@dataclass(frozen=True)
class Module:
    start: int
    end: int
    words: str


def load_modules(vm: GuestMemory, files: Sequence[InitrdFile], kernel_end: int) -> list[Module]:
    """Behind the kernel, each on a page. Raises BootError."""
    modules = []
    at, top = align_up(kernel_end, PAGE_SIZE), low_ram_top(vm)
    with ExitStack() as stack:
        for file in files:
            module = stack.enter_context(Source.open(file.path, "module"))
            if at + module.size > top:
                raise module.error(
                    "does not fit into memory behind the kernel", mend="give the machine more"
                )
            copy_to_guest(vm, at, module, 0, module.size)
            words = " ".join(filter(None, (str(file.path), file.arguments)))
            modules.append(Module(at, at + module.size, words))
            at = align_up(at + module.size, PAGE_SIZE)
    return modules
