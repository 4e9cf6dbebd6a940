"""The smallest kernels: an ELF file with a PVH entry around a few bytes of code."""

from __future__ import annotations

import struct

__all__ = ["pvh_kernel"]

LOAD_ADDRESS = 0x10_0000
# xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY.
_PHYS32_ENTRY = 18
_ELF_HEADER_BYTES = 64
_PROGRAM_HEADER_BYTES = 56
_PT_LOAD = 1
_PT_NOTE = 4


def pvh_kernel(code: bytes) -> bytes:
    """An ELF kernel whose ``code`` runs at 1 MiB as the PVH entry leaves the CPU.

    That is 32-bit protected mode, flat segments, paging and interrupts off, EBX
    pointing to the start info; there is no stack.
    """
    note = struct.pack("<III4sI", 4, 4, _PHYS32_ENTRY, b"Xen\0", LOAD_ADDRESS)
    note_at = _ELF_HEADER_BYTES + 2 * _PROGRAM_HEADER_BYTES
    code_at = note_at + len(note)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        LOAD_ADDRESS,
        _ELF_HEADER_BYTES,
        0,
        0,
        _ELF_HEADER_BYTES,
        _PROGRAM_HEADER_BYTES,
        2,
        0,
        0,
        0,
    )
    return (
        header
        + _program_header(_PT_LOAD, code_at, LOAD_ADDRESS, len(code))
        + _program_header(_PT_NOTE, note_at, 0, len(note))
        + note
        + code
    )


def _program_header(kind: int, offset: int, address: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 7, offset, address, address, size, size, 4)
