"""Segmentation: limits, types, privilege, and the instructions that look at descriptors
(Intel SDM 3A, 3.4, 5.2 to 5.8; AMD APM 2, 4.5 to 4.12)."""

from __future__ import annotations

from tests.bare.check import (
    Check,
    Engine,
    Expected,
    done,
    each,
    gp,
    np,
    run,
    ss,
    ud,
)
from tests.bare.kernel import (
    CODE,
    DATA,
    GDT,
    KERNEL_DATA,
    SPARE,
    STACK,
    TSS,
    Mode,
    segment,
    system_segment,
)

# A selector of the LDT's third entry.
IN_LDT = 0x14
BYTES = bytes(range(1, 17))


def limit(
    name: str, code: str, expect: Expected, descriptor: int, mode: Mode = Mode.PROT32
) -> Check:
    """``code`` behind a load of DS with the descriptor (SDM 3A, 5.3)."""
    load = f"mov ax, {SPARE}; mov ds, ax; mov eax, 0; {code}"
    return Check(f"limit: {name}", load, expect, mode, gdt={SPARE: descriptor})


BYTE_LIMIT = segment(limit=DATA + 7, granular=False)
PAGE_LIMIT = segment(limit=DATA >> 12)
DOWN = segment(kind=7, limit=DATA + 7, granular=False)
DOWN_PAGES = segment(kind=7, limit=DATA >> 12)
DOWN_16 = segment(kind=7, limit=DATA + 7, granular=False, big=False)
LIMIT_CHECKS = [
    limit("the last byte", "mov al, [DATA + 7]", done(), BYTE_LIMIT),
    limit("the first byte beyond", "mov al, [DATA + 8]", gp(), BYTE_LIMIT),
    limit("a doubleword that ends at it", "mov eax, [DATA + 4]", done(), BYTE_LIMIT),
    limit("a doubleword across it", "mov eax, [DATA + 5]", gp(), BYTE_LIMIT),
    limit("a store across it", "mov [DATA + 5], eax", gp(), BYTE_LIMIT),
    limit("a store of 16 bytes across it", "movups [DATA - 7], xmm0", gp(), BYTE_LIMIT),
    limit("a store of 16 bytes up to it", "movups [DATA - 8], xmm0", done(), BYTE_LIMIT),
    limit("in pages: the last byte", "mov al, [DATA + 0xFFF]", done(), PAGE_LIMIT),
    limit("in pages: the first byte beyond", "mov al, [DATA + 0x1000]", gp(), PAGE_LIMIT),
    limit("expand-down: the first byte", "mov al, [DATA + 8]", done(), DOWN),
    limit("expand-down: the last byte of the limit", "mov al, [DATA + 7]", gp(), DOWN),
    limit("expand-down: a doubleword across the limit", "mov eax, [DATA + 5]", gp(), DOWN),
    limit("expand-down: byte 0", "mov al, [0]", gp(), DOWN),
    limit("expand-down in pages: within the limit", "mov al, [DATA + 0xFFF]", gp(), DOWN_PAGES),
    limit("expand-down in pages: beyond it", "mov al, [DATA + 0x1000]", done(), DOWN_PAGES),
    limit("expand-down of 16 bits: up to 0xFFFF", "mov al, [0xFFFF]", done(), DOWN_16),
    limit("expand-down of 16 bits: across 0xFFFF", "mov ax, [0xFFFF]", gp(), DOWN_16),
    limit("expand-down of 16 bits: 0x10000", "mov al, [0x10000]", gp(), DOWN_16),
    limit(
        "a base moves the limit", "mov al, [7]", done(), segment(base=DATA, limit=7, granular=False)
    ),
    limit(
        "a base moves what is beyond",
        "mov al, [8]",
        gp(),
        segment(base=DATA, limit=7, granular=False),
    ),
    limit(
        "the base and the offset wrap at 4 GiB",
        "mov eax, 0x1000; mov al, [eax]",
        done(),
        segment(base=0xFFFF_F000),
    ),
    limit(
        "a limit does not count in 64-bit code", "mov al, [DATA + 8]", done(), BYTE_LIMIT, Mode.LONG
    ),
    limit("compatibility mode: across it", "mov eax, [DATA + 5]", gp(), BYTE_LIMIT, Mode.COMPAT32),
    limit("compatibility mode: up to it", "mov eax, [DATA + 4]", done(), BYTE_LIMIT, Mode.COMPAT32),
    limit("compatibility mode: expand-down", "mov al, [DATA + 7]", gp(), DOWN, Mode.COMPAT32),
    Check(
        "limit: of the stack is #SS",
        "mov eax, ss:[0x9000]",
        ss(),
        Mode.PROT32,
        1,
        regs={"ss_limit": 0x8FFF},
    ),
    Check(
        "limit: a push beyond it is #SS",
        "push eax",
        ss(),
        Mode.PROT32,
        1,
        regs={"ss_limit": 0x8FFF, "rsp": 0x9004},
    ),
    Check(
        "limit: a push across 0 is #SS",
        "push eax",
        ss(),
        Mode.PROT32,
        1,
        regs={"ss_limit": 0x8FFF, "rsp": 2},
    ),
    Check(
        "limit: EBP means SS",
        "mov ebp, 0x9000; mov eax, [ebp]",
        ss(),
        Mode.PROT32,
        1,
        regs={"ss_limit": 0x8FFF},
    ),
    Check(
        "limit: an override of EBP means DS",
        "mov ebp, 0x9000; mov eax, ds:[ebp]",
        done(rax=0),
        Mode.PROT32,
        1,
        regs={"ss_limit": 0x8FFF},
    ),
    Check(
        "limit: a jump beyond the code segment",
        "mov eax, 0x2000; > jmp eax; nop",
        gp(),
        Mode.PROT32,
        3,
        regs={"cs_limit": 0x1FFF},
    ),
    Check(
        "limit: a return beyond the code segment",
        "push 0x2000; > ret; nop",
        gp(),
        Mode.PROT32,
        3,
        regs={"cs_limit": 0x1FFF},
    ),
    Check(
        "limit: code that runs over it",
        "> mov eax, 1",
        gp(),
        Mode.PROT32,
        3,
        regs={"cs_limit": CODE + 3},
    ),
    Check("limit: real mode, a word at 0xFFFF", "mov bx, 0xFFFF; mov ax, [bx]", gp(), Mode.REAL),
    Check(
        "limit: real mode, a word of the stack at 0xFFFF",
        "mov bp, 0xFFFF; mov ax, [bp]",
        ss(),
        Mode.REAL,
    ),
    Check("limit: real mode, 32-bit offsets", "mov ebx, 0x10000; mov al, [ebx]", gp(), Mode.REAL),
    Check(
        "limit: unreal mode keeps 4 GiB over a load of DS",
        "mov ax, 0; mov ds, ax; mov ebx, 0x40000; mov al, [ebx]",
        done(rax=0x5A),
        Mode.REAL,
        regs={"ds_limit": 0xFFFF_FFFF},
        memory={0x40000: b"\x5a"},
    ),
    Check(
        "limit: unreal mode has its base from the selector",
        "mov ax, 0x1000; mov ds, ax; mov ebx, 0x30000; mov al, [ebx]",
        done(rax=0x105A),
        Mode.REAL,
        regs={"ds_limit": 0xFFFF_FFFF},
        memory={0x40000: b"\x5a"},
    ),
    Check(
        "limit: virtual-8086 mode, a word at 0xFFFF",
        "mov bx, 0xFFFF; mov ax, [bx]",
        gp(),
        Mode.VM86,
        3,
    ),
    Check(
        "limit: a 16-bit push wraps within SP",
        "push ax",
        done(rsp=0xFFFE),
        Mode.PROT16,
        regs={"rsp": 0, "ss_limit": 0xFFFF, "ss_attr": 0x93},
    ),
    Check(
        "limit: 16-bit SP keeps the upper half of ESP",
        "push eax",
        done(rsp=0x5A5A_8FEC),
        Mode.PROT32,
        regs={"rsp": 0x5A5A_8FF0, "ss_attr": 0x93, "ss_limit": 0xFFFF},
    ),
]

