"""The bare kernel that each check starts in: tables, stacks, and a handler of each vector that
ends the run at once, so that RIP tells the vector and the stack its frame.

All is mapped to itself below 2 MiB; 1 GiB up is the page under test, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache

MIB = 1 << 20
RAM = 8 * MIB

CODE = 0x1000
HANDLERS = 0x2000
OWN_HANDLERS = 0x2800
TSS = 0x3000
IDT = 0x4000
GDT = 0x5000
LDT = 0x6000
KERNEL_STACK = 0x7FF0
STACK = 0x8FF0
IST_STACK = 0x9FF0
DATA = 0xA000
# User code may always use these; CODE, STACK and DATA only where the check begins there.
USER_TEXT = 0xB000
USER_STACK = 0xCFF0
TABLES = 0x10000
# Where a write ends the run; each privilege level may do it, by the TSS.
END_PORT = 0xF4
END = bytes((0xE6, END_PORT))  # out END_PORT, al

# The page under test: linear; its frame, where it has 4 KiB, 2 MiB, 4 MiB or 1 GiB.
PAGE = 0x4000_0000
FRAME = 0x4_0000
FRAMES = {12: FRAME, 21: 0x20_0000, 22: 0x40_0000, 30: 0}

# Selectors. The first code segments are as wide as the handlers: 64 bits in long mode.
KERNEL_CODE, KERNEL_DATA = 0x08, 0x10
KERNEL_CODE32, KERNEL_CODE16 = 0x18, 0x20
USER_CODE, USER_DATA = 0x2B, 0x33
USER_CODE32, USER_CODE16 = 0x3B, 0x43
CODE1, DATA1 = 0x49, 0x51
CODE2, DATA2 = 0x5A, 0x62
TSS_SELECTOR, LDT_SELECTOR = 0x68, 0x78
DATA16 = 0x88
# What a check puts into the GDT.
SPARE = 0x100
GDT_LIMIT = 0x17F
LDT_LIMIT = 0x3F

# Page table entries (Intel SDM 3A, 4.5).
P, W, U, PWT, PCD, A, D, PS, G = (1 << bit for bit in range(9))
NX = 1 << 63

# Control registers (Intel SDM 3A, 2.5), EFER (2.2.1).
PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG = (
    1 << bit for bit in (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31)
)
VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP = (
    1 << bit for bit in range(12)
)
FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE = (1 << bit for bit in (16, 17, 18, 20, 21, 22))
SCE, LME, LMA, NXE = (1 << bit for bit in (0, 8, 10, 11))

# RFLAGS (Intel SDM 1, 3.4.3).
FLAGS = {
    "cf": 0, "pf": 2, "af": 4, "zf": 6, "sf": 7, "tf": 8, "if": 9, "df": 10, "of": 11, "nt": 14,
    "rf": 16, "vm": 17, "ac": 18, "vif": 19, "vip": 20, "id": 21,
}  # fmt: skip
ZF, TF, IF, DF, IOPL3, NT, RF, VM, AC, VIF, VIP, ID = (
    1 << 6, 1 << 8, 1 << 9, 1 << 10, 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20,
    1 << 21,
)  # fmt: skip


class Mode(Enum):
    """How the check's code runs: its width; below long mode, the paging."""

    REAL = "real"
    VM86 = "vm86"
    PROT16 = "prot16"
    PROT32 = "prot32"
    PAGED32 = "paged32"
    PAE = "pae"
    LONG = "long"
    COMPAT32 = "compat32"
    COMPAT16 = "compat16"

    @property
    def bits(self) -> int:
        if self in (Mode.REAL, Mode.VM86, Mode.PROT16, Mode.COMPAT16):
            return 16
        return 64 if self is Mode.LONG else 32

    @property
    def handler_bits(self) -> int:
        return 16 if self is Mode.REAL else 64 if self.long else 32

    @property
    def long(self) -> bool:
        return self in (Mode.LONG, Mode.COMPAT32, Mode.COMPAT16)

    @property
    def slot(self) -> int:
        """Bytes of each value in a handler's frame."""
        if self is Mode.REAL:
            return 2
        return 8 if self.long else 4


