"""Exceptions: error codes, which of several comes first, and faults within faults
(Intel SDM 3A, 6.3 to 6.15; AMD APM 2, 8.2 to 8.5)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import (
    AC_,
    BP,
    BR,
    DB,
    DE,
    DF,
    GP,
    MF,
    NM,
    NP,
    OF,
    PF,
    SHUTDOWN,
    SS,
    TS_,
    Check,
    Engine,
    any_of,
    done,
    each,
    fault,
    gp,
    np,
    pf,
    run,
    ss,
    ts,
    ud,
)
from tests.bare.kernel import (
    AC,
    AM,
    CODE1,
    DATA,
    EM,
    FRAME,
    KERNEL_CODE,
    KERNEL_DATA,
    MP,
    OSFXSR,
    PAGE,
    SPARE,
    STACK,
    TS,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    A,
    Mode,
    P,
    Page,
    U,
    W,
    gate,
    handler,
    segment,
)

# Table 6-1: each exception's vector, its error code, and where it leaves RIP.
VECTOR_CHECKS = [
    Check("#DE of a division by zero", "> div ecx; nop", fault(DE)),
    Check(
        "#DE of a quotient that does not fit", "mov eax, 1; mov edx, 1; > div edx; nop", fault(DE)
    ),
    Check(
        "#DE of IDIV of the least number by -1",
        "mov eax, 1 << 31; cdq; mov ecx, -1; > idiv ecx; nop",
        fault(DE),
    ),
    Check("#DE of AAM 0", "> .byte 0xD4, 0; nop", fault(DE), Mode.PROT32),
    Check("#BP of INT3 is a trap", "> int3; nop", fault(BP)),
    Check("#OF of INTO is a trap", "mov al, 127; inc al; > into; nop", fault(OF), Mode.PROT32),
    Check("INTO without OF goes on", "xor eax, eax; into", done(), Mode.PROT32),
    Check("INTO is no instruction in 64-bit code", "> .byte 0xCE; nop", ud()),
    Check(
        "#BR of BOUND below",
        "mov ecx, 4; > bound ecx, [DATA]; nop",
        fault(BR),
        Mode.PROT32,
        memory={DATA: struct.pack("<ii", 5, 9)},
    ),
    Check(
        "#BR of BOUND above",
        "mov ecx, 10; > bound ecx, [DATA]; nop",
        fault(BR),
        Mode.PROT32,
        memory={DATA: struct.pack("<ii", 5, 9)},
    ),
    Check(
        "BOUND at the upper bound goes on",
        "mov ecx, 9; bound ecx, [DATA]",
        done(),
        Mode.PROT32,
        memory={DATA: struct.pack("<ii", -5, 9)},
    ),
    Check("#UD of UD2", "> ud2; nop", ud()),
    Check("#UD of UD1", "> ud1 eax, ecx; nop", ud()),
    Check("#UD of LOCK with a register", "> .byte 0xF0, 0x01, 0xC1; nop", ud()),
    Check("#UD of LOCK MOV", "> .byte 0xF0, 0x89, 0x07; nop", ud()),
    Check("#UD of MOV to CS", "> .byte 0x8E, 0xC8; nop", ud()),
    Check("#UD of LDS with a register", "> .byte 0xC5, 0xC0; nop", ud(), Mode.REAL),
    Check("#UD of CR1", "> .byte 0x0F, 0x20, 0xC8; nop", ud()),
    Check("#GP of 16 bytes of instruction", "> .fill 15, 1, 0x66; nop; nop", gp()),
    Check("#NM of x87 with TS", "> fnop; nop", fault(NM), change={"cr0": (TS, 0)}),
    Check("#NM of x87 with EM", "> fnop; nop", fault(NM), change={"cr0": (EM, 0)}),
    Check("#NM of SSE with TS", "> movaps xmm0, xmm1; nop", fault(NM), change={"cr0": (TS, 0)}),
    Check("#UD of SSE with EM", "> movaps xmm0, xmm1; nop", ud(), change={"cr0": (EM, 0)}),
    Check(
        "#UD of SSE with EM comes before #NM",
        "> movaps xmm0, xmm1; nop",
        ud(),
        change={"cr0": (EM | TS, 0)},
    ),
    Check(
        "#UD of SSE without OSFXSR", "> movaps xmm0, xmm1; nop", ud(), change={"cr4": (0, OSFXSR)}
    ),
    Check("#UD of MMX with EM", "> emms; nop", ud(), change={"cr0": (EM, 0)}),
    Check("#NM of MMX with TS", "> emms; nop", fault(NM), change={"cr0": (TS, 0)}),
    Check("WAIT with TS alone goes on", "fwait", done(), change={"cr0": (TS, MP)}),
    Check("#NM of WAIT with TS and MP", "> fwait; nop", fault(NM), change={"cr0": (TS | MP, 0)}),
    Check("CLTS ends #NM", "clts; fnop", done(), change={"cr0": (TS, 0)}),
    Check(
        "#MF of the next waiting instruction",
        "fninit; fldcw [DATA]; fldz; fld1; fdivrp; fnop; > fwait; nop",
        any_of(fault(MF), fault(MF, at=0x1000 + 15)),
        memory={DATA: struct.pack("<H", 0x37B)},
    ),
    Check(
        "x87 instructions that do not wait leave #MF",
        "fninit; fldcw [DATA]; fldz; fld1; fdivrp; fnstsw ax; fnclex; fwait",
        done(),
        memory={DATA: struct.pack("<H", 0x37B)},
    ),
    Check(
        "#AC of a user's word",
        "> mov ax, [DATA + 1]; nop",
        fault(AC_),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "#AC of a user's doubleword",
        "> mov eax, [DATA + 2]; nop",
        fault(AC_),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "#AC of a user's quadword",
        "> mov rax, [DATA + 4]; nop",
        fault(AC_),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "#AC of a user's store",
        "> mov [DATA + 1], eax; nop",
        fault(AC_),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "#AC of a user's push",
        "dec rsp; > push rax; nop",
        fault(AC_),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "#AC of a 32-bit user",
        "> mov eax, [DATA + 1]; nop",
        fault(AC_),
        Mode.PROT32,
        3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check("no #AC without AM", "mov eax, [DATA + 1]", done(), ring=3, flags=AC),
    Check("no #AC without AC", "mov eax, [DATA + 1]", done(), ring=3, change={"cr0": (AM, 0)}),
    Check("no #AC of the kernel", "mov eax, [DATA + 1]", done(), flags=AC, change={"cr0": (AM, 0)}),
    Check(
        "no #AC of a word at an even address",
        "mov ax, [DATA + 2]",
        done(),
        ring=3,
        flags=AC,
        change={"cr0": (AM, 0)},
    ),
    Check(
        "no #AC of a byte", "mov al, [DATA + 1]", done(), ring=3, flags=AC, change={"cr0": (AM, 0)}
    ),
    Check(
        "AC that POPF sets counts at once",
        "pushfq; bts dword ptr [rsp], 18; popfq; > mov eax, [DATA + 1]; nop",
        fault(AC_),
        ring=3,
        change={"cr0": (AM, 0)},
    ),
    Check("#GP of MOVAPS off its alignment", "> movaps xmm0, [DATA + 8]; nop", gp()),
    Check("#GP of CMPXCHG16B off its alignment", "> cmpxchg16b [DATA + 8]; nop", gp()),
    Check("a fault saves RF", "> ud2; nop", ud(rf=1)),
    Check("a trap saves no RF", "> int3; nop", fault(BP, rf=0)),
    Check(
        "an interrupt gate clears IF, NT, TF and RF",
        "> int 0x80; nop",
        fault(0x80, at="behind", **{"if": 1, "nt": 1}),
        flags=0x4200,
    ),
]


def user(name: str, code: str) -> Check:
    return Check(f"privileged: {name}", code, gp(), ring=3)


# 5.9: instructions of CPL 0, and those of IOPL.
PRIVILEGED_CHECKS = [
    user("HLT", "hlt"),
    user("CLI", "cli"),
    user("STI", "sti"),
    user("CLTS", "clts"),
    user("INVD", "invd"),
    user("WBINVD", "wbinvd"),
    user("LGDT", "lgdt [DATA]"),
    user("LIDT", "lidt [DATA]"),
    user("LLDT", "lldt ax"),
    user("LTR", "ltr ax"),
    user("LMSW", "lmsw ax"),
    user("MOV from CR0", "mov rax, cr0"),
    user("MOV to CR0", "mov cr0, rax"),
    user("MOV from CR2", "mov rax, cr2"),
    user("MOV from CR3", "mov rax, cr3"),
    user("MOV to CR4", "mov cr4, rax"),
    user("MOV from CR8", "mov rax, cr8"),
    user("MOV from DR0", "mov rax, dr0"),
    user("MOV to DR7", "mov dr7, rax"),
    user("RDMSR", "rdmsr"),
    user("WRMSR", "wrmsr"),
    user("SWAPGS", "swapgs"),
    user("IN", "in al, dx"),
    user("OUT", "out dx, al"),
    user("INS", "insb"),
    user("RDPMC", "rdpmc"),
    user("SYSRET", "sysretq"),
    Check("CLI with IOPL 3", "cli", done(**{"if": 0}), ring=3, flags=0x3200),
    Check("IN with IOPL 3", "mov dx, END_PORT; in al, dx", done(), ring=3, flags=0x3000),
    Check("IN of a port of the map", "in al, END_PORT", done(), ring=3),
    Check("IN of two ports of which the map has one", "in ax, END_PORT", gp(), ring=3),
    Check(
        "POPF of user code leaves IF and IOPL",
        "push 0x3202; popfq",
        done(iopl=0, **{"if": 0}),
        ring=3,
    ),
    Check(
        "POPF of IOPL 3 changes IF",
        "push 0x0202; popfq",
        done(iopl=3, **{"if": 1}),
        ring=3,
        flags=0x3000,
    ),
]

ABSENT = gate(0xE, 0, present=False)
BAD_CODE = gate(0xE, 0, KERNEL_DATA)
BAD_STACK = {"rsp": PAGE + 0x800}
AT_USER = gate(0xE, handler(TS_), USER_CODE, dpl=3)


def of_idt(vector: int, ext: int = 0) -> int:
    return vector << 3 | 2 | ext


# 6.13: error codes of what an interrupt meets on its way.
DELIVERY_CHECKS = [
    Check("INT of an absent gate", "int 0x80", np(of_idt(0x80)), idt={0x80: ABSENT}),
    Check("INT of a gate that is none", "int 0x80", gp(of_idt(0x80)), idt={0x80: gate(0xC, 0)}),
    Check(
        "INT of a data segment",
        "int 0x80",
        gp(KERNEL_DATA),
        idt={0x80: gate(0xE, 0, KERNEL_DATA, dpl=3)},
    ),
    Check("INT of a null selector", "int 0x80", gp(0), idt={0x80: gate(0xE, 0, 0)}),
    Check(
        "INT of a selector beyond the GDT", "int 0x80", gp(0x1F8), idt={0x80: gate(0xE, 0, 0x1F8)}
    ),
    Check(
        "INT of an absent code segment",
        "int 0x80",
        np(SPARE),
        idt={0x80: gate(0xE, 0, SPARE)},
        gdt={SPARE: segment(kind=0xB, big=False, long=True, present=False)},
    ),
    Check("INT beyond the IDT", "int 0x80", gp(of_idt(0x80)), regs={"idtr_limit": 0x7FF}),
    Check(
        "INT of user code through a kernel's gate",
        "int 0x21",
        gp(of_idt(0x21)),
        ring=3,
        idt={0x21: gate(0xE, handler(0x21))},
    ),
    Check(
        "INT3 of user code through a kernel's gate",
        "int3",
        gp(of_idt(BP), at="marked"),
        ring=3,
        idt={BP: gate(0xE, handler(BP))},
    ),
    Check("a fault of user code through a kernel's gate", "ud2", ud(), ring=3),
    Check(
        "INT of a handler that is not canonical",
        "int 0x80",
        gp(0),
        idt={0x80: gate(0xE, 0)},
        memory={0x4000 + 0x80 * 16 + 8: struct.pack("<I", 0x8000)},
    ),
    Check("a fault's absent gate: EXT is set", "ud2", np(of_idt(6, 1)), idt={6: ABSENT}),
    Check("a fault's code segment: EXT is set", "ud2", gp(KERNEL_DATA | 1), idt={6: BAD_CODE}),
    Check("INT1's absent gate: EXT is set", ".byte 0xF1", np(of_idt(DB, 1)), idt={DB: ABSENT}),
    Check(
        "a 16-bit gate in long mode",
        "int 0x80",
        gp(of_idt(0x80)),
        idt={0x80: gate(6, handler(0x80))},
    ),
    Check("a task gate in long mode", "int 0x80", gp(of_idt(0x80)), idt={0x80: gate(5, 0, 0x68)}),
    Check(
        "a 32-bit code segment in long mode",
        "int 0x80",
        gp(0x18),
        idt={0x80: gate(0xE, handler(0x80), 0x18)},
    ),
    Check(
        "a code segment of an outer level",
        "int 0x80",
        gp(0x28),
        idt={0x80: gate(0xE, handler(0x80), 0x28)},
    ),
    Check(
        "protected mode: a handler beyond its segment",
        "int 0x80",
        gp(0),
        Mode.PROT32,
        idt={0x80: gate(0xE, 0x20000, 0x20)},
    ),
    Check(
        "protected mode: a frame that the stack's limit does not hold",
        "int 0x80",
        ss(0),
        Mode.PROT32,
        1,
        regs={"ss_limit": STACK - 8},
        idt={0x80: gate(0xE, handler(0x80), CODE1, dpl=3)},
    ),
    Check(
        "protected mode: an inner stack that is null",
        "int 0x80",
        ts(0),
        Mode.PROT32,
        3,
        tss={8: ("H", 0)},
        idt={TS_: AT_USER},
    ),
    Check(
        "protected mode: an inner stack of another level",
        "int 0x80",
        ts(USER_DATA & ~3),
        Mode.PROT32,
        3,
        tss={8: ("H", USER_DATA)},
        idt={TS_: AT_USER},
    ),
    Check(
        "protected mode: an inner stack beyond the GDT",
        "int 0x80",
        ts(0x1F8),
        Mode.PROT32,
        3,
        tss={8: ("H", 0x1F8)},
        idt={TS_: AT_USER},
    ),
    Check(
        "protected mode: an inner stack that is absent",
        "int 0x80",
        ss(SPARE),
        Mode.PROT32,
        3,
        tss={8: ("H", SPARE)},
        gdt={SPARE: segment(present=False)},
        idt={SS: gate(0xE, handler(SS), USER_CODE, dpl=3)},
    ),
    Check(
        "protected mode: an inner stack that is read-only",
        "int 0x80",
        ts(SPARE),
        Mode.PROT32,
        3,
        tss={8: ("H", SPARE)},
        gdt={SPARE: segment(kind=1)},
        idt={TS_: AT_USER},
    ),
    Check(
        "protected mode: a TSS too short for the inner stack",
        "int 0x80",
        ts(TSS_SELECTOR),
        Mode.PROT32,
        3,
        # By IOPL its handler may end the run.
        flags=0x3000,
        regs={"tr_limit": 8},
        idt={TS_: AT_USER},
    ),
    Check(
        "protected mode: INT of an absent gate",
        "int 0x80",
        np(of_idt(0x80)),
        Mode.PROT32,
        idt={0x80: ABSENT},
    ),
    Check(
        "protected mode: a fault's absent gate",
        "ud2",
        np(of_idt(6, 1)),
        Mode.PROT32,
        idt={6: ABSENT},
    ),
]


# Table 6-5: the second of two exceptions of these classes makes a double fault.
BAD = {"rax": 0x1F8, "rcx": SPARE}
ABSENT_DATA = {SPARE: segment(present=False)}
FIRST = {
    "#DE": (DE, "xor ecx, ecx; > div ecx; nop"),
    "#NP": (NP, "mov ds, ecx"),
    "#SS": (SS, "mov ss, ecx"),
    "#GP": (GP, "mov ds, eax"),
    "#PF": (PF, "mov al, [PAGE]"),
}


def doubled(first: str, second: str, mode: Mode) -> Check:
    vector, code = FIRST[first]
    return Check(
        f"{mode.value}: {second} within {first} is a double fault",
        code,
        fault(DF, 0),
        mode,
        regs=BAD,
        gdt=ABSENT_DATA,
        idt={vector: ABSENT if second == "#NP" else BAD_CODE},
    )


def served(first: str, code: str, vector: int, mode: Mode) -> Check:
    """The second is handled, and its frame tells of the first instruction."""
    return Check(
        f"{mode.value}: #NP within {first} is handled by itself",
        code,
        np(of_idt(vector, 1)),
        mode,
        idt={vector: ABSENT},
        change={"cr0": (TS, 0)} if vector == NM else {},
    )


DOUBLE_CHECKS = [
    *(doubled(first, "#NP", Mode.LONG) for first in FIRST),
    *(doubled(first, "#GP", Mode.LONG) for first in FIRST),
    *(doubled(first, "#NP", Mode.PROT32) for first in FIRST if first != "#PF"),
    doubled("#PF", "#NP", Mode.PAE),
    doubled("#PF", "#GP", Mode.PAGED32),
    served("#UD", "ud2", 6, Mode.LONG),
    served("#NM", "fnop", NM, Mode.LONG),
    served("#UD", "ud2", 6, Mode.PROT32),
    served("#NM", "fnop", NM, Mode.PROT32),
    Check(
        "a page fault within a page fault is a double fault",
        "mov al, [PAGE]",
        fault(DF, 0, cr2=PAGE + 0x7F8),
        regs=BAD_STACK,
        idt={DF: gate(0xE, handler(DF), low=1)},
    ),
    Check(
        "a page fault within a #GP is handled by itself",
        "mov ds, eax",
        pf(W, PAGE + 0x7F8),
        regs=BAD_STACK | BAD,
        idt={PF: gate(0xE, handler(PF), low=1)},
    ),
    Check(
        "a page fault within an INT n is handled by itself",
        "int 0x80",
        pf(W, PAGE + 0x7F8),
        regs=BAD_STACK,
        idt={PF: gate(0xE, handler(PF), low=1)},
    ),
    Check(
        "a stack that is not canonical makes a double fault of #GP",
        "mov ds, eax",
        fault(DF, 0),
        regs=BAD | {"rsp": 0x8000_0000_0800},
        idt={DF: gate(0xE, handler(DF), low=1)},
    ),
    Check(
        "a stack that is not canonical: #UD becomes #SS",
        "ud2",
        ss(1),
        regs={"rsp": 0x8000_0000_0800},
        idt={SS: gate(0xE, handler(SS), low=1)},
    ),
    Check(
        "#DF saves the instruction of the first fault",
        "nop; > mov ds, eax; nop",
        fault(DF, 0, rax=0x1F8),
        regs=BAD,
        idt={GP: ABSENT},
    ),
    Check(
        "a fault within #DF ends in shutdown",
        "mov ds, eax",
        SHUTDOWN,
        regs=BAD,
        idt={GP: ABSENT, DF: ABSENT},
    ),
    Check("a page fault within #DF ends in shutdown", "mov al, [PAGE]", SHUTDOWN, regs=BAD_STACK),
    Check("no IDT at all ends in shutdown", "ud2", SHUTDOWN, regs={"idtr_limit": 0}),
    Check(
        "no IDT at all ends in shutdown: protected mode",
        "ud2",
        SHUTDOWN,
        Mode.PROT32,
        regs={"idtr_limit": 0},
    ),
    Check(
        "no IDT at all ends in shutdown: real mode",
        "ud2",
        SHUTDOWN,
        Mode.REAL,
        regs={"idtr_limit": 0},
    ),
    Check(
        "real mode: a vector beyond the table is #GP without a code",
        "int 0x80",
        gp(),
        Mode.REAL,
        regs={"idtr_limit": 0x1FF},
    ),
]

# 6.9, table 6-2: what is met first.
ORDER_CHECKS = [
    Check(
        "a fetch's page fault comes before what is there",
        "jmp rdi",
        pf(16, PAGE, at=PAGE),
        regs={"rdi": PAGE},
    ),
    Check("#GP of privilege comes before an operand's page fault", "lgdt [PAGE]", gp(), ring=3),
    Check(
        "#NM comes before an operand's page fault",
        "fld qword ptr [PAGE]",
        fault(NM),
        change={"cr0": (TS, 0)},
    ),
    Check(
        "#UD of EM comes before an operand's page fault",
        "movaps xmm0, [PAGE]",
        ud(),
        change={"cr0": (EM, 0)},
    ),
    Check(
        "a limit comes before the page",
        "mov eax, [PAGE]",
        gp(),
        Mode.PAE,
        regs={"ds_limit": 0xFFFF},
    ),
    Check(
        "a limit of the stack comes before the page",
        "mov eax, ss:[PAGE]",
        ss(),
        Mode.PAE,
        ring=1,
        regs={"ss_limit": 0xFFFF},
    ),
    Check(
        "a string's fault leaves what is done",
        "mov ecx, 4; cld; > rep stosd; nop",
        pf(W, PAGE + 0x1000, rcx=2, rdi=PAGE + 0x1000),
        page=Page(P | W | A),
        regs={"rdi": PAGE + 0xFF8},
    ),
    Check(
        "a string's fault of its source leaves what is done",
        "mov ecx, 4; cld; > rep movsd; nop",
        pf(0, PAGE + 0x1000, rcx=2, rsi=PAGE + 0x1000, rdi=DATA + 8),
        page=Page(P | W | A),
        regs={"rsi": PAGE + 0xFF8, "rdi": DATA},
    ),
    Check(
        "a page that is absent comes before its rights",
        "mov [PAGE], al",
        pf(W | U),
        ring=3,
        page=Page(0),
    ),
    Check(
        "PUSH that faults leaves RSP",
        "> push rax; nop",
        fault(PF, W, cr2=PAGE - 8),
        regs={"rsp": PAGE},
        idt={PF: gate(0xE, handler(PF), low=1)},
    ),
    Check(
        "CALL that faults leaves RIP",
        "call [rdi]",
        fault(PF, W, cr2=PAGE - 8),
        regs={"rsp": PAGE, "rdi": DATA},
        idt={PF: gate(0xE, handler(PF), low=1)},
    ),
    Check(
        "XCHG that faults leaves its register",
        "xchg [PAGE], rax",
        pf(P | W, rax=5),
        regs={"rax": 5},
        page=Page(P | A),
    ),
]


# What each instruction asks of its page: the error code tells whose access it was, and what a fault
# leaves as it was.
OTHER_STACK: dict[str, Any] = {"idt": {PF: gate(0xE, handler(PF), low=1)}}
READ_ONLY = Page(P | A)
ACCESS_CHECKS = [
    Check("CLFLUSH of an absent page", "clflush [PAGE]", pf(0)),
    Check(
        "CLFLUSH of a kernel's page by user code",
        "clflush [PAGE]",
        pf(P | U),
        ring=3,
        page=READ_ONLY,
    ),
    Check("CLFLUSH of a read-only page", "clflush [PAGE]", done(), page=READ_ONLY),
    Check("CLFLUSH of an address that is not canonical", "mov rdi, 1 << 47; clflush [rdi]", gp()),
    Check("PREFETCHT0 of an absent page", "prefetcht0 [PAGE]", done()),
    Check(
        "PREFETCHT0 of an address that is not canonical",
        "mov rdi, 1 << 47; prefetcht0 [rdi]",
        done(),
    ),
    Check("a NOP with an operand reads nothing", "nop dword ptr [PAGE]", done()),
    Check("LEA reads nothing", "lea rax, [PAGE]", done(rax=PAGE)),
    Check("MOVNTI to a read-only page", "movnti [PAGE], eax", pf(P | W), page=READ_ONLY),
    Check(
        "VMASKMOV of nothing at an absent page",
        "mov rax, cr4; bts eax, 18; mov cr4, rax; mov eax, 7; mov edx, 0; mov ecx, 0; xsetbv; "
        "vpxor xmm1, xmm1, xmm1; vmaskmovps xmm0, xmm1, [PAGE]",
        done(),
        needs=("avx",),
    ),
    Check("CMPXCHG8B of a register", ".byte 0x0F, 0xC7, 0xC8", ud()),
    Check("CMPXCHG8B of a read-only page", "cmpxchg8b [PAGE]", pf(P | W), page=READ_ONLY),
    Check("SGDT to a read-only page", "sgdt [PAGE]", pf(P | W), page=READ_ONLY),
    Check("SLDT to an absent page", "sldt word ptr [PAGE]", pf(W)),
    Check("SMSW to an absent page", "smsw word ptr [PAGE]", pf(W)),
    Check("STR to an absent page of user code", "str word ptr [PAGE]", pf(W | U), ring=3),
    Check("LGDT from an absent page leaves the GDTR", "lgdt [PAGE]", pf(0, gdtr_base=0x5000)),
    Check("LAR of an absent page", "lar eax, word ptr [PAGE]", pf(0)),
    Check("VERR of an absent page", "verr word ptr [PAGE]", pf(0)),
    Check("LLDT of an absent page", "lldt word ptr [PAGE]", pf(0)),
    Check("MOV to SS of an absent page", "mov ss, [PAGE]", pf(0)),
    Check("MOV of a selector to a read-only page", "mov [PAGE], ds", pf(P | W), page=READ_ONLY),
    Check("SETcc of a read-only page", "sete byte ptr [PAGE]", pf(P | W), page=READ_ONLY),
    Check(
        "a shift by 0 of a read-only page",
        "shl dword ptr [PAGE], 0",
        any_of(pf(P | W), done()),
        page=READ_ONLY,
    ),
    Check(
        "BTS beyond the operand's page",
        "mov ecx, 0x8000; bts dword ptr [PAGE], ecx",
        any_of(pf(W, PAGE + 0x1000), pf(0, PAGE + 0x1000)),
        page=Page(P | W | A),
    ),
    Check(
        "BT below the operand's page",
        "mov ecx, -1; bt dword ptr [PAGE], ecx",
        pf(0, PAGE - 4),
        page=Page(P | W | A),
    ),
    Check("XLAT of an absent page", "mov rbx, PAGE - 0x80; mov al, 0x80; > xlatb; nop", pf(0)),
    Check("FNSTENV to a read-only page", "fnstenv [PAGE]", pf(P | W), page=READ_ONLY),
    Check("FLD of an absent page by user code", "fld qword ptr [PAGE]", pf(U), ring=3),
    Check(
        "FXSAVE across an absent page",
        "fxsave [PAGE + 0xF00]",
        pf(W, PAGE + 0x1000),
        page=Page(P | W | A),
    ),
    Check("POP to an absent page leaves RSP", "push 5; > pop qword ptr [PAGE]; nop", pf(W)),
    Check("PUSH of an absent page leaves RSP", "> push qword ptr [PAGE]; nop", pf(0)),
    Check(
        "PUSHAD across an absent page leaves ESP",
        "pushad",
        fault(PF, W, cr2=PAGE - 4),
        Mode.PAE,
        1,
        regs={"rsp": PAGE + 8},
        page=Page(P | W | U | A),
    ),
    Check(
        "ENTER to an absent page leaves RSP and RBP",
        "enter 0x1000, 0",
        fault(PF, W, cr2=PAGE - 0x808, rbp=5),
        regs={"rsp": PAGE + 0x800, "rbp": 5},
        page=Page(P | W | A),
        **OTHER_STACK,
    ),
    Check("LEAVE of an absent page leaves RSP", "leave", pf(0, rbp=PAGE), regs={"rbp": PAGE}),
    Check(
        "RET of an absent page", "ret", fault(PF, 0, cr2=PAGE), regs={"rsp": PAGE}, **OTHER_STACK
    ),
    Check("a far CALL through an absent page", "call fword ptr [PAGE]", pf(0)),
    Check(
        "a far CALL to an absent stack",
        "call fword ptr [DATA]",
        fault(PF, W),
        regs={"rsp": PAGE},
        memory={DATA: struct.pack("<IH", 0x2F00, KERNEL_CODE)},
        **OTHER_STACK,
    ),
    Check(
        "IRET of a frame across an absent page",
        "iretq",
        fault(PF, 0, cr2=PAGE + 0x1000),
        regs={"rsp": PAGE + 0xFF0},
        page=Page(P | W | A),
        memory={FRAME + 0xFF0: struct.pack("<QQ", 0x2F00, KERNEL_CODE)},
        **OTHER_STACK,
    ),
    Check(
        "an INT of user code to an absent stack is the kernel's write",
        "int 0x80",
        pf(W, PAGE + 0x7F8),
        ring=3,
        tss={4: ("Q", PAGE + 0x800)},
        **OTHER_STACK,
    ),
    Check(
        "an INT of user code to a stack that is user's",
        "int 0x80",
        fault(0x80, at="behind", rsp=PAGE + 0x800 - 40),
        ring=3,
        tss={4: ("Q", PAGE + 0x800)},
        page=Page(P | W | U | A),
    ),
    Check("an IDT on an absent page", "int 0x80", SHUTDOWN, regs={"idtr_base": PAGE}),
    Check(
        "REP MOVS of overlapping strings copies byte by byte",
        "mov esi, DATA; mov edi, DATA + 1; mov ecx, 7; cld; rep movsb",
        done(word=0x0101_0101),
        memory={DATA: b"\x01\x02\x03"},
        read={"word": (DATA + 4, 4)},
    ),
    Check(
        "REPE CMPS ends behind the difference",
        "mov esi, DATA; mov edi, DATA + 8; mov ecx, 8; cld; repe cmpsb",
        done(rcx=5, zf=0),
        memory={DATA: b"abcdefgh" + b"abXdefgh"},
    ),
    Check(
        "REPNE SCAS ends behind the match",
        "mov edi, DATA; mov ecx, 8; mov al, 0x63; cld; repne scasb",
        done(rcx=5, zf=1),
        memory={DATA: b"abcdefgh"},
    ),
    Check(
        "REP STOS of count 0 touches nothing", "mov edi, PAGE; mov ecx, 0; rep stosb", done(rcx=0)
    ),
    Check(
        "REP in 64-bit code counts with RCX",
        "mov edi, PAGE; mov rcx, 1 << 32; cld; > rep stosb; nop",
        pf(W, rcx=1 << 32),
    ),
]


@each(ACCESS_CHECKS)
def test_accesses(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(VECTOR_CHECKS, PRIVILEGED_CHECKS)
def test_exceptions(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(DELIVERY_CHECKS, DOUBLE_CHECKS, ORDER_CHECKS)
def test_delivery(engine: Engine, check: Check) -> None:
    run(engine, check)