# Types (5.5): what each kind of segment lets do. DS cannot hold what is not readable.
TYPE_CHECKS = [
    limit("type: a read of read-only data", "mov al, [DATA]", done(), segment(kind=1)),
    limit("type: a write to read-only data", "mov [DATA], al", gp(), segment(kind=1)),
    limit("type: a write to readable code", "mov [DATA], al", gp(), segment(kind=0xB)),
    limit("type: a read of readable code", "mov al, [DATA]", done(), segment(kind=0xB)),
    limit(
        "type: a read-modify-write of read-only data",
        "add byte ptr [DATA], 1",
        gp(),
        segment(kind=1),
    ),
    Check("type: a write to CS", "mov cs:[DATA], al", gp(), Mode.PROT32),
    Check(
        "type: a read of CS that is execute-only",
        "mov al, cs:[DATA]",
        gp(),
        Mode.PROT32,
        regs={"cs_attr": 0xC099},
    ),
    Check("type: a read of CS that is readable", "mov al, cs:[DATA]", done(), Mode.PROT32),
    Check("type: an access through a null DS", "mov ds, eax; mov al, [DATA]", gp(), Mode.PROT32),
    Check(
        "type: an access through a null ES by a string",
        "mov es, eax; mov edi, DATA; stosb",
        gp(),
        Mode.PROT32,
    ),
    Check("type: an access through a null FS", "mov fs, eax; mov al, fs:[DATA]", gp(), Mode.PROT32),
    Check(
        "type: an access through a null DS in 64-bit code", "mov ds, eax; mov al, [DATA]", done()
    ),
    Check(
        "type: an access through a null DS in compatibility mode",
        "mov ds, eax; mov al, [DATA]",
        gp(),
        Mode.COMPAT32,
    ),
    Check(
        "type: a null selector's load is no fault",
        "mov ds, eax; mov es, eax; mov fs, eax; mov gs, eax",
        done(ds_selector=0, gs_selector=0),
        Mode.PROT32,
    ),
]