def segment(
    *,
    base: int = 0,
    limit: int = 0xFFFFF,
    kind: int = 3,
    dpl: int = 0,
    present: bool = True,
    system: bool = False,
    big: bool = True,
    long: bool = False,
    granular: bool = True,
) -> int:
    """A descriptor of a segment, TSS or LDT (Intel SDM 3A, 3.4.5). ``kind`` is its type: 3 data,
    1 read-only, 7 expand-down, 0xB code, 9 execute-only, 0xF conforming."""
    access = kind | (0 if system else 0x10) | dpl << 5 | present << 7
    flags = long << 1 | big << 2 | granular << 3
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def system_segment(kind: int, base: int, limit: int, **changes: int | bool) -> int:
    """A TSS (1, 3, 9, 0xB) or LDT (2) with a limit in bytes."""
    return segment(
        kind=kind,
        base=base,
        limit=limit,
        system=True,
        big=False,
        granular=False,
        dpl=int(changes.get("dpl", 0)),
        present=bool(changes.get("present", True)),
    )


def gate(
    kind: int,
    offset: int,
    selector: int = KERNEL_CODE,
    *,
    dpl: int = 0,
    present: bool = True,
    low: int = 0,
) -> int:
    """A gate's first eight bytes (Intel SDM 3A, 5.8.3, 6.11): 4, 6, 7 of 16 bits, 0xC call,
    0xE interrupt, 0xF trap, 5 task. ``low``: the IST's number, or how many parameters."""
    access = kind | dpl << 5 | present << 7
    return offset & 0xFFFF | selector << 16 | low << 32 | access << 40 | (offset >> 16) << 48


@dataclass(frozen=True)
class Page:
    """The page under test: rights of its entry, of the entries above it, and its size."""

    rights: int = P | W | A
    above: int = P | W | U | A
    bits: int = 12
    frame: int | None = None


def handler(vector: int) -> int:
    """Where the handler of a vector is."""
    return HANDLERS + 8 * vector


@cache
def handlers() -> bytes:
    """Each is an OUT to the port that ends the run; #DB's first leaves DR6 in RBP."""
    dr6 = bytes.fromhex("0f21f5")  # mov ebp, dr6
    stubs = [(dr6 if vector == 1 else b"") + END + b"\xf4" for vector in range(256)]
    return b"".join(stub.ljust(8, b"\x90") for stub in stubs)


@cache
def gdt(mode: Mode) -> bytes:
    native = {"big": not mode.long, "long": mode.long}
    entries = {
        KERNEL_CODE: segment(kind=0xB, **native),
        KERNEL_DATA: segment(),
        KERNEL_CODE32: segment(kind=0xB),
        KERNEL_CODE16: segment(kind=0xB, big=False, granular=False, limit=0xFFFF),
        USER_CODE: segment(kind=0xB, dpl=3, **native),
        USER_DATA: segment(dpl=3),
        USER_CODE32: segment(kind=0xB, dpl=3),
        USER_CODE16: segment(kind=0xB, dpl=3, big=False, granular=False, limit=0xFFFF),
        CODE1: segment(kind=0xB, dpl=1, **native),
        DATA1: segment(dpl=1),
        CODE2: segment(kind=0xB, dpl=2, **native),
        DATA2: segment(dpl=2),
        TSS_SELECTOR: system_segment(0xB, TSS, TSS_LIMIT),
        LDT_SELECTOR: system_segment(2, LDT, LDT_LIMIT),
        DATA16: segment(big=False, granular=False, limit=0xFFFF),
    }
    table = bytearray(GDT_LIMIT + 1)
    for selector, descriptor in entries.items():
        struct.pack_into("<Q", table, selector & ~7, descriptor)
    return bytes(table)


# Behind the TSS proper: the map of CR4.VME's software interrupts, then that of ports.
REDIRECTION_MAP = 0x68
PORT_MAP = 0x88
TSS_LIMIT = PORT_MAP + END_PORT // 8 + 1


