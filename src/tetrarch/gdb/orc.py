"""Linux's tables for unwinding its own stack, as the call frame information that gdb reads.

A kernel without frame pointers has ORC tables in their place (Linux, Documentation/x86/
orc-unwinder.rst; asm/orc_types.h): for each stretch of code, where the caller's stack pointer,
RBP and return address are. DWARF's .debug_frame says the same (DWARF 4, 6.4; System V ABI for
AMD64, table 3.36, for the numbers of registers).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["debug_frame"]

_IP = struct.Struct("<i")
_ENTRY = struct.Struct("<hhH")
# ORC_REG_*: the bases of the caller's stack pointer, by DWARF's number.
_UNDEFINED, _PREV_SP, _BP = 0, 1, 4
_BP_INDIRECT, _SP_INDIRECT = 8, 9
_BASES = {2: 1, 3: 5, 4: 6, 5: 7, 6: 10, 7: 13}
_RBP, _RSP, _RIP = 6, 7, 16
# Where registers lie in struct pt_regs (asm/ptrace.h), by DWARF's number.
_PT_REGS = {
    15: 0,
    14: 8,
    13: 16,
    12: 24,
    6: 32,
    3: 40,
    11: 48,
    10: 56,
    9: 64,
    8: 72,
    0: 80,
    2: 88,
    1: 96,
    4: 104,
    5: 112,
    16: 128,
    7: 152,
}
# Its last part, which the CPU pushes.
_IRET_FRAME = {16: 0, 7: 24}

_CFA_ADVANCE = 0x40
_CFA_ADVANCE_1, _CFA_ADVANCE_2, _CFA_ADVANCE_4 = 0x02, 0x03, 0x04
_CFA_UNDEFINED, _CFA_SAME_VALUE = 0x07, 0x08
_CFA_DEF, _CFA_DEF_EXPRESSION, _CFA_EXPRESSION = 0x0C, 0x0F, 0x10
_CFA_OFFSET_SF, _CFA_DEF_SF = 0x11, 0x12
_OP_DEREF, _OP_PLUS, _OP_CONSTS, _OP_BREG = 0x06, 0x22, 0x11, 0x70
_DATA_ALIGNMENT = -8
# Rows of a frame description: gdb executes them from its first.
_ROWS_MAX = 32


class _Entry(NamedTuple):
    address: int
    sp_offset: int
    bp_offset: int
    bits: int
    """sp_reg, bp_reg and the type, from bit 0 on."""


def debug_frame(orc_ip: bytes, orc: bytes, ip_address: int, slide: int) -> bytes:
    """The section, of .orc_unwind_ip and .orc_unwind, the first of which is at ``ip_address``.

    ``slide`` is how far the kernel lies behind where it was linked for.
    """
    entries = _entries(orc_ip, orc, ip_address + slide)
    call = _type_of_calls(entries)
    section = bytearray(_common())
    for rows, end in _stretches(entries, call):
        section += _description(rows, end, call)
    return bytes(section)


def _entries(orc_ip: bytes, orc: bytes, address: int) -> list[_Entry]:
    """In the order of addresses; of several with one address that counts which is no filler."""
    found = {}
    for at, ((distance,), entry) in enumerate(
        zip(_IP.iter_unpack(orc_ip), _ENTRY.iter_unpack(orc), strict=False)
    ):
        place = address + at * _IP.size + distance
        if place not in found or entry[2] & 15 != _UNDEFINED:
            found[place] = _Entry(place, *entry)
    return [found[place] for place in sorted(found)]


def _type_of_calls(entries: Sequence[_Entry]) -> int:
    """The number of that type, which most entries have: 0 at first, 2 since Linux 6.4, where the
    type has a third bit. The two for pt_regs follow it."""
    types = Counter(entry.bits >> 8 & 3 for entry in entries)
    return types.most_common(1)[0][0] if types else 0


def _type(entry: _Entry, call: int) -> int:
    """0: a call, 1: pt_regs, 2: their last part, -1: nothing is known, or the stack ends."""
    if entry.bits & 15 == _UNDEFINED:
        return -1
    return (entry.bits >> 8 & (7 if call == 2 else 3)) - call


def _stretches(entries: Sequence[_Entry], call: int) -> Iterator[tuple[list[_Entry], int]]:
    """Neighbours of one type, with where they end."""
    rows: list[_Entry] = []
    for entry in entries:
        if rows and (len(rows) == _ROWS_MAX or _type(entry, call) != _type(rows[0], call)):
            yield rows, entry.address
            rows = []
        rows.append(entry)
    # How far the last reaches is unknown; Linux ends its tables with a filler.
    if len(rows) > 1:
        yield rows[:-1], rows[-1].address


def _common() -> bytes:
    """A common information entry without rules."""
    body = struct.pack("<IB", 0xFFFF_FFFF, 1) + b"\0" + _uleb(1) + _sleb(_DATA_ALIGNMENT)
    return _sized(body + bytes((_RIP,)))


def _description(rows: Sequence[_Entry], end: int, call: int) -> bytes:
    start = rows[0].address
    kind = _type(rows[0], call)
    body = bytearray(struct.pack("<IQQ", 0, start, end - start))
    body += _fixed_rules(kind)
    at = start
    for row in rows:
        body += _advance(row.address - at) + _row(kind, row)
        at = row.address
    return _sized(bytes(body))


def _sized(body: bytes) -> bytes:
    """Filled up with DW_CFA_nop, and its length before it."""
    body += bytes(-(len(body) + 4) % 8)
    return struct.pack("<I", len(body)) + body


def _fixed_rules(kind: int) -> bytes:
    if kind < 0:
        return bytes((_CFA_UNDEFINED, _RIP))
    saved = {0: {_RIP: -8}, 1: _PT_REGS, 2: _IRET_FRAME}.get(kind, {})
    return b"".join(_at_cfa(register, offset) for register, offset in saved.items())


def _row(kind: int, row: _Entry) -> bytes:
    if kind < 0:
        return _cfa(_RSP, 8)
    sp_base, bp_base = row.bits & 15, row.bits >> 4 & 15
    if sp_base == _SP_INDIRECT:
        offset = bytes((_OP_CONSTS,)) + _sleb(row.sp_offset) + bytes((_OP_PLUS,))
        rule = _cfa_of(_register(_RSP, 0) + bytes((_OP_DEREF,)) + offset)
    elif sp_base == _BP_INDIRECT:
        rule = _cfa_of(_register(_RBP, row.sp_offset) + bytes((_OP_DEREF,)))
    else:
        # Only offsets from the stack's own registers count (arch/x86/kernel/unwind_orc.c).
        base = _BASES.get(sp_base, _RSP)
        rule = _cfa(base, row.sp_offset if base in (_RSP, _RBP) else 0)
    if kind == 1:
        return rule
    if bp_base == _PREV_SP:
        return rule + _at_cfa(_RBP, row.bp_offset)
    if bp_base == _BP:
        place = _register(_RBP, row.bp_offset)
        return rule + bytes((_CFA_EXPRESSION, _RBP)) + _uleb(len(place)) + place
    return rule + bytes((_CFA_SAME_VALUE, _RBP))


def _cfa(register: int, offset: int) -> bytes:
    if offset >= 0:
        return bytes((_CFA_DEF, register)) + _uleb(offset)
    return bytes((_CFA_DEF_SF, register)) + _sleb(offset // _DATA_ALIGNMENT)


def _cfa_of(expression: bytes) -> bytes:
    return bytes((_CFA_DEF_EXPRESSION,)) + _uleb(len(expression)) + expression


def _register(register: int, offset: int) -> bytes:
    return bytes((_OP_BREG + register,)) + _sleb(offset)


def _at_cfa(register: int, offset: int) -> bytes:
    return bytes((_CFA_OFFSET_SF, register)) + _sleb(offset // _DATA_ALIGNMENT)


def _advance(distance: int) -> bytes:
    if distance == 0:
        return b""
    if distance < 0x40:
        return bytes((_CFA_ADVANCE | distance,))
    if distance < 0x100:
        return bytes((_CFA_ADVANCE_1, distance))
    if distance < 0x1_0000:
        return struct.pack("<BH", _CFA_ADVANCE_2, distance)
    return struct.pack("<BI", _CFA_ADVANCE_4, distance)


def _uleb(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _sleb(value: int) -> bytes:
    encoded = bytearray()
    while not -0x40 <= value < 0x40:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value & 0x7F)
    return bytes(encoded)
