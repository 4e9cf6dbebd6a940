"""Guest memory and registers as an ELF core file, which drgn reads.

As QEMU's dump-guest-memory writes it (dump/dump.c): a note of the registers of each vCPU
(NT_PRSTATUS, whose process is the vCPU's number from 1), one with what that has no room for
("QEMU"), the kernel's own note about itself (VMCOREINFO), and a segment for each region of RAM
at its physical address, or for each range that the guest's page tables map; those of the same
memory are the same bytes of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final

from tetrarch.errors import ConfigError
from tetrarch.machine.page_map import MappedRange, TooManyTables, mapped_ranges, table_levels
from tetrarch.machine.ram import CHUNK_BYTES, chunks, runs

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = ["core_ranges", "find_vmcoreinfo", "linear_ranges", "write_core"]

_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER: Final = struct.Struct("<IIQQQQIIQQ")
#: More program headers than e_phnum counts: the first section header's sh_info does (elf(5)).
_PN_XNUM: Final = 0xFFFF
#: A guest may map a page everywhere; 14 MiB of headers.
_LINEAR_MAX: Final = 1 << 18
_NOTE_HEADER: Final = struct.Struct("<III")
_IDENTITY: Final = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_ET_CORE, _EM_X86_64 = 4, 62
_PT_LOAD, _PT_NOTE = 1, 4
_PF_R = 4
_NT_PRSTATUS = 1
#: Where the kernel's note about itself begins, and more than it takes (Linux, kernel/crash_core.c:
#: it is a page of its own).
_VMCOREINFO: Final = b"VMCOREINFO\0"
_PAGE: Final = 4096

#: struct elf_prstatus of x86-64 (linux/elfcore.h): signals, pid, times, registers, fpvalid.
_PRSTATUS: Final = struct.Struct("<32xI76x27QI4x")
#: struct user_regs_struct (asm/user_64.h); orig_rax is of no system call.
_USER_REGISTERS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs_selector", "rflags", "rsp", "ss_selector", "fs_base", "gs_base",
    "ds_selector", "es_selector", "fs_selector", "gs_selector",
)  # fmt: skip
_NO_SYSTEM_CALL: Final = (1 << 64) - 1

#: QEMUCPUState (QEMU, target/i386/arch_dump.c): version, size, registers, segments, CR0 to CR4.
_QEMU_VERSION: Final = 1
_QEMU_HEAD: Final = struct.Struct("<II18Q")
_QEMU_REGISTERS: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
)  # fmt: skip
#: selector, limit, flags, base.
_QEMU_SEGMENT: Final = struct.Struct("<IIIxxxxQ")
_QEMU_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdtr", "idtr")
_QEMU_CONTROL: Final = struct.Struct("<5Q")

Registers = Mapping[str, int]
Ranges = Sequence[tuple[int, int]]


def core_ranges(ram: Ranges, begin: int | None = None, length: int | None = None) -> Ranges:
    """Of the regions of RAM what lies in a range: (address, bytes). Raises ConfigError where
    nothing does."""
    first = 0 if begin is None else begin
    end = (1 << 64) if length is None else first + length
    found = [(max(base, first), min(base + size, end)) for base, size in ram]
    kept = [(start, stop - start) for start, stop in found if start < stop]
    if not kept:
        raise ConfigError(
            f"there is no RAM at {first:#x}", mend="give an address and a length that has some"
        )
    return kept


def linear_ranges(vm: EngineVm, vcpus: Iterable[Registers]) -> list[MappedRange]:
    """What the page tables of the vCPUs map, each root once.

    Raises ConfigError for tables of 32-bit modes, and for more than a file should have.
    """
    roots = {regs["cr3"]: table_levels(regs) for regs in vcpus}
    found: dict[MappedRange, None] = {}
    try:
        for root, levels in roots.items():
            if levels:
                for mapped in mapped_ranges(vm.read_memory, root, levels):
                    found[mapped] = None
                    if len(found) > _LINEAR_MAX:
                        raise TooManyTables
    except TooManyTables:
        raise ConfigError(
            "the guest has too many page tables", mend="dump without paging"
        ) from None
    return list(found)


def write_core(
    file: BinaryIO,
    vm: EngineVm,
    vcpus: Iterable[Registers],
    ranges: Ranges,
    linear: Iterable[MappedRange] = (),
    wrote: Callable[[int], object] = lambda count: None,
) -> None:
    """Of a machine that is held. ``file`` is written from its begin to its end, zeros left out
    where it can be sought; ``wrote`` is called with how many bytes of memory are done."""
    notes = _notes(list(vcpus), find_vmcoreinfo(vm))
    views = [view for mapped in linear for view in _views(mapped, ranges)]
    if not views:
        views = [(0, base, length) for base, length in ranges]
    segments = 1 + len(views)
    sections = int(segments >= _PN_XNUM)
    headers = _ELF_HEADER.size + _PROGRAM_HEADER.size * segments + _SECTION_HEADER.size * sections
    start = -(-(headers + len(notes)) // _PAGE) * _PAGE
    file.write(_elf_header(segments, sections))
    file.write(_PROGRAM_HEADER.pack(_PT_NOTE, 0, headers, 0, 0, len(notes), len(notes), 0))
    for address, physical, size in views:
        at = start + _offset(ranges, physical)
        header = _PROGRAM_HEADER.pack(_PT_LOAD, _PF_R, at, address, physical, size, size, 0)
        file.write(header)
    if sections:
        file.write(_SECTION_HEADER.pack(0, 0, 0, 0, 0, 0, 0, segments, 0, 0))
    file.write(notes)
    _fill(file, start - headers - len(notes))
    for base, length in ranges:
        for address in range(base, base + length, CHUNK_BYTES):
            size = min(CHUNK_BYTES, base + length - address)
            at = address
            for found, data in runs(vm, address, size):
                _fill(file, found - at)
                file.write(data)
                at = found + len(data)
            _fill(file, address + size - at)
            wrote(size)
    if file.seekable():
        file.truncate()


def find_vmcoreinfo(vm: EngineVm) -> bytes:
    """The note that a Linux guest has about itself, from its name on; empty where it has none.

    It lies in a page of its own; whoever else may have put such a page there, its length is
    checked.
    """
    for base, length in vm.ram:
        for address, data in chunks(vm, base, length):
            at = data.find(_VMCOREINFO)
            while at >= 0:
                page = at - _NOTE_HEADER.size
                if page >= 0 and (address + page) % _PAGE == 0:
                    name, size, kind = _NOTE_HEADER.unpack_from(data, page)
                    text = data[page + 24 : page + 24 + size]
                    if (name, kind) == (11, 0) and size <= _PAGE - 24 and b"OSRELEASE=" in text:
                        return _note(_VMCOREINFO, 0, text)
                at = data.find(_VMCOREINFO, at + 1)
    return b""


def _views(mapped: MappedRange, ranges: Ranges) -> Iterator[tuple[int, int, int]]:
    """What of it lies in ranges of RAM: (linear, physical, bytes)."""
    for base, length in ranges:
        first, end = max(mapped.physical, base), min(mapped.physical_end, base + length)
        if first < end:
            yield mapped.linear + first - mapped.physical, first, end - first


def _offset(ranges: Ranges, address: int) -> int:
    """Of an address in the memory that is written."""
    offset = 0
    for base, length in ranges:
        if base <= address < base + length:
            return offset + address - base
        offset += length
    raise AssertionError("no range has the address")


def _elf_header(segments: int, sections: int) -> bytes:
    table = _ELF_HEADER.size + _PROGRAM_HEADER.size * segments if sections else 0
    return _ELF_HEADER.pack(
        _IDENTITY,
        *(_ET_CORE, _EM_X86_64, 1),
        *(0, _ELF_HEADER.size, table),
        *(0, _ELF_HEADER.size, _PROGRAM_HEADER.size, min(segments, _PN_XNUM)),
        *(_SECTION_HEADER.size * sections, sections, 0),
    )


def _notes(vcpus: Sequence[Registers], vmcoreinfo: bytes) -> bytes:
    status = [_prstatus(number, regs) for number, regs in enumerate(vcpus, 1)]
    return b"".join((*status, *map(_qemu_state, vcpus), vmcoreinfo))


def _note(name: bytes, kind: int, body: bytes) -> bytes:
    head = _NOTE_HEADER.pack(len(name), len(body), kind)
    return (
        head + name.ljust(-(-len(name) // 4) * 4, b"\0") + body.ljust(-(-len(body) // 4) * 4, b"\0")
    )


def _prstatus(number: int, regs: Registers) -> bytes:
    values = [regs.get(name, _NO_SYSTEM_CALL) for name in _USER_REGISTERS]
    return _note(b"CORE\0", _NT_PRSTATUS, _PRSTATUS.pack(number, *values, 0))


def _qemu_state(regs: Registers) -> bytes:
    segments = b"".join(
        _QEMU_SEGMENT.pack(
            regs.get(f"{name}_selector", 0),
            regs[f"{name}_limit"],
            # As in the upper half of a descriptor; ours are those of VMX and SVM.
            regs.get(f"{name}_attr", 0) << 8 & 0xFFFF_FFFF,
            regs[f"{name}_base"],
        )
        for name in _QEMU_SEGMENTS
    )
    # There is no CR1.
    control = _QEMU_CONTROL.pack(regs["cr0"], 0, regs["cr2"], regs["cr3"], regs["cr4"])
    size = _QEMU_HEAD.size + len(segments) + len(control)
    head = _QEMU_HEAD.pack(_QEMU_VERSION, size, *(regs[name] for name in _QEMU_REGISTERS))
    return _note(b"QEMU\0", 0, head + segments + control)


def _fill(file: BinaryIO, count: int) -> None:
    """Zeros, as a hole where there can be one."""
    if count and file.seekable():
        file.seek(count, 1)
        return
    while count > 0:
        count -= file.write(bytes(min(count, _PAGE << 4)))