@cache
def tss(mode: Mode) -> bytes:
    table = bytearray(TSS_LIMIT + 1)
    if mode.long:
        struct.pack_into("<3Q", table, 4, KERNEL_STACK, KERNEL_STACK, KERNEL_STACK)
        struct.pack_into("<7Q", table, 0x24, *(7 * [IST_STACK]))
    else:
        stacks = [(KERNEL_STACK, KERNEL_DATA), (KERNEL_STACK, DATA1), (KERNEL_STACK, DATA2)]
        for level, (pointer, selector) in enumerate(stacks):
            struct.pack_into("<II", table, 4 + 8 * level, pointer, selector)
        # What a task switch back loads, and what one from here saves.
        struct.pack_into("<I", table, 0x1C, TABLES)
    struct.pack_into("<H", table, 0x66, PORT_MAP)
    table[PORT_MAP:] = b"\xff" * (len(table) - PORT_MAP)
    table[PORT_MAP + END_PORT // 8] &= ~(1 << END_PORT % 8)
    return bytes(table)


@cache
def _idt(mode: Mode) -> bytes:
    if mode is Mode.REAL:
        return b"".join(struct.pack("<HH", handler(vector), 0) for vector in range(256))
    users = {3, 4, *range(32, 256)}
    size = 16 if mode.long else 8
    gates = (gate(0xE, handler(n), dpl=3 if n in users else 0) for n in range(256))
    return b"".join(struct.pack("<Q", entry).ljust(size, b"\0") for entry in gates)


def idt(mode: Mode, gates: Mapping[int, int]) -> bytes:
    """Interrupt gates, which user code may use but those of exceptions; ``gates`` are a check's
    own. Real mode: the table of addresses."""
    table = bytearray(_idt(mode))
    for vector, entry in gates.items():
        struct.pack_into("<Q", table, vector * (16 if mode.long else 8), entry)
    return bytes(table)


def _low_pages(user: bool) -> list[int]:
    """Entries of the first 2 MiB, each to itself; ``user``: the check runs in ring 3."""
    own = {at >> 12 for at in (CODE, STACK, DATA)} if user else set()
    own |= {at >> 12 for at in (USER_TEXT, USER_STACK)}
    return [at << 12 | P | W | A | D | (U if at in own else 0) for at in range(512)]


@cache
def page_tables(mode: Mode, page: Page | None, *, user: bool) -> dict[int, bytes]:
    """Tables at TABLES: the first 2 MiB to themselves, and the page under test at 1 GiB. Those
    that lead to it are its own."""
    if mode is Mode.PAGED32:
        return _page_tables_32(page, user=user)
    top, pointers, directory, table, directory1, table1 = (TABLES + 0x1000 * n for n in range(6))
    above = page.above if page else 0
    # PDPTEs of PAE paging have no rights (Intel SDM 3A, 4.4.1).
    if mode is Mode.PAE:
        first, second = directory | P, directory1 | above & P
    else:
        first, second = directory | P | W | U | A, directory1 | above
    tables: dict[int, list[int]] = {
        top: [pointers | P | W | U | A],
        pointers: [first, second],
        directory: [table | P | W | U | A],
        table: _low_pages(user),
        directory1: [table1 | above],
        table1: [],
    }
    if mode is Mode.PAE:
        tables[top] = tables.pop(pointers)
    if page:
        frame = FRAMES[page.bits] if page.frame is None else page.frame
        leaf = frame | page.rights | (PS if page.bits > 12 else 0)
        if page.bits == 30:
            tables[pointers][1] = leaf
        else:
            tables[table1 if page.bits == 12 else directory1] = [leaf]
    return {at: struct.pack(f"<{len(t)}Q", *t) for at, t in tables.items()}


def _page_tables_32(page: Page | None, *, user: bool) -> dict[int, bytes]:
    top, table, table1 = (TABLES + 0x1000 * n for n in range(3))
    directory = [0] * 1024
    directory[0] = table | P | W | U | A
    tables = {top: directory, table: _low_pages(user), table1: [0]}
    if page:
        frame = FRAMES[page.bits] if page.frame is None else page.frame
        leaf = frame | page.rights | (PS if page.bits > 12 else 0)
        if page.bits == 12:
            directory[PAGE >> 22], tables[table1] = table1 | page.above, [leaf]
        else:
            directory[PAGE >> 22] = leaf
    return {at: struct.pack(f"<{len(t)}I", *t) for at, t in tables.items()}


def leaf_address(mode: Mode, page: Page) -> tuple[int, int]:
    """Where the entry of the page under test is, and its bytes."""
    if mode is Mode.PAGED32:
        return (TABLES + 0x2000 if page.bits == 12 else TABLES + (PAGE >> 22) * 4), 4
    if page.bits == 12:
        return TABLES + 0x5000, 8
    return (TABLES + 0x4000 if page.bits == 21 else TABLES + 0x1000 + 8), 8
