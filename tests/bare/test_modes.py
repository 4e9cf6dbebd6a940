"""Widths of code, stack and addresses, port rights, ways between the modes, and control bits that
change while code runs (Intel SDM 3A, 10.9, 21.1, 22.2; 1, 3.3, 3.6, 6.2, 19.5;
AMD APM 2, 1.2 and 14.6)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import (
    PF,
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
    DATA,
    END,
    FRAME,
    GDT,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_STACK,
    NX,
    PAGE,
    PORT_MAP,
    PSE,
    SPARE,
    STACK,
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
    segment,
)

TARGET = 0x2F00
THERE = {TARGET: END}
REAL, PROT16, PROT32, LONG, COMPAT16 = (
    Mode.REAL, Mode.PROT16, Mode.PROT32, Mode.LONG, Mode.COMPAT16,
)  # fmt: skip
STACK16 = {"ss_attr": 0x93, "ss_limit": 0xFFFF}
HIGH_ESP = {"rsp": 0x5A5A_8FF0}

# SDM 1, 3.6: the code's default and the prefixes.
WIDTH_CHECKS = [
    Check(
        "16-bit operands of 16-bit code",
        "mov eax, -1; .byte 0xB8, 0x34, 0x12",
        done(rax=0xFFFF_1234),
        PROT16,
    ),
    Check("32-bit operands of 16-bit code", "mov eax, 0x12345678", done(rax=0x1234_5678), PROT16),
    Check(
        "compatibility mode of 16 bits",
        "mov eax, -1; .byte 0xB8, 0x34, 0x12",
        done(rax=0xFFFF_1234),
        COMPAT16,
    ),
    Check(
        "32-bit results clear the upper half in 64-bit code",
        "mov rax, -1; mov eax, eax",
        done(rax=0xFFFF_FFFF),
    ),
    Check("16-bit results leave it", "mov rax, -1; mov ax, 0", done(rax=0xFFFF_FFFF_FFFF_0000)),
    Check(
        "16-bit addresses wrap at 64 KiB",
        "mov bx, 0xFFFF; mov al, [bx + 0x11]",
        done(rax=0x5A),
        PROT16,
        memory={0x10: b"\x5a"},
    ),
    Check(
        "16-bit addresses of 32-bit code",
        "mov ebx, 0x5A5AA000; .byte 0x67, 0x8A, 0x07",
        done(rax=0x5A),
        PROT32,
        memory={DATA: b"\x5a"},
    ),
    Check(
        "32-bit addresses of 64-bit code wrap at 4 GiB",
        "mov rbx, 0x5A5A00000000 + DATA; mov al, [ebx]",
        done(rax=0x5A),
        memory={DATA: b"\x5a"},
    ),
    Check(
        "32-bit addresses of 64-bit code are zero-extended",
        "mov ebx, 0xFFFFFFFF; mov al, [ebx + DATA + 1]",
        done(rax=0x5A),
        memory={DATA: b"\x5a"},
    ),
    Check(
        "a near CALL of 16 bits pushes a word",
        ".byte 0x66, 0xE8, 0, 0",
        done(rsp=STACK - 2),
        PROT32,
    ),
    Check(
        "a near JMP of 16 bits truncates EIP",
        "mov eax, 0x50002F00; .byte 0x66, 0xFF, 0xE0",
        done(TARGET),
        PROT32,
        memory=THERE,
    ),
    Check(
        "a near RET of 16 bits pops a word",
        "push 0x2F005A5A; inc esp; inc esp; .byte 0x66, 0xC3",
        done(TARGET, rsp=STACK),
        PROT32,
        memory=THERE,
    ),
    Check(
        "JCXZ counts with the address size",
        "mov ecx, 0x10000; .byte 0x67, 0xE3, 2; ud2; 1:; nop",
        done(),
        PROT32,
    ),
    Check(
        "JECXZ counts with 32 bits",
        "mov ecx, 0x10000; jecxz 1f; mov al, 5; 1:; nop",
        done(rax=5),
        PROT32,
    ),
    Check(
        "LOOP of 16 bits leaves the upper half",
        "mov ecx, 0x5A5A0001; .byte 0x67, 0xE2, 0",
        done(rcx=0x5A5A_0000),
        PROT32,
    ),
    Check(
        "LOOP of 32 bits in 64-bit code clears the upper half",
        "mov rcx, 0x5A5A00000001; .byte 0x67, 0xE2, 0",
        done(rcx=0),
    ),
    Check(
        "REP of 16-bit addresses wraps DI",
        "mov eax, 0x5A; mov edi, 0xFFFF; mov ecx, 2; cld; rep stosb",
        done(rdi=1, rcx=0, first=0x5A),
        PROT16,
        regs={"es_limit": 0xFFFF},
        read={"first": (0, 1)},
    ),
    Check(
        "REP of 16-bit addresses counts with CX",
        "mov ecx, 0x5A5A0002; mov edi, DATA; .byte 0x67, 0xF3, 0xAA",
        done(rcx=0x5A5A_0000, rdi=DATA + 2),
        PROT32,
    ),
    Check(
        "a string backwards",
        "mov edi, DATA + 4; mov eax, 0x11223344; mov ecx, 2; std; rep stosd",
        done(rdi=DATA - 4, word=0x1122_3344),
        PROT32,
        read={"word": (DATA, 4)},
    ),
    Check(
        "IP wraps at the end of a 16-bit segment with #GP",
        "jmp 0:0xFFFF",
        gp(at=0xFFFF),
        REAL,
        memory={0xFFFF: b"\xb0\x05"},
    ),
    Check(
        "a short jump over the end of 16 bits wraps",
        "jmp 0:0xFFF0",
        done(0x10),
        REAL,
        memory={0xFFF0: b"\xeb\x1e", 0x10: END, 0x11: END[1:]},
    ),
    Check("CBW to CDQE", "mov rax, 0x80; cbw; cwde; cdqe", done(rax=0xFFFF_FFFF_FFFF_FF80)),
]

# SDM 1, 6.2: the width of the stack is that of SS.
STACK_CHECKS = [
    Check(
        "PUSH of 32 bits on a 16-bit stack",
        "push eax",
        done(rsp=0x5A5A_8FEC),
        PROT32,
        regs=STACK16 | HIGH_ESP,
    ),
    Check(
        "POP on a 16-bit stack", "pop eax", done(rsp=0x5A5A_8FF4), PROT32, regs=STACK16 | HIGH_ESP
    ),
    Check(
        "CALL on a 16-bit stack",
        "call 1f; 1:; nop",
        done(rsp=0x5A5A_8FEC),
        PROT32,
        regs=STACK16 | HIGH_ESP,
    ),
    Check(
        "PUSHAD on a 16-bit stack", "pushad", done(rsp=0x5A5A_8FD0), PROT32, regs=STACK16 | HIGH_ESP
    ),
    Check(
        "POPAD leaves ESP's upper half",
        "popad",
        done(rsp=0x5A5A_8FF0 + 32),
        PROT32,
        regs=STACK16 | HIGH_ESP,
    ),
    Check(
        "ENTER on a 16-bit stack",
        "enter 16, 0",
        done(rsp=0x5A5A_8FDC, rbp=0x8FEC),
        PROT32,
        regs=STACK16 | HIGH_ESP | {"rbp": 0},
    ),
    Check(
        "LEAVE on a 16-bit stack takes BP",
        "leave",
        done(rsp=0x5A5A_8FE4),
        PROT32,
        regs=STACK16 | HIGH_ESP | {"rbp": 0x1111_8FE0},
    ),
    Check(
        "an INT on a 16-bit stack",
        "int 0x80",
        done(TARGET, rsp=0x5A5A_8FE4),
        PROT32,
        regs=STACK16 | HIGH_ESP,
        idt={0x80: 0x8E00 << 32 | KERNEL_CODE << 16 | TARGET},
        memory=THERE,
    ),
    Check("a push wraps SP to the top", "push ax", done(rsp=0xFFFE), REAL, regs={"rsp": 0}),
    Check(
        "unreal mode: a stack of 32 bits",
        "push eax",
        done(rsp=0x1_0000 - 4),
        REAL,
        regs={"rsp": 0x1_0000, "ss_attr": 0xC093, "ss_limit": 0xFFFF_FFFF},
    ),
    Check("64-bit code pushes 8 bytes", "push rax", done(rsp=STACK - 8)),
    Check("64-bit code pushes words with a prefix", ".byte 0x66, 0x50", done(rsp=STACK - 2)),
    Check("64-bit code pushes FS in 8 bytes", "push fs", done(rsp=STACK - 8)),
    Check("32-bit code pushes a selector in 4 bytes", "push ds", done(rsp=STACK - 4), PROT32),
    Check("64-bit code does not push ES", ".byte 0x06", ud()),
    Check("64-bit code has no PUSHA", ".byte 0x60", ud()),
    Check(
        "64-bit code has no far pointers in its instructions", ".byte 0xEA, 0, 0, 0, 0, 0, 0", ud()
    ),
    Check("64-bit code has no AAA", ".byte 0x37", ud()),
    Check("PUSH of SP is the old one", "push rsp; pop rax", done(rax=STACK)),
    Check(
        "POP to memory by RSP counts from behind",
        "push 0x55; .byte 0x8F, 0x44, 0x24, 0xF8; mov rax, [rsp - 8]",
        done(rax=0x55),
    ),
    Check("POP of RSP", "push 0xA000; pop rsp", done(rsp=DATA)),
    Check(
        "a push to an address that is not canonical",
        "push rax",
        ss(),
        regs={"rsp": 0x8000_0000_0008},
        idt={12: 0x8E01 << 32 | KERNEL_CODE << 16 | 0x2060},
    ),
    Check(
        "RET to an address that is not canonical",
        "push rax; mov rcx, 1 << 47; mov [rsp], rcx; ret",
        by_vendor(intel=gp(), amd=any_of(gp(), gp(at=1 << 47))),
    ),
    Check(
        "CALL to an address that is not canonical",
        "mov rcx, 1 << 47; > call rcx; nop",
        by_vendor(intel=gp(), amd=any_of(gp(), gp(at=1 << 47))),
    ),
    Check(
        "JMP through memory to an address that is not canonical",
        "jmp [DATA]",
        by_vendor(intel=gp(), amd=any_of(gp(), gp(at=1 << 47))),
        memory={DATA: struct.pack("<Q", 1 << 47)},
    ),
]


def mapped(port: int, value: int) -> dict[int, tuple[str, int]]:
    return {PORT_MAP + port // 8: ("B", value)}


# SDM 1, 19.5.2: the map of ports; a byte beyond its end forbids.
PORT_CHECKS = [
    Check("a port whose bit is set", "mov edx, 0x80; in al, dx", gp(), ring=3),
    Check(
        "a port whose bit is clear",
        "mov edx, 0x80; in al, dx",
        done(),
        ring=3,
        tss=mapped(0x80, 0xFE),
    ),
    Check(
        "two ports across bytes of the map",
        "mov edx, 0x87; in ax, dx",
        done(),
        ring=3,
        tss=mapped(0x80, 0x7F) | mapped(0x88, 0xFE),
    ),
    Check(
        "two ports, the second forbidden",
        "mov edx, 0x87; in ax, dx",
        gp(),
        ring=3,
        tss=mapped(0x80, 0x7F),
    ),
    Check(
        "four ports, the last forbidden",
        "mov edx, 0x84; in eax, dx",
        gp(),
        ring=3,
        tss=mapped(0x80, 0x8F),
    ),
    Check("four ports", "mov edx, 0x84; in eax, dx", done(), ring=3, tss=mapped(0x80, 0x0F)),
    Check("a port beyond the map", "mov edx, 0x200; in al, dx", gp(), ring=3),
    Check("a map beyond the TSS", "in al, END_PORT", gp(), ring=3, tss={0x66: ("H", 0x1000)}),
    Check(
        "a TSS of 16 bits has no map",
        "in al, END_PORT",
        gp(),
        PROT32,
        3,
        regs={"tr_attr": 0x83},
        tss={2: ("H", KERNEL_STACK), 4: ("H", KERNEL_DATA)},
    ),
    Check("ring 0 asks no map", "mov edx, 0x200; in al, dx", done()),
    Check(
        "ring 1 with IOPL 1 asks no map", "mov edx, 0x200; in al, dx", done(), ring=1, flags=0x1000
    ),
    Check("ring 2 with IOPL 1 asks it", "mov edx, 0x200; in al, dx", gp(), ring=2, flags=0x1000),
    Check("CLI of ring 1", "cli", gp(), PROT32, 1),
    Check("CLI of ring 1 with IOPL 1", "cli", done(**{"if": 0}), PROT32, 1, flags=0x1200),
    Check("HLT of ring 1", "hlt", gp(), PROT32, 1),
    Check("RDMSR of ring 2", "rdmsr", gp(), PROT32, 2),
    Check(
        "OUTSB with its port forbidden",
        "mov edx, 0x80; mov esi, DATA; > outsb; nop",
        gp(rsi=DATA),
        ring=3,
    ),
    Check(
        "INSB to a page that is absent",
        "mov edx, END_PORT; mov edi, PAGE; > insb; nop",
        pf(W | U),
        ring=3,
    ),
    Check(
        "OUTSB of a page that is absent",
        "mov edx, END_PORT; mov esi, PAGE; > outsb; nop",
        pf(U),
        ring=3,
    ),
    Check(
        "INSB to a read-only page",
        "mov edx, END_PORT; mov edi, PAGE; > insb; nop",
        pf(P | W | U),
        ring=3,
        page=Page(P | U | A),
    ),
]


def rows(*lines: str) -> str:
    return "; ".join(lines)


CR0_ON = "mov rcx, cr0; or ecx, 0x10000; mov cr0, rcx"
CR0_OFF = "mov rcx, cr0; and ecx, 0xFFFEFFFF; mov cr0, rcx"
SMEP_ON = "mov rcx, cr4; or ecx, 0x100000; mov cr4, rcx"
NXE_ON = "mov ecx, 0xC0000080; rdmsr; or eax, 0x800; wrmsr"
NXE_OFF = "mov ecx, 0xC0000080; rdmsr; and eax, 0xFFFFF7FF; wrmsr"
CALL = "mov ebx, PAGE; call rbx"
RET_THERE = {FRAME: b"\xc3"}
# What was found under other control bits is not trusted under the new ones (4.10.4.1).
TOGGLE_CHECKS = [
    Check(
        "WP off, a write, WP on: a write",
        rows("mov [PAGE], al", CR0_ON, "> mov [PAGE], al; nop"),
        pf(P | W),
        page=Page(P | A | D),
        change={"cr0": (0, WP)},
    ),
    Check(
        "WP off allows what WP forbade",
        rows(CR0_OFF, "mov [PAGE], al", "nop"),
        done(),
        page=Page(P | A | D),
    ),
    Check(
        "SMEP on: a user's page that ran before",
        rows(CALL, SMEP_ON, "call rbx"),
        pf(P | 16, at=PAGE),
        page=Page(P | U | A),
        memory=RET_THERE,
        needs=("smep",),
    ),
    Check(
        "NXE on: a page with NX that was reserved before",
        rows(NXE_OFF, "mov cr3, rsi", NXE_ON, "mov al, [PAGE]", "nop"),
        done(),
        page=Page(P | A | NX),
        regs={"rsi": TABLES},
    ),
    Check(
        "NXE off: NX is reserved",
        rows("mov al, [PAGE]", NXE_OFF, "> mov al, [PAGE]; nop"),
        pf(P | 8),
        page=Page(P | A | NX),
    ),
    Check(
        "AM on: a user's word off its alignment",
        "mov eax, [DATA + 1]",
        fault(17, 0),
        ring=3,
        flags=1 << 18,
        change={"cr0": (1 << 18, 0)},
    ),
    Check(
        "PSE on: PS makes a large page",
        rows("mov eax, cr4; or eax, 0x10; mov cr4, eax", "mov bl, [PAGE + 0x5000]", "nop"),
        done(rbx=0xB0),
        Mode.PAGED32,
        page=Page(P | W | A, bits=22),
        change={"cr4": (0, PSE)},
        memory={0x40_5000: b"\xb0"},
    ),
    Check(
        "paging off: the linear address is physical",
        rows("mov ecx, cr0; and ecx, 0x7FFFFFFF; mov cr0, ecx", "mov eax, [FRAME]"),
        done(rax=0x1234),
        Mode.PAGED32,
        memory={FRAME: struct.pack("<I", 0x1234)},
    ),
    Check(
        "paging on again",
        rows(
            "mov ecx, cr0; and ecx, 0x7FFFFFFF; mov cr0, ecx; or ecx, 0x80000000; mov cr0, ecx",
            "mov eax, [PAGE]",
        ),
        done(rax=0x1234),
        Mode.PAGED32,
        page=Page(P | A),
        memory={FRAME: struct.pack("<I", 0x1234)},
    ),
    Check(
        "global pages outlive paging off only by flushes",
        rows(
            "mov eax, [PAGE]",
            "mov ecx, cr0; and ecx, 0x7FFFFFFF; mov cr0, ecx",
            "mov dword ptr [TABLES + 0x2000], esi",
            "or ecx, 0x80000000; mov cr0, ecx",
            "mov eax, [PAGE]",
        ),
        done(rax=0x5678),
        Mode.PAGED32,
        page=Page(P | A | G),
        regs={"rsi": FRAME + 0x1000 | P | A | G},
        memory={FRAME: struct.pack("<I", 0x1234), FRAME + 0x1000: struct.pack("<I", 0x5678)},
    ),
    Check(
        "an instruction across two pages, the second absent",
        "mov eax, PAGE + 0xFFE; jmp rax",
        fault(PF, 16, at=PAGE + 0xFFE, cr2=PAGE + 0x1000),
        page=Page(P | A),
        memory={FRAME + 0xFFE: b"\xb8\x00"},
    ),
    Check(
        "an instruction that ends with its page",
        "mov eax, PAGE + 0xFFE; jmp rax",
        done(PAGE + 0xFFE),
        page=Page(P | A),
        memory={FRAME + 0xFFE: END},
    ),
    Check(
        "a read-modify-write of a read-only page that is the kernel's",
        "lock inc dword ptr [PAGE]",
        pf(P | W),
        page=Page(P | A),
    ),
    Check(
        "CMPXCHG of a read-only page faults though it does not match",
        "mov eax, 1; lock cmpxchg [PAGE], ecx",
        pf(P | W),
        page=Page(P | A),
    ),
    Check("XADD of a page that is absent", "lock xadd [PAGE], ecx", any_of(pf(W), pf(0))),
]

# Code that switches modes goes on in their width.
TABLE = {DATA: struct.pack("<HI", 0x17F, GDT)}
FLAT = {
    GDT: struct.pack(
        "<4Q",
        0,
        segment(kind=0xB),
        segment(),
        segment(kind=0xB, big=False, granular=False, limit=0xFFFF),
    )
}
GATE_TO_64 = segment(kind=0xB, big=False, long=True)


def way(name: str, code: str, expect: Expected, mode: Mode, **more: Any) -> Check:
    return Check(f"{mode.value}: {name}", code, expect, mode, **more)


FLAT_AGAIN = {"memory": TABLE | FLAT | THERE}
WAY_CHECKS = [
    way(
        "to 32-bit protected mode",
        "lgdt [DATA]; mov eax, cr0; or al, 1; mov cr0, eax; .byte 0x66, 0xEA, 0, 0x2F, 0, 0, 8, 0",
        done(TARGET, cs_attr=0xC09B),
        REAL,
        **FLAT_AGAIN,
    ),
    way(
        "to 16-bit protected mode",
        "lgdt [DATA]; mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xEA, 0, 0x2F, 0x18, 0",
        done(TARGET, cs_attr=0x9B),
        REAL,
        **FLAT_AGAIN,
    ),
    way(
        "segments keep their bases into protected mode",
        "mov ax, 0xA00; mov ds, ax; mov eax, cr0; or al, 1; mov cr0, eax; mov bl, [1]",
        done(rbx=0x5A, ds_base=DATA),
        REAL,
        memory={DATA + 1: b"\x5a"},
    ),
    way(
        "back to real mode: segments keep 4 GiB",
        "mov eax, cr0; and al, 0xFE; mov cr0, eax; mov ebx, 0x30000; mov al, [ebx]; mov ah, 0",
        done(cr0=0x30),
        PROT16,
        memory={0x30000: b"\x5a"},
    ),
    way(
        "back to real mode: a far jump sets CS's base",
        "mov eax, cr0; and al, 0xFE; mov cr0, eax; .byte 0xEA, 0, 0x0F, 0, 2",
        done(0xF00, cs_base=0x2000, cs_selector=0x200),
        PROT16,
        memory=THERE,
    ),
    way(
        "paging, PAE and LME make long mode",
        rows(
            "mov eax, cr4; or eax, 0x20; mov cr4, eax",
            "mov eax, TABLES; mov cr3, eax",
            "mov ecx, 0xC0000080; rdmsr; or eax, 0x100; wrmsr",
            "mov eax, cr0; or eax, 0x80000000; mov cr0, eax",
            "mov ecx, 0xC0000080; rdmsr; and eax, 0x500",
        ),
        done(rax=0x500),
        PROT32,
    ),
    way(
        "and a far jump to 64-bit code",
        rows(
            "mov eax, cr4; or eax, 0x20; mov cr4, eax",
            "mov eax, TABLES; mov cr3, eax",
            "mov ecx, 0xC0000080; rdmsr; or eax, 0x100; wrmsr",
            "mov eax, cr0; or eax, 0x80000000; mov cr0, eax",
            "jmp SPARE:0x2F00",
        ),
        done(TARGET, cs_attr=0xA09B),
        PROT32,
        gdt={SPARE: GATE_TO_64},
        memory=THERE,
    ),
    way(
        "from long mode by paging off",
        rows(
            "mov eax, cr0; and eax, 0x7FFFFFFF; mov cr0, eax",
            "mov ecx, 0xC0000080; rdmsr; and eax, 0x500",
        ),
        done(rax=0x100),
        Mode.COMPAT32,
    ),
    way(
        "LME cannot change while paging is on",
        "mov ecx, 0xC0000080; rdmsr; and eax, 0xFFFFFEFF; > wrmsr; nop",
        gp(),
        Mode.COMPAT32,
    ),
    way(
        "LME with paging on and PAE off",
        "mov ecx, 0xC0000080; rdmsr; or eax, 0x100; > wrmsr; nop",
        gp(),
        Mode.PAGED32,
    ),
    way(
        "an IDT elsewhere",
        "lidt [DATA]; int 0x80",
        done(TARGET),
        REAL,
        memory={
            DATA: struct.pack("<HI", 0x3FF, 0x30000),
            0x30000 + 4 * 0x80: struct.pack("<HH", TARGET, 0),
            **THERE,
        },
    ),
    way("#UD", "ud2", ud(), REAL),
    way("#DE", "xor cx, cx; > div cx; nop", fault(0), REAL),
    way("a fault pushes no error code", "mov bx, 0xFFFF; mov ax, [bx]", gp(rsp=STACK - 6), REAL),
    way("INTO", "mov al, 127; inc al; > into; nop", fault(4), REAL),
    way(
        "an interrupt in the middle of the table's limit",
        "int 0x80",
        gp(),
        REAL,
        regs={"idtr_limit": 4 * 0x80 + 2},
    ),
    way(
        "the last entry of the table",
        "int 0x80",
        fault(0x80, at="behind"),
        REAL,
        regs={"idtr_limit": 4 * 0x80 + 3},
    ),
    way("LMSW ends real mode", "mov ax, 1; lmsw ax; smsw ax", done(rax=0x31), REAL),
    way("SYSRET", ".byte 0x0F, 7", ud(), REAL),
    way(
        "a far RET takes any selector",
        "push 0x200; push 0xF00; retf",
        done(0xF00, cs_base=0x2000),
        REAL,
        memory=THERE,
    ),
    way(
        "32-bit IRET",
        "pushfd; push 0; push cs; .byte 0x66, 0x68, 0, 0x2F, 0, 0; iretd",
        done(TARGET, rsp=STACK),
        REAL,
        memory=THERE,
    ),
]


@each(WIDTH_CHECKS, STACK_CHECKS)
def test_widths(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(PORT_CHECKS)
def test_ports(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(TOGGLE_CHECKS, WAY_CHECKS)
def test_modes(engine: Engine, check: Check) -> None:
    run(engine, check)