DATA3 = segment(dpl=3)
CONFORMING = segment(kind=0xF)


def load(
    name: str,
    selector: int,
    expect: Expected,
    descriptor: int | None = None,
    *,
    ring: int = 0,
    register: str = "ds",
    mode: Mode = Mode.PROT32,
) -> Check:
    return Check(
        f"load of {register.upper()}: {name}",
        f"mov eax, {selector}; > mov {register}, eax; nop",
        expect,
        mode,
        ring,
        gdt={} if descriptor is None else {SPARE: descriptor},
        ldt={IN_LDT & ~7: segment(base=0x1234)},
    )


BUSY_TSS = system_segment(0xB, TSS, 0x67)
LOAD_CHECKS = [
    *(
        check
        for register in ("ds", "es", "fs", "gs")
        for check in (
            load(
                "data", SPARE, done(**{f"{register}_selector": SPARE}), segment(), register=register
            ),
            load("an absent segment", SPARE, np(SPARE), segment(present=False), register=register),
            load("beyond the GDT", 0x1F8, gp(0x1F8), register=register),
        )
    ),
    load("an execute-only segment", SPARE, gp(SPARE), segment(kind=9)),
    load("readable code", SPARE, done(), segment(kind=0xB)),
    load("a TSS", SPARE, gp(SPARE), BUSY_TSS),
    load(
        "an absent TSS is of the wrong type first",
        SPARE,
        gp(SPARE),
        system_segment(9, TSS, 0x67, present=False),
    ),
    load("a kernel's data by user code", SPARE | 3, gp(SPARE), segment(), ring=3),
    load("a kernel's data by user code with RPL 0", SPARE, gp(SPARE), segment(), ring=3),
    load("a user's data by the kernel", SPARE, done(), DATA3),
    load("a kernel's data with RPL 3", SPARE | 3, gp(SPARE), segment()),
    load("a user's data with RPL 3", SPARE | 3, done(ds_selector=SPARE | 3), DATA3),
    load("conforming code of the kernel by user code", SPARE | 3, done(), CONFORMING, ring=3),
    load(
        "readable code of the kernel by user code", SPARE | 3, gp(SPARE), segment(kind=0xB), ring=3
    ),
    load("ring 1's data by ring 2", SPARE | 2, gp(SPARE), segment(dpl=1), ring=2),
    load("ring 2's data by ring 1", SPARE | 1, done(), segment(dpl=2), ring=1),
    load(
        "an absent segment without the right is #GP",
        SPARE | 3,
        gp(SPARE),
        segment(present=False),
        ring=3,
    ),
    load("the LDT's entry", IN_LDT, done(ds_base=0x1234)),
    load("beyond the LDT", 0x44, gp(0x44)),
    load("in 64-bit code: absent", SPARE, np(SPARE), segment(present=False), mode=Mode.LONG),
    load("in 64-bit code: beyond the GDT", 0x1F8, gp(0x1F8), mode=Mode.LONG),
    load(
        "in compatibility mode: execute-only", SPARE, gp(SPARE), segment(kind=9), mode=Mode.COMPAT32
    ),
    load("null", 0, gp(0), register="ss"),
    load("data", SPARE, done(ss_selector=SPARE), segment(), register="ss"),
    load("read-only data", SPARE, gp(SPARE), segment(kind=1), register="ss"),
    load("code", SPARE, gp(SPARE), segment(kind=0xB), register="ss"),
    load("an absent segment", SPARE, ss(SPARE), segment(present=False), register="ss"),
    load("an outer level's data", SPARE, gp(SPARE), DATA3, register="ss"),
    load("another RPL", SPARE | 1, gp(SPARE), segment(), register="ss"),
    load("an inner level's data", SPARE | 3, gp(SPARE), segment(), ring=3, register="ss"),
    load("of user code", SPARE | 3, done(), DATA3, ring=3, register="ss"),
    load("beyond the GDT", 0x1F8, gp(0x1F8), register="ss"),
    load("null in the kernel's 64-bit code", 0, done(ss_selector=0), mode=Mode.LONG, register="ss"),
    load("null with another RPL in 64-bit code", 3, gp(0), mode=Mode.LONG, register="ss"),
    load("null in user's 64-bit code", 3, gp(0), mode=Mode.LONG, register="ss", ring=3),
    load("null in compatibility mode", 0, gp(0), mode=Mode.COMPAT32, register="ss"),
    Check(
        "load: POP of an absent DS leaves ESP",
        "push SPARE; > pop ds; nop",
        np(SPARE, rsp=STACK - 4 - 16),
        Mode.PROT32,
        gdt={SPARE: segment(present=False)},
    ),
    Check(
        "load: LDS of an absent segment leaves its register",
        "> lds eax, [DATA]; nop",
        np(SPARE, rax=5),
        Mode.PROT32,
        regs={"rax": 5},
        gdt={SPARE: segment(present=False)},
        memory={DATA: b"\1\2\3\4\0\1"},
    ),
    Check(
        "load: LES",
        "les ebx, [DATA]",
        done(rbx=0x0403_0201, es_selector=KERNEL_DATA),
        Mode.PROT32,
        memory={DATA: b"\1\2\3\4\x10\0"},
    ),
    Check(
        "load: LSS of the null selector",
        "lss ebx, [DATA]",
        gp(0),
        Mode.PROT32,
        memory={DATA: b"\1\2\3\4\0\0"},
    ),
    Check(
        "load: sets the accessed bit",
        "mov eax, SPARE; mov ds, eax",
        done(rights=0x93),
        Mode.PROT32,
        gdt={SPARE: segment(kind=2)},
        read={"rights": (GDT + SPARE + 5, 1)},
    ),
    Check(
        "load: that faults leaves the accessed bit",
        "mov eax, SPARE; mov ds, eax",
        np(SPARE, rights=0x12),
        Mode.PROT32,
        gdt={SPARE: segment(kind=2, present=False)},
        read={"rights": (GDT + SPARE + 5, 1)},
    ),
    Check("load: CS by MOV", ".byte 0x8E, 0xC8", ud(), Mode.PROT32),
    Check("load: a segment register that does not exist", ".byte 0x8E, 0xF0", ud(), Mode.PROT32),
    Check(
        "load: real mode takes any selector",
        "mov ax, 0xFFFF; mov ds, ax",
        done(ds_base=0xFFFF0),
        Mode.REAL,
    ),
    Check(
        "load: virtual-8086 mode takes any selector",
        "mov ax, 0x1234; mov ds, ax",
        done(ds_base=0x12340, ds_limit=0xFFFF),
        Mode.VM86,
        3,
    ),
    Check(
        "load: a data segment's base counts for FS in 64-bit code",
        "mov eax, SPARE; mov fs, eax; mov al, fs:[4]",
        done(rax=SPARE & ~0xFF | 0x5A),
        gdt={SPARE: segment(base=DATA)},
        memory={DATA + 4: b"\x5a"},
    ),
    Check(
        "load: a data segment's base does not count for DS in 64-bit code",
        "mov eax, SPARE; mov ds, eax; mov al, [DATA + 4]",
        done(rax=0x15A & 0x1FF),
        gdt={SPARE: segment(base=DATA)},
        memory={DATA + 4: b"\x5a"},
    ),
]

