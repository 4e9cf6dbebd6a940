"""Hardware task switches: by JMP, CALL, task gates and IRET
(Intel SDM 3A, 8.2 to 8.6; AMD APM 2, 12.2 and 12.3)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import (
    GP,
    NP,
    PF,
    SS,
    TS_,
    Check,
    Engine,
    Expected,
    db,
    done,
    each,
    fault,
    gp,
    np,
    run,
    ts,
)
from tests.bare.kernel import (
    CODE,
    END,
    GDT,
    KERNEL_CODE,
    KERNEL_CODE16,
    KERNEL_DATA,
    KERNEL_STACK,
    LDT_SELECTOR,
    PAGE,
    PORT_MAP,
    SPARE,
    STACK,
    TABLES,
    TSS,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    USER_TEXT,
    Mode,
    gate,
    segment,
    system_segment,
)

# The other task: its TSS and how it is named.
TASK, TASK_TSS, TASK_STACK = SPARE, 0x3400, 0xDFF0
TASK_GATE = SPARE + 8
# Where it begins, and ends the run.
TARGET = 0x2F00
DESCRIPTOR = system_segment(9, TASK_TSS, 0xFF)
GATE = gate(5, 0, TASK)
NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


def image(**changes: int) -> bytes:
    """A 32-bit TSS (8.2.1), its code at TARGET."""
    fields = {
        "link": 0, "esp0": KERNEL_STACK, "ss0": KERNEL_DATA, "cr3": TABLES, "eip": TARGET,
        "eflags": 2, "eax": 0xA0, "ecx": 0xA1, "edx": 0xA2, "ebx": 0xA3, "esp": TASK_STACK,
        "ebp": 0xA5, "esi": 0xA6, "edi": 0xA7, "es": KERNEL_DATA, "cs": KERNEL_CODE,
        "ss": KERNEL_DATA, "ds": KERNEL_DATA, "fs": 0, "gs": 0, "ldt": 0, "trap": 0,
    } | changes  # fmt: skip
    f = fields
    head = struct.pack("<3I16x", f["link"], f["esp0"], f["ss0"])
    body = struct.pack("<3I", f["cr3"], f["eip"], f["eflags"])
    registers = struct.pack("<8I", *(f[name] for name in NAMES))
    selectors = struct.pack("<7I", *(f[n] for n in ("es", "cs", "ss", "ds", "fs", "gs", "ldt")))
    # The same ports as in the first task.
    ports = b"\xff" * (PORT_MAP - 0x68 + 0x1E) + b"\xef\xff"
    return head + body + registers + selectors + struct.pack("<HH", f["trap"], PORT_MAP) + ports


def image16(**changes: int) -> bytes:
    """A 16-bit TSS (8.6)."""
    fields = {
        "link": 0, "sp0": KERNEL_STACK, "ss0": KERNEL_DATA, "ip": TARGET, "flags": 2, "ax": 0xA0,
        "cx": 0xA1, "dx": 0xA2, "bx": 0xA3, "sp": TASK_STACK, "bp": 0xA5, "si": 0xA6, "di": 0xA7,
        "es": KERNEL_DATA, "cs": KERNEL_CODE, "ss": KERNEL_DATA, "ds": KERNEL_DATA, "ldt": 0,
    } | changes  # fmt: skip
    values = list(fields.values())
    return struct.pack("<3H8x15H", *values)


# Names for what the check looks at.
READ = {
    "old_rights": (GDT + TSS_SELECTOR + 5, 1),
    "rights": (GDT + TASK + 5, 1),
    "link": (TASK_TSS, 2),
    "old_eip": (TSS + 0x20, 4),
    "old_eflags": (TSS + 0x24, 4),
    "old_ebx": (TSS + 0x34, 4),
    "old_esp": (TSS + 0x38, 4),
    "old_cs": (TSS + 0x4C, 2),
    "old_ss": (TSS + 0x50, 2),
    "task_eip": (TASK_TSS + 0x20, 4),
    "task_eflags": (TASK_TSS + 0x24, 4),
    "task_eax": (TASK_TSS + 0x28, 4),
}
FREE, BUSY, FREE16, BUSY16 = 0x89, 0x8B, 0x81, 0x83


def switch(
    name: str,
    code: str,
    expect: Expected,
    *,
    task: bytes | None = None,
    descriptor: int = DESCRIPTOR,
    there: bytes | str = END,
    mode: Mode = Mode.PROT32,
    **more: Any,
) -> Check:
    """``code`` switches to a task of ``descriptor``, which runs ``there``."""
    gdt = {TASK: descriptor, TASK_GATE: GATE} | more.pop("gdt", {})
    memory = {TASK_TSS: image() if task is None else task, TARGET: there}
    return Check(
        name,
        code,
        expect,
        mode,
        gdt=gdt,
        memory=memory | more.pop("memory", {}),
        read=READ,
        **more,
    )


def ways(name: str, expect: Expected, **more: Any) -> list[Check]:
    """By JMP and CALL, to the TSS and to a gate; what it finds wrong is alike."""
    return [
        switch(f"{word} to {what}: {name}", f"nop; > {code} {selector}:0; nop", expect, **more)
        for word, code in (("JMP", "jmp"), ("CALL", "call"))
        for what, selector in (("a TSS", TASK), ("a gate", TASK_GATE))
    ]


def by_all(name: str, expect: Expected, **more: Any) -> list[Check]:
    """Also by a gate of the IDT; that sets EXT for what is no INT."""
    return [
        *ways(name, expect, **more),
        switch(f"INT: {name}", "nop; > int 0x80; nop", expect, idt={0x80: GATE}, **more),
    ]


SPOILT = {"rbx": 0x12345678}
STATE = {
    "rax": 0xA0, "rcx": 0xA1, "rdx": 0xA2, "rbx": 0xA3, "rsp": TASK_STACK, "rbp": 0xA5,
    "rsi": 0xA6, "rdi": 0xA7, "tr_selector": TASK, "rights": BUSY, "old_ebx": 0x12345678,
    "old_esp": STACK, "old_cs": KERNEL_CODE, "old_ss": KERNEL_DATA, "ldt_selector": 0,
}  # fmt: skip
AFTER_JMP = {"old_rights": FREE, "link": 0, "nt": 0}
AFTER_CALL = {"old_rights": BUSY, "link": TSS_SELECTOR, "nt": 1}
FAR_NEXT = CODE + 8  # behind the NOP and a far JMP or CALL
SWITCH_CHECKS = [
    *(
        switch(
            f"{word} to {what}",
            f"nop; {code} {selector}:0",
            done(TARGET, **STATE, **after, old_eip=FAR_NEXT),
            regs=SPOILT,
        )
        for word, code, after in (("JMP", "jmp", AFTER_JMP), ("CALL", "call", AFTER_CALL))
        for what, selector in (("a TSS", TASK), ("a gate", TASK_GATE))
    ),
    switch(
        "INT through a gate",
        "nop; int 0x80",
        done(TARGET, **STATE, **AFTER_CALL, old_eip=CODE + 3),
        regs=SPOILT,
        idt={0x80: GATE},
    ),
    switch(
        "a fault through a gate",
        "nop; mov ds, eax; nop",
        done(TARGET, tr_selector=TASK, nt=1, rsp=TASK_STACK - 4, old_eip=CODE + 1),
        regs={"rax": 0x1F8},
        idt={GP: GATE},
    ),
    switch(
        "a fault through a gate has its error code on the new stack",
        "nop; mov ds, eax; nop",
        done(TARGET + 1, rbp=0x1F8, rsp=TASK_STACK),
        there="pop ebp; out END_PORT, al",
        regs={"rax": 0x1F8},
        idt={GP: GATE},
    ),
    switch(
        "a fault's EFLAGS in the old TSS have RF",
        "nop; ud2; nop",
        done(TARGET, old_eflags=0x10002),
        idt={6: GATE},
    ),
    switch(
        "of user code",
        f"call {TASK_GATE | 3}:0",
        done(TARGET, cs_selector=KERNEL_CODE),
        ring=3,
        gdt={TASK_GATE: gate(5, 0, TASK, dpl=3)},
    ),
    switch(
        "of user code to a TSS of DPL 3",
        f"call {TASK | 3}:0",
        done(TARGET, cs_selector=KERNEL_CODE),
        ring=3,
        descriptor=system_segment(9, TASK_TSS, 0xFF, dpl=3),
    ),
    switch("of user code to a kernel's TSS", f"nop; > call {TASK | 3}:0; nop", gp(TASK), ring=3),
    switch(
        "of user code through a kernel's gate",
        f"nop; > call {TASK_GATE | 3}:0; nop",
        gp(TASK_GATE),
        ring=3,
    ),
    switch(
        "of user code by INT through a kernel's gate",
        "nop; > int 0x80; nop",
        gp(0x80 << 3 | 2),
        ring=3,
        idt={0x80: GATE},
    ),
    switch(
        "to user code",
        f"jmp {TASK}:0",
        done(USER_TEXT, cs_selector=USER_CODE, ss_selector=USER_DATA),
        task=image(
            cs=USER_CODE, ss=USER_DATA, ds=USER_DATA, es=USER_DATA, eip=USER_TEXT, esp=USER_STACK
        ),
    ),
    switch(
        "to virtual-8086 mode",
        f"jmp {TASK}:0",
        done(USER_TEXT, vm=1, cs_selector=0, ds_selector=0x1234, ds_base=0x12340),
        task=image(cs=0, ss=0, ds=0x1234, es=0, eip=USER_TEXT, esp=USER_STACK, eflags=0x20002),
    ),
    switch(
        "loads the LDT",
        f"jmp {TASK}:0",
        done(TARGET, ldt_selector=LDT_SELECTOR, ldt_base=0x6000),
        task=image(ldt=LDT_SELECTOR),
    ),
    switch(
        "loads CR3",
        f"jmp {TASK}:0",
        done(TARGET, cr3=TABLES + 0x8),
        task=image(cr3=TABLES + 8),
        mode=Mode.PAGED32,
    ),
    switch(
        "without paging leaves CR3", f"jmp {TASK}:0", done(TARGET, cr3=0), task=image(cr3=TABLES)
    ),
    switch("sets CR0.TS", f"jmp {TASK}:0", done(TARGET, cr0=0x39)),
    switch(
        "clears the local breakpoints",
        f"mov eax, 0x5AA; mov dr7, eax; mov eax, 0x5FF; mov dr7, eax; jmp {TASK}:0",
        done(TARGET + 3, rbp=0x5AA),
        there="mov ebp, dr7; out END_PORT, al",
    ),
    switch(
        "the T bit is a trap before the first instruction",
        f"jmp {TASK}:0",
        db(1 << 15, at=TARGET),
        task=image(trap=1),
    ),
    switch(
        "CALL and IRET: the old task goes on",
        f"nop; call {TASK}:0; nop",
        done(
            tr_selector=TSS_SELECTOR,
            rights=FREE,
            old_rights=BUSY,
            nt=0,
            rbx=0x12345678,
            task_eip=TARGET + 3,
            task_eax=0xA1,
            rsp=STACK,
        ),
        there="inc eax; nop; iretd",
        regs=SPOILT,
    ),
    switch(
        "CALL and IRET: NT of the task that ends is clear in its TSS",
        f"nop; call {TASK}:0; nop",
        done(task_eflags=2),
        there="nop; iretd",
    ),
    switch(
        "CALL and JMP back: its TSS is busy",
        f"nop; > call {TASK}:0; nop",
        gp(TSS_SELECTOR, at=TARGET),
        there=f"jmp {TSS_SELECTOR}:0",
    ),
    switch(
        "IRET to a task that is not busy",
        f"nop; > call {TASK}:0; nop",
        ts(TSS_SELECTOR, at=TARGET + 8),
        there=f"mov byte ptr [GDT + {TSS_SELECTOR} + 5], 0x89; nop; iretd",
    ),
    switch(
        "IRET with a link beyond the GDT",
        f"nop; > call {TASK}:0; nop",
        ts(0x1F8, at=TARGET + 9),
        there=f"mov word ptr [{TASK_TSS}], 0x1F8; iretd",
    ),
    switch(
        "IRET with a link to data",
        f"nop; > call {TASK}:0; nop",
        ts(KERNEL_DATA, at=TARGET + 9),
        there=f"mov word ptr [{TASK_TSS}], KERNEL_DATA; iretd",
    ),
]

# What a switch finds before it leaves the old task (table 8-1): that task's fault.
REFUSED_CHECKS = [
    *ways(
        "a busy TSS",
        gp(TASK, tr_selector=TSS_SELECTOR),
        descriptor=system_segment(0xB, TASK_TSS, 0xFF),
    ),
    *ways("an absent TSS", np(TASK), descriptor=system_segment(9, TASK_TSS, 0xFF, present=False)),
    *ways("a TSS that is too short", ts(TASK), descriptor=system_segment(9, TASK_TSS, 0x66)),
    switch(
        "a TSS of the least length",
        f"jmp {TASK}:0",
        done(TARGET, tr_limit=0x67),
        descriptor=system_segment(9, TASK_TSS, 0x67),
    ),
    switch(
        "a 16-bit TSS that is too short",
        f"nop; > jmp {TASK}:0; nop",
        ts(TASK),
        descriptor=system_segment(1, TASK_TSS, 0x2A),
    ),
    switch(
        "a gate that is absent",
        f"nop; > jmp {TASK_GATE}:0; nop",
        np(TASK_GATE),
        gdt={TASK_GATE: gate(5, 0, TASK, present=False)},
    ),
    switch(
        "a gate to the LDT",
        f"nop; > jmp {TASK_GATE}:0; nop",
        gp(TASK | 4),
        gdt={TASK_GATE: gate(5, 0, TASK | 4)},
    ),
    switch(
        "a gate to data",
        f"nop; > jmp {TASK_GATE}:0; nop",
        gp(KERNEL_DATA),
        gdt={TASK_GATE: gate(5, 0, KERNEL_DATA)},
    ),
    switch(
        "a gate beyond the GDT",
        f"nop; > jmp {TASK_GATE}:0; nop",
        gp(0x1F8),
        gdt={TASK_GATE: gate(5, 0, 0x1F8)},
    ),
    switch(
        "INT to a busy TSS",
        "nop; > int 0x80; nop",
        gp(TASK),
        idt={0x80: GATE},
        descriptor=system_segment(0xB, TASK_TSS, 0xFF),
    ),
    switch(
        "a fault to a busy TSS: EXT is set",
        "nop; > ud2; nop",
        gp(TASK | 1),
        idt={6: GATE},
        descriptor=system_segment(0xB, TASK_TSS, 0xFF),
    ),
    switch(
        "a TSS on an absent page",
        f"nop; > jmp {TASK}:0; nop",
        fault(PF, 0),
        mode=Mode.PAGED32,
        descriptor=system_segment(9, PAGE, 0xFF),
    ),
]

# What the new task meets before its first instruction is its own fault, with the switch done. It
# may have no stack yet, so that a third task handles it (6.15, "Invalid TSS Exception").
ABSENT = segment(present=False)
OWN, THIRD = SPARE + 0x10, SPARE + 0x18
THIRD_TSS, THIRD_STACK = 0x3600, 0xEFF0


def new(name: str, vector: int, error: int, descriptor: int | None = None, **fields: int) -> Check:
    gdt = {THIRD: system_segment(9, THIRD_TSS, 0xFF)}
    return Check(
        f"the new task's {name}",
        f"jmp {TASK}:0",
        done(TARGET, tr_selector=THIRD, link=TASK, error=error, task_eip=fields.get("eip", TARGET)),
        Mode.PROT32,
        gdt=gdt | {TASK: DESCRIPTOR} | ({} if descriptor is None else {OWN: descriptor}),
        idt={vector: gate(5, 0, THIRD)},
        memory={
            TASK_TSS: image(**fields),
            THIRD_TSS: image(esp=THIRD_STACK),
            TARGET: END,
        },
        read=READ | {"link": (THIRD_TSS, 2), "error": (THIRD_STACK - 4, 4)},
    )


NEW_CHECKS = [
    new("CS is null", TS_, 0, cs=0),
    new("CS is data", TS_, KERNEL_DATA, cs=KERNEL_DATA),
    new("CS is beyond the GDT", TS_, 0x1F8, cs=0x1F8),
    new("CS is absent", NP, OWN, segment(kind=0xB, present=False), cs=OWN),
    new("CS has another RPL", TS_, KERNEL_CODE, cs=KERNEL_CODE | 1),
    new("SS is null", TS_, 0, ss=0),
    new("SS is read-only", TS_, OWN, segment(kind=1), ss=OWN),
    new("SS is absent", SS, OWN, ABSENT, ss=OWN),
    new("SS is of another level", TS_, USER_DATA & ~3, ss=USER_DATA),
    new("DS is absent", NP, OWN, ABSENT, ds=OWN),
    new("DS is execute-only", TS_, OWN, segment(kind=9), ds=OWN),
    new("ES is beyond the GDT", TS_, 0x1F8, es=0x1F8),
    new("FS is a TSS", TS_, TSS_SELECTOR, fs=TSS_SELECTOR),
    new("GS is of an inner level", TS_, KERNEL_DATA, gs=KERNEL_DATA | 3),
    new("LDT is data", TS_, KERNEL_DATA, ldt=KERNEL_DATA),
    new("LDT is absent", TS_, OWN, system_segment(2, 0x6000, 0x3F, present=False), ldt=OWN),
    new("LDT is in the LDT", TS_, 4, ldt=4),
    new("EIP is beyond its segment", GP, 0, cs=KERNEL_CODE16, eip=0x1_0000),
]

TASK16 = system_segment(1, TASK_TSS, 0x2B)
TASK16_CHECKS = [
    switch(
        "JMP to a 16-bit task",
        f"jmp {TASK}:0",
        done(
            TARGET,
            rax=0xA0,
            rdi=0xA7,
            rsp=TASK_STACK,
            fs_selector=0,
            rights=BUSY16,
            old_rights=FREE,
        ),
        task=image16(),
        descriptor=TASK16,
        regs={"rflags": 0x3002},
        there=b"\xe6\xf4",
    ),
    switch(
        "CALL to a 16-bit task and IRET",
        f"nop; call {TASK}:0; nop",
        done(tr_selector=TSS_SELECTOR, rights=FREE16, rsp=STACK),
        task=image16(),
        descriptor=TASK16,
        there="inc eax; iretd",
    ),
    switch(
        "JMP through a gate to a 16-bit task",
        f"jmp {TASK_GATE}:0",
        done(TARGET, rights=BUSY16),
        task=image16(flags=0x3002),
        descriptor=TASK16,
    ),
]


@each(SWITCH_CHECKS, REFUSED_CHECKS, NEW_CHECKS, TASK16_CHECKS)
def test_tasks(engine: Engine, check: Check) -> None:
    run(engine, check)
