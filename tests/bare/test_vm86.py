"""Virtual-8086 mode, with and without CR4.VME, and protected-mode virtual interrupts
(Intel SDM 3B, 21.2 and 21.3; AMD APM 2, 8.10)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import BP, OF, Check, Engine, Expected, done, each, fault, gp, run, ud
from tests.bare.kernel import (
    CODE,
    DATA,
    END,
    KERNEL_CODE,
    KERNEL_STACK,
    PVI,
    REDIRECTION_MAP,
    SPARE,
    STACK,
    USER_CODE,
    VIF,
    VIP,
    VME,
    Mode,
    gate,
    handler,
    segment,
)

IF, IOPL3 = 0x200, 0x3000
# Of INT 0x60 in virtual-8086 mode: where the program's own table leads.
OWN_HANDLER = 0x2F00


def vm86(name: str, code: str, expect: Expected, flags: int = 0, **more: Any) -> Check:
    return Check(name, code, expect, Mode.VM86, 3, flags=flags, **more)


def on(values: int) -> dict[str, tuple[int, int]]:
    return {"cr4": (values, 0)}


# 21.2.7: without VME all of them are the monitor's below IOPL 3.
SENSITIVE = {
    "CLI": "cli",
    "STI": "sti",
    "PUSHF": "pushf",
    "POPF": "push 2; > popf; nop",
    "PUSHFD": "pushfd",
    "INT n": "int 0x60",
    "IRET": "push 2; push 0; push 0; > iret; nop",
}
PLAIN_CHECKS = [
    *(vm86(f"{name} below IOPL 3", code, gp()) for name, code in SENSITIVE.items()),
    vm86("CLI at IOPL 3", "cli", done(**{"if": 0}), IOPL3 | IF),
    vm86("STI at IOPL 3", "sti", done(**{"if": 1}), IOPL3),
    vm86("PUSHF at IOPL 3", "pushf; pop ax", done(rax=IOPL3 | 2), IOPL3),
    vm86("PUSHFD has no VM", "pushfd; pop eax", done(rax=IOPL3 | 2), IOPL3),
    vm86("POPF at IOPL 3 leaves IOPL", "push 0x202; popf", done(iopl=3, vm=1, **{"if": 1}), IOPL3),
    vm86(
        "POPFD leaves VM, VIF and VIP",
        "push 0; push 0x3002; popfd",
        done(vm=1, vif=1, vip=1),
        IOPL3 | VIF | VIP,
    ),
    vm86(
        "IRET at IOPL 3",
        "push 0x202; push 0; push CODE + (1f - start); iret; ud2; 1:; nop",
        done(vm=1, iopl=3, **{"if": 1}),
        IOPL3,
    ),
    vm86(
        "INT n at IOPL 3 is the kernel's",
        "int 0x60",
        fault(0x60, at="behind", vm=1, cs_selector=KERNEL_CODE, now_vm=0),
        IOPL3,
    ),
    vm86("INT3 below IOPL 3 is the kernel's", "int3", fault(BP, vm=1)),
    vm86("INTO below IOPL 3 is the kernel's", "mov al, 127; inc al; into", fault(OF, vm=1)),
    vm86(
        "INT n at IOPL 3 through a gate of DPL 0",
        "int 0x20",
        gp(0x20 << 3 | 2),
        IOPL3,
        idt={0x20: gate(0xE, handler(0x20))},
    ),
    vm86("HLT", "hlt", gp()),
    vm86("HLT at IOPL 3", "hlt", gp(), IOPL3),
    vm86("MOV of a control register", "mov eax, cr0", gp()),
    vm86("LGDT", "lgdt [DATA]", gp()),
    vm86("RDMSR", "rdmsr", gp()),
    vm86("CLTS", "clts", gp()),
    vm86("INVLPG", "invlpg [DATA]", gp()),
    vm86("IN of a port of the map", "in al, END_PORT", done()),
    vm86("IN of another, with IOPL 3 too", "in al, 0x80", gp(), IOPL3),
    vm86("SYSENTER with no CS", "sysenter", gp()),
    vm86(
        "a handler's frame has the segments",
        "ud2",
        ud(
            ds_selector=0,
            fs_selector=0,
            es=0x111,
            ds=0x222,
            fs=0x333,
            gs=0x444,
            rsp=KERNEL_STACK - 36,
        ),
        regs={
            "es_selector": 0x111,
            "ds_selector": 0x222,
            "fs_selector": 0x333,
            "gs_selector": 0x444,
        },
        read={
            "es": (KERNEL_STACK - 16, 2),
            "ds": (KERNEL_STACK - 12, 2),
            "fs": (KERNEL_STACK - 8, 2),
            "gs": (KERNEL_STACK - 4, 2),
        },
    ),
    vm86(
        "a handler of ring 3",
        "int 0x60",
        gp(USER_CODE & ~3),
        IOPL3,
        idt={0x60: gate(0xE, handler(0x60), USER_CODE, dpl=3)},
    ),
    vm86(
        "a conforming handler",
        "int 0x60",
        gp(SPARE),
        IOPL3,
        idt={0x60: gate(0xE, handler(0x60), SPARE, dpl=3)},
        gdt={SPARE: segment(kind=0xF)},
    ),
    vm86(
        "an interrupt and IRETD back",
        "int 0x60; mov al, 5",
        done(rax=5, vm=1, ds_selector=0x222, gs_selector=0x444),
        IOPL3,
        regs={"ds_selector": 0x222, "gs_selector": 0x444},
        handlers={0x60: "iretd"},
    ),
    vm86(
        "a far jump has its base from the selector",
        "jmp 0x100:0x10",
        done(0x10, cs_base=0x1000, cs_selector=0x100),
        memory={CODE + 0x10: END},
    ),
    vm86(
        "32-bit operands and addresses",
        "mov eax, 0x12345678; mov ebx, DATA; mov [ebx], eax",
        done(word=0x12345678),
        read={"word": (DATA, 4)},
    ),
    vm86("ARPL", "arpl ax, bx", ud()),
]


def vme(name: str, code: str, expect: Expected, flags: int = 0, **more: Any) -> Check:
    return vm86(f"VME: {name}", code, expect, flags, change=on(VME), needs=("vme",), **more)


# 21.3.1, tables 21-1 to 21-3. A bit of the map that is set is the kernel's.
OWN_TABLE = {4 * 0x60: struct.pack("<HH", OWN_HANDLER, 0), OWN_HANDLER: END}
KERNELS = {REDIRECTION_MAP + 0x60 // 8: ("B", 1)}
FRAME = {"ip": (STACK - 6, 2), "cs": (STACK - 4, 2), "pushed": (STACK - 2, 2)}
AFTER_INT = {"ip": CODE + 2, "cs": 0, "rsp": STACK - 6}
VME_CHECKS = [
    Check(
        "without VME its bit of CR4 is reserved",
        "mov rax, cr4; or eax, 1; mov cr4, rax",
        gp(),
        needs=("!vme",),
    ),
    Check(
        "without VME the bit of PVI is reserved",
        "mov rax, cr4; or eax, 2; mov cr4, rax",
        gp(),
        needs=("!vme",),
    ),
    vme("CLI clears VIF", "cli", done(vif=0, **{"if": 1}), VIF | IF),
    vme("STI sets VIF", "sti", done(vif=1, **{"if": 0})),
    vme("STI with VIP", "sti", gp(vif=0), VIP),
    vme("CLI with VIP", "cli", done(vif=0, vip=1), VIP | VIF),
    vme("CLI at IOPL 3 clears IF", "cli", done(vif=1, **{"if": 0}), VIF | IF | IOPL3),
    vme("STI at IOPL 3 sets IF", "sti", done(vif=0, **{"if": 1}), IOPL3),
    vme("PUSHF shows VIF as IF, and IOPL 3", "pushf; pop ax", done(rax=IOPL3 | IF | 2), VIF),
    vme("PUSHF without VIF hides IF", "pushf; pop ax", done(rax=IOPL3 | 2), IF),
    vme("PUSHF at IOPL 3 shows IF", "pushf; pop ax", done(rax=IOPL3 | 2), VIF | IOPL3),
    vme("PUSHFD below IOPL 3", "pushfd", gp()),
    vme("POPF sets VIF", "push 0x202; popf", done(vif=1, iopl=0, **{"if": 0})),
    vme("POPF clears VIF", "push 0x002; popf", done(vif=0, **{"if": 1}), VIF | IF),
    vme("POPF sets other flags", "push 0x0C43; popf", done(cf=1, zf=1, df=1, of=1)),
    vme("POPF of IF with VIP", "push 0x202; > popf; nop", gp(rsp=KERNEL_STACK - 40, vif=0), VIP),
    vme("POPF without IF with VIP", "push 0x002; popf", done(vif=0, vip=1), VIP | VIF),
    vme("POPF of TF", "push 0x102; > popf; nop", gp()),
    vme("POPFD below IOPL 3", "push 0; push 2; > popfd; nop", gp()),
    vme(
        "IRET sets VIF",
        "push 0x202; push 0; push CODE + (1f - start); iret; ud2; 1:; nop",
        done(vif=1, **{"if": 0}),
    ),
    vme(
        "IRET clears VIF",
        "push 0x002; push 0; push CODE + (1f - start); iret; ud2; 1:; nop",
        done(vif=0, **{"if": 1}),
        VIF | IF,
    ),
    vme("IRET of IF with VIP", "push 0x202; push 0; push 0; > iret; nop", gp(), VIP),
    vme("IRET of TF", "push 0x102; push 0; push 0; > iret; nop", gp()),
    vme("IRETD below IOPL 3", "push 0; push 2; push 0; push 0; push 0; push 0; > iretd; nop", gp()),
    vme(
        "INT n of the program",
        "int 0x60",
        done(OWN_HANDLER, **AFTER_INT, pushed=IOPL3 | IF | 2, vif=0, vm=1, **{"if": 0}),
        VIF,
        memory=OWN_TABLE,
        read=FRAME,
    ),
    vme(
        "INT n of the program without VIF",
        "int 0x60",
        done(OWN_HANDLER, **AFTER_INT, pushed=IOPL3 | 2, vif=0, **{"if": 1}),
        IF,
        memory=OWN_TABLE,
        read=FRAME,
    ),
    vme(
        "INT n of the program at IOPL 3",
        "int 0x60",
        done(OWN_HANDLER, **AFTER_INT, pushed=IOPL3 | IF | 2, **{"if": 0}),
        IF | IOPL3,
        memory=OWN_TABLE,
        read=FRAME,
    ),
    vme("INT n of the kernel below IOPL 3", "int 0x60", gp(), memory=OWN_TABLE, tss=KERNELS),
    vme(
        "INT n of the kernel at IOPL 3",
        "int 0x60",
        fault(0x60, at="behind", vm=1),
        IOPL3,
        memory=OWN_TABLE,
        tss=KERNELS,
    ),
    vme(
        "INT3 is the kernel's",
        "int3",
        fault(BP, vm=1),
        memory={4 * BP: struct.pack("<HH", OWN_HANDLER, 0)},
    ),
    vme("a map beyond the TSS", "int 0x60", gp(), regs={"tr_limit": 0x70}, memory=OWN_TABLE),
    vme("an exception is the kernel's", "ud2", ud(vm=1)),
]


def pvi(name: str, code: str, expect: Expected, flags: int = 0, ring: int = 3) -> Check:
    return Check(
        f"PVI: {name}", code, expect, Mode.PROT32, ring, flags=flags, change=on(PVI), needs=("vme",)
    )


# 21.4: CLI and STI of user code below IOPL 3.
PVI_CHECKS = [
    pvi("CLI clears VIF", "cli", done(vif=0, **{"if": 1}), VIF | IF),
    pvi("STI sets VIF", "sti", done(vif=1, **{"if": 0})),
    pvi("STI with VIP", "sti", gp(vif=0), VIP),
    pvi("CLI at IOPL 3 clears IF", "cli", done(vif=1, **{"if": 0}), VIF | IF | IOPL3),
    pvi("CLI of the kernel clears IF", "cli", done(vif=1, **{"if": 0}), VIF | IF, 0),
    pvi("CLI of ring 1", "cli", gp(), VIF, 1),
    pvi("PUSHF shows IF", "pushfd; pop eax", done(rax=VIF | 2), VIF),
    pvi("POPF leaves VIF", "push 0x202; popfd", done(vif=0, **{"if": 0})),
]


@each(PLAIN_CHECKS, VME_CHECKS, PVI_CHECKS)
def test_virtual_8086(engine: Engine, check: Check) -> None:
    run(engine, check)