LDT64 = (system_segment(2, 0x6000, 0x3F), 0)
TSS64 = (system_segment(9, TSS, 0x67), 0)


def table(
    name: str,
    instruction: str,
    selector: int,
    expect: Expected,
    descriptor: int | tuple[int, int] | None = None,
    *,
    mode: Mode = Mode.PROT32,
    **more: object,
) -> Check:
    return Check(
        f"{mode.value}: {instruction.upper()} of {name}",
        f"mov eax, {selector}; > {instruction} ax; nop",
        expect,
        mode,
        gdt={} if descriptor is None else {SPARE: descriptor},
        read={"rights": (GDT + SPARE + 5, 1)},
    )


TABLE_CHECKS = [
    table(
        "an LDT",
        "lldt",
        SPARE,
        done(ldt_selector=SPARE, ldt_limit=0x3F),
        system_segment(2, 0x6000, 0x3F),
    ),
    table("null", "lldt", 0, done(ldt_selector=0)),
    table("data", "lldt", SPARE, gp(SPARE), segment()),
    table(
        "an absent LDT", "lldt", SPARE, np(SPARE), system_segment(2, 0x6000, 0x3F, present=False)
    ),
    table("the LDT's own entry", "lldt", 4, gp(4)),
    table("beyond the GDT", "lldt", 0x1F8, gp(0x1F8)),
    table(
        "a TSS", "ltr", SPARE, done(tr_selector=SPARE, rights=0x8B), system_segment(9, TSS, 0x67)
    ),
    table(
        "a 16-bit TSS",
        "ltr",
        SPARE,
        done(tr_selector=SPARE, rights=0x83),
        system_segment(1, TSS, 0x2B),
    ),
    table("null", "ltr", 0, gp(0)),
    table("a busy TSS", "ltr", SPARE, gp(SPARE), system_segment(0xB, TSS, 0x67)),
    table("an absent TSS", "ltr", SPARE, np(SPARE), system_segment(9, TSS, 0x67, present=False)),
    table("data", "ltr", SPARE, gp(SPARE), segment(kind=9)),
    table("the LDT", "ltr", IN_LDT, gp(IN_LDT)),
    table("a TSS", "ltr", SPARE, done(tr_selector=SPARE, rights=0x8B), TSS64, mode=Mode.LONG),
    table(
        "a 16-bit TSS", "ltr", SPARE, gp(SPARE), (system_segment(1, TSS, 0x2B), 0), mode=Mode.LONG
    ),
    table(
        "a TSS with bases above 4 GiB",
        "ltr",
        SPARE,
        done(tr_base=0x7_0000_3000),
        (system_segment(9, TSS, 0x67), 7),
        mode=Mode.LONG,
    ),
    table(
        "a TSS whose base is not canonical",
        "ltr",
        SPARE,
        gp(SPARE, rights=0x89),
        (system_segment(9, TSS, 0x67), 0x8000),
        mode=Mode.LONG,
    ),
    table(
        "a TSS whose upper half has a type",
        "ltr",
        SPARE,
        gp(SPARE),
        (system_segment(9, TSS, 0x67), 0x0900 << 32),
        mode=Mode.LONG,
    ),
    table("an LDT", "lldt", SPARE, done(ldt_selector=SPARE), LDT64, mode=Mode.LONG),
    table(
        "an LDT with bases above 4 GiB",
        "lldt",
        SPARE,
        done(ldt_base=0x7_0000_6000),
        (system_segment(2, 0x6000, 0x3F), 7),
        mode=Mode.LONG,
    ),
    *(
        Check(
            f"{mode.value}: no {name}",
            f"> {name} {operands}; nop",
            ud(),
            mode,
            3 if mode is Mode.VM86 else 0,
        )
        for mode in (Mode.REAL, Mode.VM86)
        for name, operands in (
            ("lldt", "ax"),
            ("ltr", "ax"),
            ("sldt", "ax"),
            ("str", "ax"),
            ("lar", "ax, bx"),
            ("lsl", "ax, bx"),
            ("verr", "ax"),
            ("verw", "ax"),
            ("arpl", "ax, bx"),
        )
    ),
]


