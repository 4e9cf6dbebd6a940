"""Far transfers: call, interrupt and trap gates, returns between levels, to virtual-8086 mode
(Intel SDM 3A, 5.8, 6.12, 6.14; 2A and 2B, "CALL", "JMP", "RET", "IRET"; AMD APM 2, 4.11, 8.9)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from tests.bare.check import Check, Engine, Expected, done, each, fault, gp, np, run, ss, ts
from tests.bare.kernel import (
    CODE,
    CODE1,
    CODE2,
    DATA,
    DATA1,
    DATA2,
    END,
    IST_STACK,
    KERNEL_CODE,
    KERNEL_CODE32,
    KERNEL_DATA,
    KERNEL_STACK,
    LDT_SELECTOR,
    SPARE,
    STACK,
    TSS,
    USER_CODE,
    USER_CODE32,
    USER_DATA,
    USER_STACK,
    USER_TEXT,
    Mode,
    gate,
    handler,
    segment,
    system_segment,
)

# Where gates lead to: an OUT, as at the end of each check.
TARGET = 0x2F00
THERE = {TARGET: END}
PROT, LONG, COMPAT = Mode.PROT32, Mode.LONG, Mode.COMPAT32


def call_gate(selector: int = KERNEL_CODE, *, kind: int = 0xC, dpl: int = 0, **more: Any) -> int:
    return gate(
        kind,
        TARGET,
        selector,
        dpl=dpl,
        low=more.get("low", 0),
        present=bool(more.get("present", 1)),
    )


def far(
    mode: Mode, instruction: str, selector: int, offset: int = TARGET
) -> tuple[str, dict[int, bytes]]:
    """A far JMP or CALL, which 64-bit code has through memory alone."""
    if mode is not LONG:
        return f"{instruction} {selector}:{offset}", {}
    return f"{instruction} fword ptr [DATA]", {DATA: struct.pack("<IH", offset, selector)}


def transfer(
    name: str,
    instruction: str,
    selector: int,
    expect: Expected,
    *,
    mode: Mode = PROT,
    ring: int = 0,
    gdt: Mapping[int, int | tuple[int, int]] | None = None,
    **more: Any,
) -> Check:
    code, memory = far(mode, instruction, selector)
    memory |= more.pop("memory", {})
    return Check(
        f"{mode.value}: {instruction.upper()} {name}",
        f"nop; > {code}; nop",
        expect,
        mode,
        ring,
        gdt=gdt or {},
        memory=memory | THERE,
        **more,
    )


def both(name: str, selector: int, expect: Expected, **more: Any) -> list[Check]:
    return [
        transfer(name, instruction, selector, expect, **more) for instruction in ("jmp", "call")
    ]


def code_segment(**changes: Any) -> int:
    return segment(**({"kind": 0xB} | changes))


def code64(**changes: Any) -> int:
    return segment(kind=0xB, big=False, long=True, **changes)


DIRECT_CHECKS = [
    *both("to a code segment", SPARE, done(TARGET, cs_selector=SPARE), gdt={SPARE: code_segment()}),
    *both("to a null selector", 0, gp(0)),
    *both("beyond the GDT", 0x1F8, gp(0x1F8)),
    *both("to data", SPARE, gp(SPARE), gdt={SPARE: segment()}),
    *both("to an absent segment", SPARE, np(SPARE), gdt={SPARE: code_segment(present=False)}),
    *both(
        "beyond the segment's limit",
        SPARE,
        gp(0),
        gdt={SPARE: code_segment(limit=0x1FFF, granular=False)},
    ),
    *both("to an outer level", SPARE, gp(SPARE), gdt={SPARE: code_segment(dpl=3)}),
    *both("to an inner level", SPARE | 3, gp(SPARE), gdt={SPARE: code_segment()}, ring=3),
    *both("with an RPL that is higher", SPARE | 3, gp(SPARE), gdt={SPARE: code_segment()}),
    *both(
        "of ring 3 with RPL 0",
        SPARE,
        done(TARGET, cs_selector=SPARE | 3),
        gdt={SPARE: code_segment(dpl=3)},
        ring=3,
    ),
    *both(
        "to conforming code of the kernel",
        SPARE,
        done(TARGET, cs_selector=SPARE | 3),
        gdt={SPARE: code_segment(kind=0xF)},
        ring=3,
    ),
    *both(
        "to conforming code of an outer level",
        SPARE,
        gp(SPARE),
        gdt={SPARE: code_segment(kind=0xF, dpl=3)},
    ),
    *both("to the LDT", 0x14, gp(0x14), gdt={}),
    *both("to an LDT's descriptor", LDT_SELECTOR, gp(LDT_SELECTOR)),
    *both("to an interrupt gate", SPARE, gp(SPARE), gdt={SPARE: gate(0xE, TARGET)}),
    *both(
        "to 64-bit code",
        SPARE,
        done(TARGET, cs_selector=SPARE),
        mode=LONG,
        gdt={SPARE: code64()},
    ),
    *both(
        "to code of L and D",
        SPARE,
        gp(SPARE),
        mode=LONG,
        gdt={SPARE: segment(kind=0xB, big=True, long=True)},
    ),
    *both(
        "to compatibility mode",
        SPARE,
        done(TARGET, cs_attr=0xC09B),
        mode=LONG,
        gdt={SPARE: code_segment()},
    ),
    *both(
        "to 64-bit code of compatibility mode",
        SPARE,
        done(TARGET, cs_attr=0xA09B),
        mode=COMPAT,
        gdt={SPARE: code64()},
    ),
    *both(
        "to an absent segment",
        SPARE,
        np(SPARE),
        mode=LONG,
        gdt={SPARE: code64(present=False)},
    ),
    *both("to a TSS", SPARE, gp(SPARE), mode=LONG, gdt={SPARE: (system_segment(9, TSS, 0x67), 0)}),
    *both(
        "to a 16-bit call gate", SPARE, gp(SPARE), mode=LONG, gdt={SPARE: (call_gate(kind=4), 0)}
    ),
    *both("to a task gate", SPARE, gp(SPARE), mode=LONG, gdt={SPARE: (gate(5, 0, 0x68), 0)}),
]

USER_GATE = {SPARE: call_gate(dpl=3)}
GATE_CHECKS = [
    *both(
        "through a call gate",
        SPARE,
        done(TARGET, cs_selector=KERNEL_CODE),
        gdt={SPARE: call_gate()},
    ),
    *both(
        "through a 16-bit call gate",
        SPARE,
        done(TARGET, cs_selector=KERNEL_CODE),
        gdt={SPARE: call_gate(kind=4)},
    ),
    *both("through a gate of a lower DPL", SPARE | 3, gp(SPARE), gdt={SPARE: call_gate()}, ring=3),
    *both(
        "through a gate with an RPL that is higher", SPARE | 3, gp(SPARE), gdt={SPARE: call_gate()}
    ),
    *both("through an absent gate", SPARE, np(SPARE), gdt={SPARE: call_gate(present=0)}),
    *both(
        "through an absent gate without the right",
        SPARE,
        gp(SPARE),
        gdt={SPARE: call_gate(present=0)},
        ring=3,
    ),
    *both("through a gate to a null selector", SPARE, gp(0), gdt={SPARE: call_gate(0)}),
    *both("through a gate to data", SPARE, gp(KERNEL_DATA), gdt={SPARE: call_gate(KERNEL_DATA)}),
    *both("through a gate beyond the GDT", SPARE, gp(0x1F8), gdt={SPARE: call_gate(0x1F8)}),
    *both(
        "through a gate to an outer level",
        SPARE,
        gp(USER_CODE & ~3),
        gdt={SPARE: call_gate(USER_CODE)},
    ),
    *both(
        "through a gate to an absent segment",
        SPARE,
        np(SPARE + 8),
        gdt={SPARE: call_gate(SPARE + 8), SPARE + 8: code_segment(present=False)},
    ),
    transfer(
        "through a gate to an inner level", "jmp", SPARE, gp(KERNEL_CODE), gdt=USER_GATE, ring=3
    ),
    transfer(
        "through a gate to an inner level",
        "call",
        SPARE,
        done(
            TARGET,
            cs_selector=KERNEL_CODE,
            ss_selector=KERNEL_DATA,
            rsp=KERNEL_STACK - 16,
            ip=CODE + 8,
            cs=USER_CODE,
            sp=STACK,
            ss=USER_DATA,
        ),
        gdt=USER_GATE,
        ring=3,
        read={
            "ip": (KERNEL_STACK - 16, 4),
            "cs": (KERNEL_STACK - 12, 4),
            "sp": (KERNEL_STACK - 8, 4),
            "ss": (KERNEL_STACK - 4, 4),
        },
    ),
    transfer(
        "through a gate with parameters",
        "call",
        SPARE,
        done(TARGET, rsp=KERNEL_STACK - 24, first=0x11111111, second=0x22222222),
        gdt={SPARE: call_gate(dpl=3, low=2)},
        ring=3,
        regs={"rsp": STACK - 8},
        memory={STACK - 8: struct.pack("<II", 0x11111111, 0x22222222)},
        read={"first": (KERNEL_STACK - 16, 4), "second": (KERNEL_STACK - 12, 4)},
    ),
    transfer(
        "through a 16-bit gate to an inner level",
        "call",
        SPARE,
        done(
            TARGET,
            rsp=KERNEL_STACK - 8,
            frame=(USER_DATA << 48) | STACK << 32 | USER_CODE << 16 | CODE + 8,
        ),
        gdt={SPARE: call_gate(dpl=3, kind=4)},
        ring=3,
        read={"frame": (KERNEL_STACK - 8, 8)},
    ),
    transfer(
        "through a gate to ring 1",
        "call",
        SPARE,
        done(TARGET, cs_selector=CODE1, ss_selector=DATA1),
        gdt={SPARE: call_gate(CODE1, dpl=3)},
        ring=3,
    ),
    transfer(
        "through a gate to conforming code",
        "call",
        SPARE,
        done(TARGET, cs_selector=SPARE + 8 | 3, ss_selector=USER_DATA),
        gdt={SPARE: call_gate(SPARE + 8, dpl=3), SPARE + 8: code_segment(kind=0xF)},
        ring=3,
    ),
    transfer(
        "through a gate to conforming code",
        "jmp",
        SPARE,
        done(TARGET, cs_selector=SPARE + 8 | 3),
        gdt={SPARE: call_gate(SPARE + 8, dpl=3), SPARE + 8: code_segment(kind=0xF)},
        ring=3,
    ),
    *both(
        "through a 64-bit gate",
        SPARE,
        done(TARGET, cs_selector=KERNEL_CODE),
        mode=LONG,
        gdt={SPARE: (call_gate(), 0)},
    ),
    transfer(
        "through a 64-bit gate to an inner level",
        "call",
        SPARE,
        done(
            TARGET,
            cs_selector=KERNEL_CODE,
            ss_selector=0,
            rsp=KERNEL_STACK - 32,
            ip=CODE + 8,
            ss=USER_DATA,
        ),
        mode=LONG,
        gdt={SPARE: (call_gate(dpl=3), 0)},
        ring=3,
        read={"ip": (KERNEL_STACK - 32, 8), "ss": (KERNEL_STACK - 8, 8)},
    ),
    transfer(
        "through a 64-bit gate from compatibility mode",
        "call",
        SPARE,
        done(TARGET, cs_selector=KERNEL_CODE, ss_selector=0, cs=USER_CODE32),
        mode=COMPAT,
        gdt={SPARE: (call_gate(dpl=3), 0)},
        ring=3,
        read={"cs": (KERNEL_STACK - 24, 8)},
    ),
    *both(
        "through a 64-bit gate to 32-bit code",
        SPARE,
        gp(KERNEL_CODE32),
        mode=LONG,
        gdt={SPARE: (call_gate(KERNEL_CODE32), 0)},
    ),
    *both(
        "through a 64-bit gate whose upper half has a type",
        SPARE,
        gp(SPARE),
        mode=LONG,
        gdt={SPARE: (call_gate(), 0x1F << 40)},
    ),
    *both(
        "through a 64-bit gate to an address that is not canonical",
        SPARE,
        gp(0),
        mode=LONG,
        gdt={SPARE: (call_gate(), 0x8000)},
    ),
    *both(
        "through a 64-bit gate whose upper half is beyond the GDT",
        SPARE + 0x78,
        gp(SPARE + 0x78),
        mode=LONG,
        gdt={SPARE + 0x78: call_gate()},
    ),
]


def handled(
    name: str,
    expect: Expected,
    mode: Mode = PROT,
    ring: int = 0,
    code: str = "int 0x80",
    **more: Any,
) -> Check:
    return Check(f"{mode.value}: {name}", code, expect, mode, ring, **more)


def stopped(**state: int) -> Expected:
    """In the handler of vector 0x80."""
    return fault(0x80, at="behind", **state)


TRAP_GATE = {0x80: gate(0xF, handler(0x80), dpl=3)}
AT_IST = {0x80: gate(0xE, handler(0x80), dpl=3, low=1)}
INTERRUPT_CHECKS = [
    handled("an interrupt gate clears IF", stopped(now_if=0, **{"if": 1}), flags=0x200),
    handled("a trap gate leaves IF", stopped(now_if=1, **{"if": 1}), flags=0x200, idt=TRAP_GATE),
    handled("a gate clears NT", stopped(now_nt=0, nt=1), flags=0x4000),
    handled("a gate leaves IOPL and DF", stopped(now_df=1, iopl=3), flags=0x3400),
    handled("at the same level", stopped(ss_selector=KERNEL_DATA, rsp=STACK - 12)),
    handled(
        "from user code",
        stopped(
            ss_selector=KERNEL_DATA, rsp=KERNEL_STACK - 20, sp=STACK, ss=USER_DATA, cs=USER_CODE
        ),
        ring=3,
        read={
            "cs": (KERNEL_STACK - 16, 4),
            "sp": (KERNEL_STACK - 8, 4),
            "ss": (KERNEL_STACK - 4, 4),
        },
    ),
    handled(
        "from ring 1 to ring 0",
        stopped(ss_selector=KERNEL_DATA, cs=CODE1),
        ring=1,
        read={"cs": (KERNEL_STACK - 16, 4)},
    ),
    handled(
        "to ring 1 of ring 3",
        stopped(cs_selector=CODE1, ss_selector=DATA1),
        ring=3,
        idt={0x80: gate(0xE, handler(0x80), CODE1, dpl=3)},
    ),
    handled(
        "to ring 2 of ring 3",
        stopped(cs_selector=CODE2, ss_selector=DATA2),
        ring=3,
        idt={0x80: gate(0xE, handler(0x80), CODE2, dpl=3)},
    ),
    handled(
        "to conforming code of ring 3",
        stopped(cs_selector=SPARE | 3, ss_selector=USER_DATA),
        ring=3,
        idt={0x80: gate(0xE, handler(0x80), SPARE, dpl=3)},
        gdt={SPARE: code_segment(kind=0xF)},
    ),
    handled(
        "to an outer level",
        gp(USER_CODE & ~3),
        idt={0x80: gate(0xE, handler(0x80), USER_CODE, dpl=3)},
    ),
    handled(
        "a 16-bit gate pushes words",
        done(TARGET, frame=0x2 << 32 | KERNEL_CODE << 16 | CODE + 2, rsp=STACK - 6),
        idt={0x80: gate(6, TARGET)},
        memory=THERE,
        read={"frame": (STACK - 6, 6)},
    ),
    handled(
        "aligns its stack",
        stopped(rsp=STACK - 56, sp=STACK - 8),
        LONG,
        regs={"rsp": STACK - 8},
        read={"sp": (STACK - 32, 8)},
    ),
    handled(
        "from user code",
        stopped(
            cs_selector=KERNEL_CODE, ss_selector=0, rsp=KERNEL_STACK - 40, sp=STACK, ss=USER_DATA
        ),
        LONG,
        3,
        read={"sp": (KERNEL_STACK - 16, 8), "ss": (KERNEL_STACK - 8, 8)},
    ),
    handled(
        "from compatibility mode",
        stopped(cs_selector=KERNEL_CODE, ss_selector=0, cs=USER_CODE32),
        COMPAT,
        3,
        read={"cs": (KERNEL_STACK - 32, 8)},
    ),
    handled(
        "from the kernel's compatibility mode",
        stopped(cs_selector=KERNEL_CODE, ss_selector=KERNEL_DATA, rsp=STACK - 40),
        COMPAT,
    ),
    handled(
        "the IST at the same level",
        stopped(rsp=IST_STACK - 40, ss_selector=KERNEL_DATA, sp=STACK),
        LONG,
        idt=AT_IST,
        read={"sp": (IST_STACK - 16, 8)},
    ),
    handled(
        "the IST from user code", stopped(rsp=IST_STACK - 40, ss_selector=0), LONG, 3, idt=AT_IST
    ),
    handled(
        "an IST that is not canonical", ss(0), LONG, idt=AT_IST, tss={0x24: ("Q", 0x8000_0000_1000)}
    ),
    handled("a TSS too short for the IST", ts(0x68), LONG, idt=AT_IST, regs={"tr_limit": 0x27}),
    handled(
        "a stack of the TSS that is not canonical",
        ss(0),
        LONG,
        3,
        tss={4: ("Q", 0x8000_0000_1000)},
        idt={12: gate(0xE, handler(12), low=1)},
    ),
    handled(
        "of user code: interrupts in the handler see CPL 0",
        stopped(cs_selector=KERNEL_CODE),
        LONG,
        3,
    ),
    Check(
        "real: INT pushes words and clears IF and TF",
        "int 0x80",
        fault(0x80, at="behind", now_if=0, rsp=STACK - 6, **{"if": 1}),
        Mode.REAL,
        flags=0x200,
    ),
    Check(
        "real: IRET",
        "int 0x80; nop; > nop",
        done(rsp=STACK, **{"if": 1}),
        Mode.REAL,
        flags=0x200,
        handlers={0x80: "iret"},
    ),
]


def returns(
    name: str,
    instruction: str,
    frame: tuple[int, ...],
    expect: Expected,
    mode: Mode = PROT,
    ring: int = 0,
    **more: Any,
) -> Check:
    """A return with ``frame`` on the stack, its first value on top."""
    form = "<" + {4: "I", 8: "Q"}[mode.slot] * len(frame)
    data = struct.pack(form, *frame)
    regs = {"rsp": STACK - len(data)} | more.pop("regs", {})
    memory = {STACK - len(data): data} | THERE | more.pop("memory", {})
    return Check(
        f"{mode.value}: {instruction.upper()} {name}",
        f"nop; > {instruction}; nop",
        expect,
        mode,
        ring,
        regs=regs,
        memory=memory,
        **more,
    )


IRET = {PROT: "iretd", LONG: "iretq", COMPAT: "iretd"}
RET = {PROT: "retf", LONG: "rex.w retf", COMPAT: "retf"}
USER_FRAME = (USER_TEXT, USER_CODE, 0x202, USER_STACK, USER_DATA)
TO_VM86 = (USER_TEXT, 0, 0x20202, USER_STACK, 0x10, 0x20, 0x30, 0x40, 0x50)


def returned(mode: Mode) -> list[Check]:
    """What IRET and far RET check alike; in 64-bit code, IRET pops SS and RSP always."""
    iret, ret = IRET[mode], RET[mode]
    native = {SPARE: code64() if mode is LONG else code_segment()}
    absent = {SPARE: code64(present=False) if mode is LONG else code_segment(present=False)}
    stack = (STACK, KERNEL_DATA)
    at_user = done(USER_TEXT, cs_selector=USER_CODE, ss_selector=USER_DATA, rsp=USER_STACK)
    checks = [
        returns("to user code", iret, USER_FRAME, at_user, mode),
        returns("to user code", ret, (USER_TEXT, USER_CODE, USER_STACK, USER_DATA), at_user, mode),
        returns(
            "at the same level",
            iret,
            (TARGET, SPARE, 2, *stack),
            done(TARGET, cs_selector=SPARE),
            mode,
            gdt=native,
        ),
        returns(
            "at the same level",
            ret,
            (TARGET, SPARE, *stack),
            done(TARGET, cs_selector=SPARE, rsp=STACK - 2 * mode.slot),
            mode,
            gdt=native,
        ),
    ]
    for instruction, flags in ((iret, (2,)), (ret, ())):

        def frame(
            selector: int,
            rip: int = USER_TEXT,
            sp: int = USER_STACK,
            ss: int = USER_DATA,
            flags: tuple[int, ...] = flags,
        ) -> tuple[int, ...]:
            return (rip, selector, *flags, sp, ss)

        checks += [
            returns("to a null selector", instruction, frame(0), gp(0), mode),
            returns("beyond the GDT", instruction, frame(0x1F8), gp(0x1F8), mode),
            returns("to data", instruction, frame(KERNEL_DATA), gp(KERNEL_DATA), mode),
            returns("to an absent segment", instruction, frame(SPARE), np(SPARE), mode, gdt=absent),
            returns("to an inner level", instruction, frame(KERNEL_CODE), gp(KERNEL_CODE), mode, 3),
            returns(
                "with another RPL than the DPL",
                instruction,
                frame(USER_CODE & ~3 | 1),
                gp(USER_CODE & ~3),
                mode,
            ),
            returns(
                "to user code with a null stack", instruction, frame(USER_CODE, ss=0), gp(0), mode
            ),
            returns(
                "to user code with the kernel's stack",
                instruction,
                frame(USER_CODE, ss=KERNEL_DATA),
                gp(KERNEL_DATA),
                mode,
            ),
            returns(
                "to user code with a stack beyond the GDT",
                instruction,
                frame(USER_CODE, ss=0x1FB),
                gp(0x1F8),
                mode,
            ),
            returns(
                "to user code with an absent stack",
                instruction,
                frame(USER_CODE, ss=SPARE | 3),
                ss(SPARE),
                mode,
                gdt={SPARE: segment(dpl=3, present=False)},
            ),
            returns(
                "to user code with a stack of code",
                instruction,
                frame(USER_CODE, ss=USER_CODE),
                gp(USER_CODE & ~3),
                mode,
            ),
            returns(
                "nulls the kernel's segments",
                instruction,
                frame(USER_CODE),
                done(USER_TEXT, ds_selector=0, es_selector=0, fs_selector=USER_DATA),
                mode,
                regs={"fs_selector": USER_DATA, "fs_attr": 0xC0F3},
            ),
        ]
    return checks


RETURN_CHECKS = [
    *returned(PROT),
    *returned(LONG),
    returns(
        "beyond the segment's limit",
        "iretd",
        (0x2000, SPARE, 2),
        gp(0),
        gdt={SPARE: code_segment(limit=0x1FFF, granular=False)},
    ),
    returns(
        "beyond the segment's limit",
        "retf",
        (0x2000, SPARE),
        gp(0),
        gdt={SPARE: code_segment(limit=0x1FFF, granular=False)},
    ),
    returns(
        "to an address that is not canonical",
        "iretq",
        (0x8000_0000_0000, KERNEL_CODE, 2, STACK, KERNEL_DATA),
        gp(0),
        LONG,
    ),
    returns(
        "releases parameters of both stacks",
        "retf 8",
        (USER_TEXT, USER_CODE, 0, 0, USER_STACK, USER_DATA),
        done(USER_TEXT, rsp=USER_STACK + 8),
    ),
    returns(
        "to compatibility mode",
        "iretq",
        (USER_TEXT, USER_CODE32, 2, USER_STACK, USER_DATA),
        done(USER_TEXT, cs_selector=USER_CODE32, cs_attr=0xC0FB),
        LONG,
    ),
    returns(
        "to the kernel with a null stack",
        "iretq",
        (TARGET, KERNEL_CODE, 2, STACK, 0),
        done(TARGET, ss_selector=0),
        LONG,
    ),
    returns(
        "to compatibility mode with a null stack",
        "iretq",
        (TARGET, KERNEL_CODE32, 2, STACK, 0),
        gp(0),
        LONG,
    ),
    returns(
        "sets flags of the kernel",
        "iretd",
        (TARGET, KERNEL_CODE, 0x243202 | 1),
        done(TARGET, iopl=3, cf=1, ac=1, id=1, **{"if": 1}),
    ),
    returns(
        "of user code leaves IF and IOPL",
        "iretd",
        (USER_TEXT, USER_CODE, 0x3203),
        done(USER_TEXT, iopl=0, cf=1, **{"if": 0}),
        ring=3,
    ),
    returns(
        "of user code with IOPL 3 sets IF",
        "iretd",
        (USER_TEXT, USER_CODE, 0x0202),
        done(USER_TEXT, iopl=3, **{"if": 1}),
        ring=3,
        flags=0x3000,
    ),
    returns(
        "of user code cannot enter virtual-8086 mode",
        "iretd",
        (USER_TEXT, USER_CODE, 0x20002),
        done(USER_TEXT, vm=0),
        ring=3,
    ),
    returns(
        "with NT set in long mode",
        "iretq",
        (TARGET, KERNEL_CODE, 2, STACK, KERNEL_DATA),
        gp(0),
        LONG,
        flags=0x4000,
    ),
    returns(
        "with NT set and no task to return to",
        "iretd",
        (TARGET, KERNEL_CODE, 2),
        ts(0),
        flags=0x4000,
    ),
    returns(
        "to virtual-8086 mode",
        "iretd",
        TO_VM86,
        done(
            USER_TEXT,
            vm=1,
            cs_selector=0,
            ss_selector=0x10,
            es_selector=0x20,
            ds_selector=0x30,
            fs_selector=0x40,
            gs_selector=0x50,
            gs_base=0x500,
            ss_limit=0xFFFF,
            rsp=USER_STACK,
        ),
    ),
    returns("to virtual-8086 mode beyond its segment", "iretd", (0x1_0000, *TO_VM86[1:]), gp(0)),
    returns(
        "to virtual-8086 mode keeps IOPL",
        "iretd",
        (USER_TEXT, 0, 0x23202, *TO_VM86[3:]),
        done(USER_TEXT, iopl=3, vm=1),
    ),
    returns(
        "does not enter virtual-8086 mode from long mode",
        "iretq",
        (TARGET, KERNEL_CODE, 0x20002, STACK, KERNEL_DATA),
        done(TARGET, vm=0),
        LONG,
    ),
    Check(
        "prot32: IRETW pops words",
        "iretw",
        done(TARGET, rsp=STACK),
        regs={"rsp": STACK - 6},
        mode=PROT,
        memory={STACK - 6: struct.pack("<3H", TARGET, KERNEL_CODE, 2)} | THERE,
    ),
    Check(
        "long: an interrupt and IRET from user code",
        "int 0x80; mov al, 5",
        done(rax=5, rsp=STACK, ss_selector=USER_DATA),
        LONG,
        3,
        handlers={0x80: "iretq"},
    ),
    Check(
        "prot32: an interrupt and IRET from user code",
        "int 0x80; mov al, 5",
        done(rax=5, rsp=STACK, ss_selector=USER_DATA, ds_selector=USER_DATA),
        PROT,
        3,
        handlers={0x80: "iretd"},
    ),
    Check(
        "compat32: an interrupt and IRET from user code",
        "int 0x80; mov al, 5",
        done(rax=5, rsp=STACK, ss_selector=USER_DATA),
        COMPAT,
        3,
        handlers={0x80: "iretq"},
    ),
]


@each(DIRECT_CHECKS, GATE_CHECKS)
def test_far_transfers(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(INTERRUPT_CHECKS, RETURN_CHECKS)
def test_interrupts_and_returns(engine: Engine, check: Check) -> None:
    run(engine, check)
