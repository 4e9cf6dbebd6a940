"""Paging: who may do what, who sets A and D, error codes, and stale entries
(Intel SDM 3A, 4.3 to 4.10; AMD APM 2, 5.2 to 5.6)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import (
    PF,
    AnyOf,
    Check,
    Engine,
    Expected,
    any_of,
    by_vendor,
    done,
    each,
    fault,
    gp,
    pf,
    run,
    ss,
    ud,
)
from tests.bare.kernel import (
    AC,
    CODE,
    DATA,
    END,
    FRAME,
    NX,
    NXE,
    PAGE,
    PGE,
    PS,
    PSE,
    SMAP,
    SMEP,
    TABLES,
    WP,
    A,
    D,
    G,
    Mode,
    P,
    Page,
    U,
    W,
    gdt,
    leaf_address,
    segment,
)

# The error code (SDM 3A, 4.7): beside P, W and U of the entry's places.
RSVD, FETCH = 8, 16

READ, WRITE, JUMP = "mov al, [PAGE]", "mov [PAGE], al", "mov eax, PAGE; jmp rax"
JUMP32 = "mov eax, PAGE; jmp eax"


def accessing(access: str, mode: Mode) -> str:
    if access == "fetch":
        return JUMP if mode is Mode.LONG else JUMP32
    return READ if access == "reads" else WRITE


# 4.6.1, in the order of its lists: who accesses how, the page's rights beside P, what is on,
# and the error code; None: it is allowed.
RIGHTS: list[tuple[int, str, int, str, int | None]] = [
    (0, "reads", 0, "", None),
    (0, "reads", U, "", None),
    (0, "reads", U, "smep", None),
    (0, "reads", NX, "", None),
    (0, "writes", 0, "", P | W),
    (0, "writes", W, "", None),
    (0, "writes", U, "", P | W),
    (0, "writes", U | W, "", None),
    (0, "writes", 0, "no wp", None),
    (0, "writes", U, "no wp", None),
    (0, "writes", W | NX, "", None),
    (0, "fetch", 0, "", None),
    (0, "fetch", U, "", None),
    (0, "fetch", U, "smep", P | FETCH),
    (0, "fetch", U | NX, "smep", P | FETCH),
    (0, "fetch", 0, "smep", None),
    (0, "fetch", NX, "", P | FETCH),
    (0, "fetch", NX, "no wp", P | FETCH),
    (3, "reads", 0, "", P | U),
    (3, "reads", W, "", P | U),
    (3, "reads", U, "", None),
    (3, "reads", U | NX, "", None),
    (3, "reads", 0, "no wp", P | U),
    (3, "writes", 0, "", P | W | U),
    (3, "writes", W, "", P | W | U),
    (3, "writes", U, "", P | W | U),
    (3, "writes", U, "no wp", P | W | U),
    (3, "writes", U | W, "", None),
    (3, "fetch", 0, "", P | U | FETCH),
    (3, "fetch", U, "", None),
    (3, "fetch", U, "smep", None),
    (3, "fetch", U | NX, "", P | U | FETCH),
    (3, "fetch", NX, "", P | U | FETCH),
    (3, "fetch", 0, "smep", P | U | FETCH),
]

ON = {"": {}, "smep": {"cr4": (SMEP, 0)}, "no wp": {"cr0": (0, WP)}}
NAMES = ((U, "U"), (W, "W"), (NX, "NX"))


def rights_check(
    mode: Mode, ring: int, access: str, rights: int, on: str, error: int | None
) -> Check:
    if error is not None and mode is Mode.PAGED32 and on != "smep":
        error &= ~FETCH  # no NX, no SMEP: fetches are told as reads
    names = " ".join(name for bit, name in NAMES if rights & bit) or "no"
    expect: Expected
    if access == "fetch":
        expect = done(at=PAGE) if error is None else pf(error, at=PAGE)
    else:
        expect = done() if error is None else pf(error)
    return Check(
        f"{mode.value}: ring {ring} {access}, {names} rights{on and ', ' + on}",
        accessing(access, mode),
        expect,
        mode,
        ring,
        change=ON[on],
        page=Page(P | A | D | rights),
        memory={FRAME: END},
        needs=("smep",) if on == "smep" else (),
    )


RIGHTS_CHECKS = [
    rights_check(mode, *row)
    for mode in (Mode.LONG, Mode.PAE, Mode.PAGED32)
    for row in RIGHTS
    if mode is not Mode.PAGED32 or not row[2] & NX
]


@each(RIGHTS_CHECKS)
def test_rights(engine: Engine, check: Check) -> None:
    run(engine, check)


def above(name: str, code: str, error: int, page: Page, ring: int = 3) -> Check:
    """A right that a table above takes away (SDM 3A, 4.6)."""
    at = PAGE if code == JUMP else None
    return Check(name, code, pf(error, at=at), Mode.LONG, ring, page=page)


ALL = P | W | U | A
NO_PAGE = Page(0)
ABOVE_CHECKS = [
    above("a table without U forbids user reads", READ, P | U, Page(ALL, above=ALL & ~U)),
    above("a table without W forbids user writes", WRITE, P | W | U, Page(ALL, above=ALL & ~W)),
    above("a table without W forbids kernel writes", WRITE, P | W, Page(ALL, above=ALL & ~W), 0),
    above("a table with NX forbids fetches", JUMP, P | U | FETCH, Page(ALL, above=ALL | NX)),
    above("a table that is absent: read", READ, U, Page(ALL, above=ALL & ~P)),
    above("a table that is absent: write", WRITE, W | U, Page(ALL, above=ALL & ~P)),
    above("a page that is absent: read", READ, U, NO_PAGE),
    above("a page that is absent: write", WRITE, W | U, NO_PAGE),
    above("a page that is absent: fetch", JUMP, U | FETCH, NO_PAGE),
    above("a page that is absent: kernel read", READ, 0, NO_PAGE, 0),
    above("a page that is absent: kernel write", WRITE, W, NO_PAGE, 0),
    above("a page that is absent: kernel fetch", JUMP, FETCH, NO_PAGE, 0),
    Check(
        "a page of the second of two: the address is its first byte",
        "mov rax, [PAGE + 0xFFC]",
        pf(0, PAGE + 0x1000),
        page=Page(ALL),
    ),
    Check(
        "a page of the first of two: the address is the operand's",
        "mov rax, [PAGE - 4]",
        pf(0, PAGE - 4),
        page=Page(ALL),
    ),
    Check(
        "a write to two pages writes nothing where it faults",
        "mov rax, -1; mov [PAGE + 0xFFC], rax",
        pf(W, PAGE + 0x1000, last=0),
        page=Page(ALL),
        read={"last": (FRAME + 0xFFC, 4)},
    ),
    Check(
        "user code's descriptor reads are the supervisor's",
        "mov ds, [DATA]",
        pf(0, PAGE + 0x1000),
        ring=3,
        page=Page(P | A),
        regs={"gdtr_base": PAGE + 0x1000 - 0x100},
        memory={DATA: b"\x03\x01", FRAME + 0xF00: gdt(Mode.LONG)[:0x100]},
    ),
    Check(
        "32-bit paging with NXE knows no fetches",
        JUMP32,
        pf(P | U, at=PAGE),
        Mode.PAGED32,
        3,
        page=Page(P | A),
        change={"efer": (NXE, 0)},
    ),
    Check(
        "PAE paging without NXE knows no fetches",
        JUMP32,
        pf(P | U, at=PAGE),
        Mode.PAE,
        3,
        page=Page(P | A),
        change={"efer": (0, NXE)},
    ),
    Check(
        "an address that is not canonical",
        "mov rdi, 0x800000000000; mov al, [rdi]",
        gp(),
    ),
    Check(
        "an address that is not canonical, through the stack",
        "mov rbp, 0x800000000000; mov al, [rbp]",
        ss(),
    ),
    Check(
        "a jump to an address that is not canonical",
        "mov rax, 0x800000000000; jmp rax",
        # AMD's CPUs fault at the target (APM 3, "JMP (Near)").
        any_of(gp(), gp(at=0x8000_0000_0000)),
    ),
    Check(
        "an operand that runs over the end of canonical addresses",
        "mov rdi, 0x7FFFFFFFFFFC; mov rax, [rdi]",
        gp(),
    ),
]


# Sizes: bits of the offset, and an offset into it within RAM.
SIZES = [
    (Mode.LONG, 21),
    (Mode.LONG, 30),
    (Mode.PAE, 21),
    (Mode.PAGED32, 22),
]


def size_checks(mode: Mode, bits: int) -> list[Check]:
    name = {21: "2 MiB", 22: "4 MiB", 30: "1 GiB"}[bits]
    needs = ("gib_pages",) if bits == 30 else ()
    base = {21: 0x20_0000, 22: 0x40_0000, 30: 0}[bits]
    offset = 0x12_3450
    # Bits of the frame below the page's size (bit 12 is PAT), and of PSE-36 beyond 40 bits' width.
    reserved = {21: 1 << 20, 22: 1 << 21, 30: 1 << 29}[bits]
    page = Page(P | W | U, bits=bits)
    leaf = leaf_address(mode, page)

    def check(what: str, code: str, expect: Expected, ring: int, page: Page) -> Check:
        return Check(
            f"{mode.value}: {name}, {what}",
            code,
            expect,
            mode,
            ring,
            page=page,
            needs=needs,
            memory={base + offset: b"\x5a"},
            read={"leaf": leaf, "byte": (base + offset, 1)},
        )

    read, write = f"mov al, [PAGE + {offset}]", f"mov byte ptr [PAGE + {offset}], 7"
    entry = base | PS | P | W | U
    at = PAGE + offset
    return [
        check("reads and sets A", read, done(rax=0x5A, leaf=entry | A), 3, page),
        check("writes and sets A and D", write, done(byte=7, leaf=entry | A | D), 3, page),
        check("a kernel's page", read, pf(P | U, at, leaf=entry & ~U), 3, Page(P | W, bits=bits)),
        check("read-only", write, pf(P | W | U, at, byte=0x5A), 3, Page(P | U | A, bits=bits)),
        check(
            "a reserved bit of its frame",
            read,
            pf(P | U | RSVD, at),
            3,
            Page(P | W | U | A, bits=bits, frame=base | reserved),
        ),
        check(
            "PAT is no reserved bit",
            read,
            done(rax=0x5A),
            3,
            Page(P | W | U | A, bits=bits, frame=base | 1 << 12),
        ),
    ]


SIZE_CHECKS = [check for mode, bits in SIZES for check in size_checks(mode, bits)]


def accessed(name: str, mode: Mode, ring: int, code: str, rights: int, bits: int) -> Check:
    """What an access leaves in the entry of a page that it has not used before (4.8)."""
    page = Page(rights)
    at = PAGE if code.startswith("mov eax") else None
    expect: Expected = done(at, leaf=FRAME | rights | bits)
    return Check(
        f"{mode.value}: {name}",
        code,
        expect,
        mode,
        ring,
        page=page,
        read={"leaf": leaf_address(mode, page)},
        memory={FRAME: END},
    )


ACCESSED_CHECKS = [
    check
    for mode in (Mode.LONG, Mode.PAE, Mode.PAGED32)
    for check in (
        accessed("a user's read sets A", mode, 3, READ, P | W | U, A),
        accessed("a user's write sets A and D", mode, 3, WRITE, P | W | U, A | D),
        accessed("a write behind a read sets D", mode, 3, f"{READ}; {WRITE}", P | W | U, A | D),
        accessed("a kernel's read sets A", mode, 0, READ, P | U, A),
        accessed("a kernel's write sets A and D", mode, 0, WRITE, P | W, A | D),
        accessed("a fetch sets A", mode, 3, JUMP if mode is Mode.LONG else JUMP32, P | W | U, A),
        accessed("a read leaves D", mode, 0, READ, P | W | D, A),
        accessed("a locked compare writes", mode, 0, "lock cmpxchg [PAGE], ecx", P | W, A | D),
    )
]
ACCESSED_CHECKS += [
    Check(
        "a write that faults leaves D",
        WRITE,
        pf(P | W | U, leaf=FRAME | P | U | A),
        ring=3,
        page=Page(P | U | A),
        read={"leaf": leaf_address(Mode.LONG, NO_PAGE)},
    ),
    Check(
        "a kernel's write without WP sets D of a read-only page",
        WRITE,
        done(leaf=FRAME | P | A | D),
        change={"cr0": (0, WP)},
        page=Page(P),
        read={"leaf": leaf_address(Mode.LONG, NO_PAGE)},
    ),
    Check(
        "the tables above get A and no D",
        WRITE,
        done(directory=TABLES + 0x5000 | P | W | A, pointers=TABLES + 0x4000 | P | W | A),
        page=Page(P | W, above=P | W),
        read={"directory": (TABLES + 0x4000, 8), "pointers": (TABLES + 0x1008, 8)},
    ),
    Check(
        "32-bit paging: the table above gets A and no D",
        WRITE,
        done(directory=TABLES + 0x2000 | P | W | A),
        Mode.PAGED32,
        page=Page(P | W, above=P | W),
        read={"directory": (TABLES + (PAGE >> 22) * 4, 4)},
    ),
    Check(
        "a descriptor's load sets A of its page alone",
        "mov ds, ecx",
        done(leaf=FRAME | P | W | A, ds_selector=8),
        page=Page(P | W),
        regs={"gdtr_base": PAGE, "rcx": 8},
        memory={FRAME + 8: (0x00CF_9300_0000_FFFF).to_bytes(8, "little")},
        read={"leaf": leaf_address(Mode.LONG, NO_PAGE)},
    ),
    Check(
        "a descriptor's accessed bit sets D of its page",
        "mov ds, ecx",
        done(leaf=FRAME | P | W | A | D, rights=0x93),
        page=Page(P | W),
        regs={"gdtr_base": PAGE, "rcx": 8},
        memory={FRAME + 8: (0x00CF_9200_0000_FFFF).to_bytes(8, "little")},
        read={"leaf": leaf_address(Mode.LONG, NO_PAGE), "rights": (FRAME + 13, 1)},
    ),
    Check(
        "a descriptor's accessed bit is the supervisor's write",
        "mov ds, ecx",
        # Which byte of the descriptor CR2 names, the manuals leave open.
        fault(PF, P | W),
        ring=3,
        page=Page(P | U | A),
        regs={"gdtr_base": PAGE, "rcx": 0x103},
        memory={FRAME: gdt(Mode.LONG)[:0x100] + struct.pack("<Q", segment(kind=2, dpl=3))},
    ),
]


def reserved(name: str, page: Page, **changes: tuple[int, int]) -> Check:
    """4.7: P and RSVD, whatever else forbids the access."""
    return Check(name, READ, pf(P | RSVD | U), ring=3, page=page, change=changes)


RESERVED_CHECKS = [
    reserved("bit 51 of a page's entry", Page(ALL | 1 << 51)),
    reserved("bit 51 of a table's entry", Page(ALL, above=ALL | 1 << 51)),
    reserved("NX of a page's entry without NXE", Page(ALL | NX), efer=(0, NXE)),
    reserved("NX of a table's entry without NXE", Page(ALL, above=ALL | NX), efer=(0, NXE)),
    reserved("bit 51 of a page that is the kernel's", Page(P | W | A | 1 << 51)),
    Check("an absent page has no reserved bits", READ, pf(U), ring=3, page=Page(1 << 51 | U | W)),
    Check(
        "PAE paging: bit 62 of a page's entry",
        READ,
        pf(P | RSVD),
        Mode.PAE,
        page=Page(ALL | 1 << 62),
    ),
    Check(
        "PS of a PML4 entry",
        "mov rdi, 0x8000000000; mov al, [rdi]",
        pf(P | RSVD, 0x80_0000_0000),
        memory={TABLES + 8: (TABLES | PS | P | W | A).to_bytes(8, "little")},
    ),
    Check(
        "32-bit paging without PSE: PS leads to a table",
        READ,
        done(rax=0x5A),
        Mode.PAGED32,
        change={"cr4": (0, PSE)},
        page=Page(ALL, above=ALL | PS),
        memory={FRAME: b"\x5a"},
    ),
    Check(
        "PAE paging: a reserved bit of an entry of the top is met at the load of CR3",
        "mov eax, cr3; > mov cr3, eax; mov al, [PAGE]",
        # AMD's CPUs may read that entry at each access (APM 2, 15.25.10).
        by_vendor(intel=gp(), amd=any_of(gp(), pf(P | RSVD, at=CODE + 6))),
        Mode.PAE,
        memory={TABLES + 8: (TABLES + 0x4000 | P | W).to_bytes(8, "little")},
    ),
    Check(
        "PAE paging: as CR4 changes, too",
        "mov eax, cr4; xor eax, PGE; > mov cr4, eax; mov al, [PAGE]",
        by_vendor(intel=gp(), amd=any_of(gp(), pf(P | RSVD, at=CODE + 11))),
        Mode.PAE,
        memory={TABLES + 8: (TABLES + 0x4000 | P | W).to_bytes(8, "little")},
    ),
    Check(
        "PAE paging: an absent entry of the top has no reserved bits",
        "mov eax, cr3; mov cr3, eax; > mov al, [PAGE]",
        pf(0),
        Mode.PAE,
        memory={TABLES + 8: (W | U | 0x1E0).to_bytes(8, "little")},
    ),
]

# Two frames; the code reads the first one, changes the entry to the second, flushes, reads.
STALE = "mov al, [PAGE]; mov [TABLES + 0x5000], rsi; {}; mov bl, [PAGE]"
STALE32 = "mov al, [PAGE]; mov [TABLES + {}], esi; {}; mov bl, [PAGE]"
RELOAD_CR3 = "mov rcx, cr3; mov cr3, rcx"
TOGGLE_PGE = "mov rcx, cr4; btr ecx, 7; mov cr4, rcx; bts ecx, 7; mov cr4, rcx"


def stale(name: str, flush: str, bit: int, seen: tuple[int, ...], **more: Any) -> Check:
    entry = P | W | A | D | bit
    return Check(
        name,
        STALE.format(flush),
        AnyOf(tuple(done(rax=1, rbx=byte) for byte in seen)),
        page=Page(entry),
        regs={"rsi": FRAME + 0x1000 | entry} | more.pop("regs", {}),
        memory={FRAME: b"\x01", FRAME + 0x1000: b"\x02"} | more.pop("memory", {}),
        **more,
    )


def stale32(name: str, mode: Mode, flush: str) -> Check:
    entry = P | W | A | D
    return Check(
        f"{mode.value}: {name}",
        STALE32.format(0x2000 if mode is Mode.PAGED32 else 0x5000, flush),
        done(rax=1, rbx=2),
        mode,
        page=Page(entry),
        regs={"rsi": FRAME + 0x1000 | entry},
        memory={FRAME: b"\x01", FRAME + 0x1000: b"\x02"},
    )


# INVPCID's descriptor at DATA: PCID, address (SDM 2A, "INVPCID").
def invpcid(kind: int) -> str:
    return f"mov eax, {kind}; invpcid rax, [DATA]; mov eax, 1"


DESCRIPTOR = {DATA: struct.pack("<QQ", 0, PAGE)}
INVPCID = {"needs": ("invpcid",), "memory": DESCRIPTOR}
STALE_CHECKS = [
    stale("INVLPG drops the page", "invlpg [PAGE + 0x123]", 0, (2,)),
    stale("INVLPG drops a global page", "invlpg [PAGE]", G, (2,)),
    stale("a load of CR3 drops the page", RELOAD_CR3, 0, (2,)),
    stale("a load of CR3 may keep a global page", RELOAD_CR3, G, (1, 2)),
    stale("a change of CR4.PGE drops the page", TOGGLE_PGE, 0, (2,)),
    stale("a change of CR4.PGE drops a global page", TOGGLE_PGE, G, (2,)),
    stale(
        "without PGE a load of CR3 drops a page with G",
        RELOAD_CR3,
        G,
        (2,),
        change={"cr4": (0, PGE)},
    ),
    stale("INVPCID of an address", invpcid(0), 0, (2,), **INVPCID),
    stale("INVPCID of a PCID", invpcid(1), 0, (2,), **INVPCID),
    stale("INVPCID of a PCID may keep a global page", invpcid(1), G, (1, 2), **INVPCID),
    stale("INVPCID of all and global pages", invpcid(2), G, (2,), **INVPCID),
    stale("INVPCID of all but global pages", invpcid(3), 0, (2,), **INVPCID),
    stale32("INVLPG drops the page", Mode.PAE, "invlpg [PAGE + 0x123]"),
    stale32("a load of CR3 drops the page", Mode.PAE, "mov ecx, cr3; mov cr3, ecx"),
    stale32("INVLPG drops the page", Mode.PAGED32, "invlpg [PAGE + 0x123]"),
    stale32("a load of CR3 drops the page", Mode.PAGED32, "mov ecx, cr3; mov cr3, ecx"),
    Check(
        "INVLPG in the middle of a 2 MiB page drops all of it",
        "mov al, [PAGE]; mov [TABLES + 0x4000], rsi; invlpg [PAGE + 0x123000]; mov bl, [PAGE]",
        done(rax=1, rbx=2),
        page=Page(P | W | A | D, bits=21),
        regs={"rsi": 0x40_0000 | P | W | A | D | PS},
        memory={0x20_0000: b"\x01", 0x40_0000: b"\x02"},
    ),
    Check(
        "a right that is taken away counts after INVLPG",
        "mov [PAGE], al; and byte ptr [TABLES + 0x5000], 0xFD; invlpg [PAGE]; mov [PAGE], al",
        pf(P | W),
        page=Page(P | W | A | D),
    ),
    Check(
        "a page that was absent needs no flush",
        "mov [TABLES + 0x5000], rsi; mov al, [PAGE]",
        done(rax=1),
        page=Page(0),
        regs={"rsi": FRAME | P | W},
        memory={FRAME: b"\x01"},
    ),
    Check("INVLPG of user code", "invlpg [PAGE]", gp(), ring=3),
    Check("INVLPG of an absent page does nothing", "invlpg [PAGE]", done()),
    Check(
        "INVLPG of an address that is not canonical does nothing",
        "mov rdi, 0x800000000000; invlpg [rdi]",
        done(),
    ),
    Check("INVLPG of a register", ".byte 0x0F, 0x01, 0xFF", ud(), Mode.PROT32),
    Check("a load of CR3 by user code", "mov cr3, rax", gp(), ring=3),
    Check("bits of CR3 above the address", "mov rax, cr3; bts rax, 62; mov cr3, rax", gp()),
]

SET_PCIDE = "mov rax, cr4; bts eax, 17; mov cr4, rax"
PCID_CHECKS = [
    Check("without PCIDs CR4.PCIDE is reserved", SET_PCIDE, gp(), needs=("!pcid",)),
    Check("without INVPCID it is no instruction", "invpcid rax, [DATA]", ud(), needs=("!invpcid",)),
    Check("CR4.PCIDE in long mode", SET_PCIDE, done(), needs=("pcid",)),
    Check(
        "CR4.PCIDE with a CR3 that has low bits",
        f"mov rax, cr3; or rax, 0x18; mov cr3, rax; {SET_PCIDE}",
        gp(),
        needs=("pcid",),
    ),
    Check(
        "CR4.PCIDE outside of long mode",
        "mov eax, cr4; bts eax, 17; mov cr4, eax",
        gp(),
        Mode.PAE,
        needs=("pcid",),
    ),
    Check("INVPCID of user code", "invpcid rax, [DATA]", gp(), ring=3, needs=("invpcid",)),
    Check(
        "INVPCID of type 4", invpcid(4).replace("invpcid", "> invpcid"), gp(), needs=("invpcid",)
    ),
    Check(
        "INVPCID with reserved bits in its descriptor",
        invpcid(0).replace("invpcid", "> invpcid"),
        gp(),
        needs=("invpcid",),
        memory={DATA: struct.pack("<QQ", 1 << 12, PAGE)},
    ),
    stale(
        "another PCID keeps the page with bit 63 of CR3 set",
        f"{SET_PCIDE}; mov rcx, cr3; inc rcx; bts rcx, 63; mov cr3, rcx; mov eax, 1",
        0,
        (2,),
        needs=("pcid",),
    ),
]

# A supervisor's access to a user's page (4.6.1).
SMAP_CHECKS = [
    Check(
        "without SMAP its bit is reserved",
        "mov rax, cr4; bts eax, 21; mov cr4, rax",
        gp(),
        needs=("!smap",),
    ),
    Check("without SMAP there is no STAC", "stac", ud(), needs=("!smap",)),
    Check("without SMAP there is no CLAC", "clac", ud(), needs=("!smap",)),
] + [
    Check(
        f"SMAP: {name}",
        code,
        expect,
        ring=ring,
        flags=AC if ac else 0,
        page=Page(P | W | U | A),
        change={"cr4": (SMAP, 0)},
        needs=("smap",),
    )
    for name, code, ring, ac, expect in (
        ("a read without AC", READ, 0, False, pf(P)),
        ("a write without AC", WRITE, 0, False, pf(P | W)),
        ("a read with AC", READ, 0, True, done()),
        ("a write with AC", WRITE, 0, True, done()),
        ("a read behind STAC", f"stac; {READ}", 0, False, done(ac=1)),
        ("a read behind CLAC", f"clac; {READ}", 0, True, pf(P, ac=0)),
        ("a user's read", READ, 3, False, done()),
        ("STAC of user code", "stac", 3, False, ud()),
    )
]


@each(
    ABOVE_CHECKS,
    SIZE_CHECKS,
    ACCESSED_CHECKS,
    RESERVED_CHECKS,
    STALE_CHECKS,
    PCID_CHECKS,
    SMAP_CHECKS,
)
def test_paging(engine: Engine, check: Check) -> None:
    run(engine, check)