def looks(
    name: str,
    instruction: str,
    selector: int,
    value: int | None,
    descriptor: int | tuple[int, int] | None = None,
    *,
    ring: int = 0,
    mode: Mode = Mode.PROT32,
) -> Check:
    """LAR or LSL: ZF and the value, or neither."""
    expect = done(zf=0, rbx=5) if value is None else done(zf=1, rbx=value)
    return Check(
        f"{mode.value}: {instruction.upper()} of {name}",
        f"mov eax, {selector}; mov ebx, 5; {instruction} ebx, eax",
        expect,
        mode,
        ring,
        gdt={} if descriptor is None else {SPARE: descriptor},
        flags=0x40 if value is None else 0,
    )


SYSTEM = {
    name: system_segment(kind, 0x3000, 0x167)
    for name, kind in (
        ("a 16-bit TSS", 1),
        ("an LDT", 2),
        ("a busy 16-bit TSS", 3),
        ("a 16-bit call gate", 4),
        ("a task gate", 5),
        ("a 16-bit interrupt gate", 6),
        ("a 16-bit trap gate", 7),
        ("a TSS", 9),
        ("a busy TSS", 0xB),
        ("a call gate", 0xC),
        ("an interrupt gate", 0xE),
        ("a trap gate", 0xF),
        ("type 0", 0),
        ("type 8", 8),
        ("type 10", 10),
        ("type 13", 13),
    )
}
# SDM 2A, tables 3-53 ("LAR") and 3-65 ("LSL"); APM 3, the same.
LAR_VALID = {
    "a 16-bit TSS",
    "an LDT",
    "a busy 16-bit TSS",
    "a 16-bit call gate",
    "a task gate",
    "a TSS",
    "a busy TSS",
    "a call gate",
}
LAR_VALID64 = {"an LDT", "a TSS", "a busy TSS", "a call gate"}
LSL_VALID = {"a 16-bit TSS", "an LDT", "a busy 16-bit TSS", "a TSS", "a busy TSS"}
LSL_VALID64 = {"an LDT", "a TSS", "a busy TSS"}
LOOK_CHECKS = [
    *(
        looks(
            name,
            "lar",
            SPARE,
            descriptor >> 32 & 0xFFFF00 if name in valid else None,
            (descriptor, 0) if mode is Mode.LONG else descriptor,
            mode=mode,
        )
        for mode, valid in ((Mode.PROT32, LAR_VALID), (Mode.LONG, LAR_VALID64))
        for name, descriptor in SYSTEM.items()
    ),
    *(
        looks(
            name,
            "lsl",
            SPARE,
            0x167 if name in valid else None,
            (descriptor, 0) if mode is Mode.LONG else descriptor,
            mode=mode,
        )
        for mode, valid in ((Mode.PROT32, LSL_VALID), (Mode.LONG, LSL_VALID64))
        for name, descriptor in SYSTEM.items()
    ),
    looks("null", "lar", 0, None),
    looks("null", "lsl", 0, None),
    looks("beyond the GDT", "lar", 0x1F8, None),
    looks("data", "lar", SPARE, 0xCF9300 & 0xFFFF00, segment()),
    looks("absent data", "lar", SPARE, 0xCF1300 & 0xFFFF00, segment(present=False)),
    looks("pages", "lsl", SPARE, 0x5FFF, segment(limit=5)),
    looks("bytes", "lsl", SPARE, 5, segment(limit=5, granular=False)),
    looks("a kernel's data by user code", "lar", SPARE | 3, None, segment(), ring=3),
    looks("a user's data by user code", "lar", SPARE | 3, 0xCFF300, DATA3, ring=3),
    looks("a kernel's data with RPL 3", "lsl", SPARE | 3, None, segment()),
    looks("conforming code by user code", "lsl", SPARE | 3, 0xFFFF_FFFF, CONFORMING, ring=3),
]


def verifies(
    name: str,
    instruction: str,
    selector: int,
    yes: bool,
    descriptor: int | None = None,
    ring: int = 0,
) -> Check:
    return Check(
        f"{instruction.upper()} of {name}",
        f"mov eax, {selector}; {instruction} ax",
        done(zf=int(yes)),
        Mode.PROT32,
        ring,
        gdt={} if descriptor is None else {SPARE: descriptor},
        flags=0 if yes else 0x40,
    )


VERIFY_CHECKS = [
    verifies("data", "verr", SPARE, True, segment()),
    verifies("data", "verw", SPARE, True, segment()),
    verifies("read-only data", "verr", SPARE, True, segment(kind=1)),
    verifies("read-only data", "verw", SPARE, False, segment(kind=1)),
    verifies("readable code", "verr", SPARE, True, segment(kind=0xB)),
    verifies("readable code", "verw", SPARE, False, segment(kind=0xB)),
    verifies("execute-only code", "verr", SPARE, False, segment(kind=9)),
    verifies("a TSS", "verr", SPARE, False, BUSY_TSS),
    verifies("null", "verr", 0, False),
    verifies("null", "verw", 3, False),
    verifies("beyond the GDT", "verr", 0x1F8, False),
    verifies("a kernel's data by user code", "verr", SPARE | 3, False, segment(), 3),
    verifies("a kernel's data with RPL 3", "verw", SPARE | 3, False, segment()),
    verifies("conforming code by user code", "verr", SPARE | 3, True, CONFORMING, 3),
    verifies("a user's data by user code", "verw", SPARE | 3, True, DATA3, 3),
    Check(
        "ARPL raises an RPL",
        "mov eax, 0x101; mov ebx, 3; arpl ax, bx",
        done(zf=1, rax=0x103),
        Mode.PROT32,
    ),
    Check(
        "ARPL leaves a higher RPL",
        "mov eax, 0x103; mov ebx, 1; arpl ax, bx",
        done(zf=0, rax=0x103),
        Mode.PROT32,
        flags=0x40,
    ),
    Check(
        "ARPL leaves an equal RPL",
        "mov eax, 0x102; mov ebx, 2; arpl ax, bx",
        done(zf=0, rax=0x102),
        Mode.PROT32,
        flags=0x40,
    ),
    Check(
        "ARPL of memory",
        "mov ebx, 3; arpl [DATA], bx",
        done(zf=1, word=0x103),
        Mode.PROT32,
        memory={DATA: b"\x00\x01"},
        read={"word": (DATA, 2)},
    ),
    Check(
        "ARPL is MOVSXD in 64-bit code",
        ".byte 0x48, 0x63, 0xC3",
        done(rax=0xFFFF_FFFF_8000_0000),
        regs={"rbx": 0x8000_0000},
    ),
]


@each(LIMIT_CHECKS, TYPE_CHECKS)
def test_limits_and_types(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(LOAD_CHECKS, TABLE_CHECKS)
def test_loads(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(LOOK_CHECKS, VERIFY_CHECKS)
def test_looks(engine: Engine, check: Check) -> None:
    run(engine, check)
