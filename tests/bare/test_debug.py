"""Breakpoints, single steps, and what holds them back
(Intel SDM 3B, 18.2 and 18.3; 3A, 6.8.3; AMD APM 2, 13.1)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import (
    BP,
    DB,
    Check,
    Engine,
    any_of,
    db,
    done,
    each,
    fault,
    gp,
    run,
    ud,
)
from tests.bare.kernel import (
    DATA,
    KERNEL_DATA,
    PAGE,
    STACK,
    USER_TEXT,
    Mode,
    P,
    Page,
    W,
)

# DR6 (18.2.3); DR7's R/W fields (18.2.4).
B0, B1, B2, B3, BD, BS, BT = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
EXECUTE, WRITE, PORT, ACCESS = range(4)
LENGTHS = {1: 0, 2: 1, 8: 2, 4: 3}


def dr7(kind: int, length: int = 1, number: int = 0) -> int:
    return 1 << 2 * number | (kind | LENGTHS[length] << 2) << 16 + 4 * number


def watch(address: str | int, kind: int, length: int = 1, number: int = 0) -> str:
    """Sets a breakpoint; the code goes on with RAX 0."""
    return (
        f"mov eax, {address}; mov dr{number}, rax; "
        f"mov eax, {dr7(kind, length, number)}; mov dr7, rax; mov eax, 0"
    )


def marked(code: str) -> str:
    """With the mark at the last instruction, where it has none."""
    if ">" in code:
        return code
    *before, last = code.split("; ")
    return "; ".join([*before, f"> {last}"])


def watched(
    name: str, kind: int, length: int, code: str, hit: bool, address: int = DATA, **more: Any
) -> Check:
    """``code`` with a breakpoint at ``address``: a trap behind it, or none."""
    return Check(
        name,
        f"{watch(address, kind, length)}; {marked(code)}; nop",
        db(B0) if hit else done(),
        **more,
    )


DATA_CHECKS = [
    watched("a write of its byte", WRITE, 1, "mov [DATA], al", True),
    watched("a write beside its byte", WRITE, 1, "mov [DATA + 1], al", False),
    watched("a wider write over its byte", WRITE, 1, "mov [DATA - 3], eax", True),
    watched("a read leaves a breakpoint of writes", WRITE, 4, "mov eax, [DATA]", False),
    watched("a read meets a breakpoint of accesses", ACCESS, 4, "mov eax, [DATA]", True),
    watched("a write meets a breakpoint of accesses", ACCESS, 4, "mov [DATA], eax", True),
    watched("two bytes: the second", WRITE, 2, "mov [DATA + 1], al", True),
    watched("two bytes: the third", WRITE, 2, "mov [DATA + 2], al", False),
    watched("four bytes: the last", WRITE, 4, "mov [DATA + 3], al", True),
    watched("four bytes: the next", WRITE, 4, "mov [DATA + 4], al", False),
    watched("eight bytes: the last", WRITE, 8, "mov [DATA + 7], al", True),
    watched("eight bytes: the next", WRITE, 8, "mov [DATA + 8], al", False),
    watched(
        "four bytes off their alignment: from the aligned",
        WRITE,
        4,
        "mov [DATA], al",
        True,
        DATA + 2,
    ),
    watched(
        "four bytes off their alignment: not beyond",
        WRITE,
        4,
        "mov [DATA + 4], al",
        False,
        DATA + 2,
    ),
    watched("a push", WRITE, 8, "push rax", True, STACK - 8),
    watched("a pop", ACCESS, 8, "pop rcx", True, STACK),
    watched("a call's push", WRITE, 8, "> call 1f; 1:", True, STACK - 8),
    watched("a read-modify-write", WRITE, 1, "inc byte ptr [DATA]", True),
    watched(
        "CMPXCHG that does not match writes", WRITE, 4, "mov eax, 5; lock cmpxchg [DATA], ecx", True
    ),
    watched("a vector's store", WRITE, 4, "movups [DATA - 12], xmm0", True),
    watched("a vector's load", ACCESS, 4, "movups xmm0, [DATA]", True),
    watched("LEA accesses nothing", ACCESS, 4, "lea rax, [DATA]", False),
    watched("a prefetch is no access", ACCESS, 4, "prefetcht0 [DATA]", False),
    watched("INVLPG is no access", ACCESS, 4, "invlpg [DATA]", False),
    watched("a compare", ACCESS, 4, "cmp [DATA], eax", True),
    watched("XSAVE's header", WRITE, 8, "fxsave [DATA]", True, DATA + 32),
    watched("a STOSB", WRITE, 1, "mov edi, DATA; stosb", True),
    watched("a MOVSB's source", ACCESS, 1, "mov esi, DATA; mov edi, DATA + 64; movsb", True),
    watched("a REP of count 0", WRITE, 1, "mov edi, DATA; mov ecx, 0; rep stosb", False),
    watched("a BT of the byte", ACCESS, 1, "bt dword ptr [DATA], 3", True),
    Check(
        "a REP stops behind the iteration that meets it",
        f"{watch('DATA + 2', WRITE)}; mov edi, DATA; mov ecx, 8; > rep stosb; nop",
        # It may be told as late as at the end of the instruction (18.3.1.2).
        any_of(db(B0, at="marked", rcx=5), db(B0, at="behind", rcx=0)),
    ),
    Check(
        "an access that faults meets no breakpoint",
        f"{watch('PAGE', WRITE)}; > mov [PAGE], al; nop",
        fault(14, P | W, cr2=PAGE),
        page=Page(P),
    ),
    Check(
        "each of four",
        "; ".join(f"mov eax, DATA + {4 * n}; mov dr{n}, rax" for n in range(4))
        + f"; mov eax, {sum(dr7(WRITE, 4, n) for n in range(4))}; mov dr7, rax; "
        "> movups [DATA], xmm0; nop",
        db(B0 | B1 | B2 | B3),
    ),
    Check(
        "G enables as L does",
        f"mov eax, DATA; mov dr1, rax; mov eax, {dr7(WRITE, 1, 1) & ~0xFF | 1 << 3}; "
        "mov dr7, rax; > mov [DATA], al; nop",
        db(B1),
    ),
    Check(
        "one that is not enabled",
        f"mov eax, DATA; mov dr0, rax; mov eax, {dr7(WRITE) & ~1}; mov dr7, rax; mov [DATA], al",
        done(),
    ),
    Check(
        "32-bit code",
        f"mov eax, DATA; mov dr2, eax; mov eax, {dr7(WRITE, 4, 2)}; mov dr7, eax; "
        "> mov [DATA], eax; nop",
        db(B2),
        Mode.PROT32,
    ),
    Check(
        "real mode",
        f"mov eax, DATA; mov dr0, eax; mov eax, {dr7(WRITE, 2)}; mov dr7, eax; "
        "> mov [DATA], ax; nop",
        db(B0),
        Mode.REAL,
    ),
    Check(
        "a segment's base is part of the address",
        f"mov ax, 0x100; mov ds, ax; mov eax, DATA; mov dr0, eax; mov eax, {dr7(WRITE, 2)}; "
        "mov dr7, eax; > mov [DATA - 0x1000], ax; nop",
        db(B0),
        Mode.REAL,
    ),
    Check(
        "MOV to SS holds the trap of its operand back",
        f"{watch('DATA', ACCESS, 2)}; mov ss, [DATA]; > nop; nop",
        # AMD's CPUs lose it (APM 2, 13.1.4); so may those of Intel.
        any_of(db(B0), done()),
        memory={DATA: struct.pack("<H", KERNEL_DATA)},
    ),
]

SET_DE = "mov rcx, cr4; or ecx, 8; mov cr4, rcx"


def port(name: str, code: str, hit: bool, length: int = 1, setup: str = SET_DE) -> Check:
    return Check(
        f"ports: {name}",
        f"{setup}; {watch(0x500, PORT, length)}; mov edx, 0x500; {marked(code)}; nop",
        db(B0) if hit else done(),
    )


PORT_CHECKS = [
    port("an OUT", "out dx, al", True),
    port("an IN", "in al, dx", True),
    port("another", "inc edx; out dx, al", False),
    port("two: the second", "inc edx; out dx, al", True, 2),
    port("a wider OUT over it", "sub edx, 1; out dx, eax", True),
    port("a memory access of that address", "mov [0x500], al", False),
    port("an OUTSB", "mov esi, DATA; outsb", True),
]

# Instruction breakpoints: the one at `at`, behind what sets it.
FETCH_CHECKS = [
    Check(
        "an instruction is not run",
        f"{watch('CODE + (1f - start)', EXECUTE)}; 1:; > mov ecx, 5",
        db(B0, at="marked", rcx=0, rf=1),
    ),
    Check(
        "an address in the middle of an instruction",
        f"{watch('CODE + (1f - start) + 1', EXECUTE)}; 1:; > mov ecx, 5",
        done(rcx=5),
    ),
    Check(
        "RF of the frame gets past it",
        f"{watch('CODE + (1f - start)', EXECUTE)}; 1:; > mov ecx, 5",
        done(rcx=5, rbx=1),
        handlers={DB: "inc ebx; or dword ptr [rsp + 16], 0x10000; iretq"},
    ),
    Check(
        "RF is set in the frame already",
        f"{watch('CODE + (1f - start)', EXECUTE)}; 1:; > mov ecx, 5",
        done(rcx=5, rbx=1),
        handlers={DB: "inc ebx; iretq"},
    ),
    Check(
        "without RF it comes again",
        f"{watch('CODE + (1f - start)', EXECUTE)}; 1:; > mov ecx, 5",
        done(rcx=5, rbx=3),
        handlers={DB: "inc ebx; cmp ebx, 3; je 1f; and dword ptr [rsp + 16], 0xFFFEFFFF; 1: iretq"},
    ),
    Check(
        "RF lasts one instruction",
        f"{watch('CODE + (1f - start)', EXECUTE)}; mov ecx, 3; 1: dec ecx; > jnz 1b",
        done(rcx=0, rbx=3),
        handlers={DB: "inc ebx; iretq"},
    ),
    Check(
        "POPF does not set RF",
        "push 0x10002; popfq; pushfq; pop rax",
        done(rax=2),
    ),
    Check(
        "a fault's frame has RF, which gets past the breakpoint",
        f"{watch('CODE + (1f - start)', EXECUTE)}; 1:; > mov al, [PAGE]",
        done(rbx=0x101),
        page=Page(0),
        handlers={
            DB: "inc ebx; iretq",
            14: "add ebx, 0x100; mov qword ptr [TABLES + 0x5000], FRAME + 3; add rsp, 8; iretq",
        },
    ),
    Check(
        "MOV to SS holds it back",
        f"mov ecx, KERNEL_DATA; {watch('CODE + (1f - start)', EXECUTE)}; "
        "mov ss, ecx; 1:; > mov ecx, 5",
        done(rcx=5),
    ),
    Check(
        "of two causes one breakpoint each",
        f"{watch('CODE + (1f - start)', EXECUTE)}; mov eax, CODE + (1f - start); mov dr3, rax; "
        f"mov eax, {dr7(EXECUTE) | dr7(EXECUTE, 1, 3)}; mov dr7, rax; 1:; > mov ecx, 5",
        db(B0 | B3, at="marked"),
    ),
    Check(
        "of 32-bit code has CS's base",
        f"mov eax, CODE + (1f - start); mov dr0, eax; mov eax, {dr7(EXECUTE)}; mov dr7, eax; "
        "1:; > mov ecx, 5",
        db(B0, at="marked"),
        Mode.PROT32,
    ),
]

SET_TF = "pushfq; or dword ptr [rsp], 0x100; popfq"
SET_TF32 = "pushfd; or dword ptr [esp], 0x100; popfd"
BEHIND_BRANCH = db(BS, at="marked", rbx=5)
COUNT = {DB: "inc ebx; iretq"}
STEP_CHECKS = [
    Check("the step behind POPF", f"{SET_TF}; > mov ecx, 5; nop", db(BS, rcx=5, tf=1, now_tf=0)),
    Check("POPF itself is not stepped", f"{SET_TF}; > nop", db(BS)),
    Check("32-bit code", f"{SET_TF32}; > mov ecx, 5; nop", db(BS, rcx=5), Mode.PROT32),
    Check(
        "real mode",
        "pushf; mov bp, sp; or word ptr [bp], 0x100; popf; > mov cx, 5; nop",
        db(BS),
        Mode.REAL,
    ),
    Check("user code", f"{SET_TF}; > mov ecx, 5; nop", db(BS, rcx=5), ring=3),
    Check("a branch ends at its target", f"{SET_TF}; jmp 1f; nop; 1: nop", db(BS, at="marked")),
    Check(
        "a REP stops at each iteration",
        f"mov edi, DATA; mov ecx, 3; {SET_TF}; > rep stosb; nop",
        db(BS, at="marked", rcx=2),
    ),
    Check(
        "a REP of 3 is stepped three times",
        f"mov edi, DATA; mov ecx, 3; {SET_TF}; rep stosb; push 2; popfq; mov edx, ebx",
        # The PUSH and the POPF, too.
        done(rdx=5, rcx=0),
        handlers=COUNT,
    ),
    Check(
        "MOV to SS is not stepped",
        f"mov ecx, KERNEL_DATA; {SET_TF}; mov ss, ecx; > nop; nop",
        db(BS),
    ),
    Check(
        "POP of SS is not stepped",
        "push KERNEL_DATA; pushfd; or dword ptr [esp], 0x100; popfd; pop ss; > nop; nop",
        db(BS),
        Mode.PROT32,
    ),
    Check("STI is stepped", f"{SET_TF}; > sti; nop", db(BS)),
    Check(
        "POPF that clears TF is stepped once more",
        f"{SET_TF}; push 2; popfq; mov ecx, 5",
        done(rbx=2, rcx=5),
        handlers=COUNT,
    ),
    Check(
        "INT n clears TF in its handler",
        f"{SET_TF}; > int 0x80; nop",
        fault(0x80, at="behind", tf=1, now_tf=0),
    ),
    Check("INT3 clears TF in its handler", f"{SET_TF}; > int3; nop", fault(BP, tf=1, now_tf=0)),
    Check(
        "a step behind IRET of INT n's handler",
        f"{SET_TF}; int 0x80; > nop; nop",
        any_of(db(BS), db(BS, at="marked")),
        handlers={0x80: "iretq"},
    ),
    Check(
        "IRET that sets TF is not stepped",
        "push KERNEL_DATA; push STACK; push 0x102; push KERNEL_CODE; push CODE + (1f - start); "
        "iretq; 1:; > nop; nop",
        db(BS),
    ),
    Check("an exception comes before the step", f"{SET_TF}; > ud2; nop", ud(tf=1, now_tf=0)),
    Check(
        "a step and a data breakpoint are one trap",
        f"{watch('DATA', WRITE)}; {SET_TF}; > mov [DATA], al; nop",
        db(BS | B0),
    ),
    Check(
        "SYSCALL masks TF",
        f"{SET_TF}; > syscall; nop",
        done(USER_TEXT, tf=0),
        ring=3,
        msrs={0xC000_0081: 0x0008 << 32, 0xC000_0082: USER_TEXT, 0xC000_0084: 0x100},
    ),
    Check("WRMSR is stepped", f"mov ecx, 0x277; rdmsr; {SET_TF}; > wrmsr; nop", db(BS)),
    Check(
        "a far RET to user code is stepped",
        f"push USER_DATA; push USER_STACK; push USER_CODE; push USER_TEXT; {SET_TF}; rex.w retf",
        db(BS, at=USER_TEXT),
    ),
    Check("HLT is stepped", f"{SET_TF}; > hlt; nop", db(BS)),
    Check("CPUID is stepped", f"{SET_TF}; > cpuid; nop", db(BS)),
    Check("RDTSC is stepped", f"{SET_TF}; > rdtsc; nop", db(BS)),
    Check("an OUT is stepped", f"mov edx, 0x500; {SET_TF}; > out dx, al; nop", db(BS)),
    Check(
        "a read of DR6 keeps BS until it is cleared",
        f"{SET_TF}; nop; > mov rcx, dr6",
        done(rcx=0xFFFF_4FF0),
        handlers={DB: "and dword ptr [rsp + 16], 0xFFFFFEFF; iretq"},
    ),
]

# DEBUGCTL.BTF (18.4.1, 18.4.4): TF traps behind branches alone.
BTF = "mov ecx, 0x1D9; mov eax, 2; mov edx, 0; wrmsr"
STEP_CHECKS += [
    Check(
        "BTF: from branch to branch",
        f"{BTF}; {SET_TF}; mov ebx, 5; jmp 1f; nop; 1:; nop",
        BEHIND_BRANCH,
    ),
    Check(
        "BTF: a branch that is not taken",
        f"{BTF}; {SET_TF}; jc 1f; mov ebx, 5; jnc 1f; nop; 1:; nop",
        BEHIND_BRANCH,
    ),
    Check("BTF: a call", f"{BTF}; {SET_TF}; mov ebx, 5; call 1f; nop; 1:; nop", BEHIND_BRANCH),
    Check(
        "BTF is clear in the handler",
        f"{BTF}; {SET_TF}; jmp 1f; nop; 1:; push 2; popfq; mov ecx, 0x1D9; rdmsr; and eax, 2",
        done(rax=0, rbx=3),
        handlers=COUNT,
    ),
    Check("BTF without TF", f"{BTF}; jmp 1f; nop; 1:; rdmsr", done(rax=2)),
]

REGISTER_CHECKS = [
    Check("DEBUGCTL's reserved bits", "mov ecx, 0x1D9; mov eax, 0; mov edx, 1; wrmsr", gp()),
    Check("DEBUGCTL's bit 20", "mov ecx, 0x1D9; mov eax, 1 << 20; mov edx, 0; wrmsr", gp()),
    Check("INT1 is a trap without a cause", "> .byte 0xF1; nop", db(0)),
    Check("INT1 of user code needs no right", "> .byte 0xF1; nop", db(0), ring=3),
    Check(
        "GD guards a read",
        "mov eax, 0x2000; mov dr7, rax; > mov rcx, dr0; nop",
        db(BD, at="marked"),
    ),
    Check(
        "GD guards a write",
        "mov eax, 0x2000; mov dr7, rax; > mov dr6, rcx; nop",
        db(BD, at="marked"),
    ),
    Check(
        "GD is clear in the handler",
        "mov eax, 0x2000; mov dr7, rax; > mov rcx, dr7; nop",
        done(rcx=0x400),
        handlers={DB: "iretq"},
    ),
    Check("user code is #GP before GD", "mov rcx, dr7", gp(), ring=3),
    Check("DR4 is DR6", "mov rcx, dr6; mov rdx, 0; .byte 0x0F, 0x21, 0xE2", done(rdx=0xFFFF_0FF0)),
    Check("DR5 is DR7", "mov eax, 0x500; .byte 0x0F, 0x23, 0xE8; mov rcx, dr7", done(rcx=0x500)),
    Check("DR4 with DE", f"{SET_DE}; > .byte 0x0F, 0x21, 0xE2; nop", ud()),
    Check("DR5 with DE", f"{SET_DE}; > .byte 0x0F, 0x23, 0xE8; nop", ud()),
    Check("DR7's upper half", "mov rax, 0x100000400; mov dr7, rax", gp()),
    Check("DR6's upper half", "mov rax, 0x100000400; mov dr6, rax", gp()),
    Check(
        "DR0 to DR3 hold 64 bits",
        "mov rax, 0x123456789ABCDEF; mov dr3, rax; mov rcx, dr3",
        done(rcx=0x123456789ABCDEF),
    ),
    Check("DR7's fixed bits", "mov eax, 0; mov dr7, rax; mov rcx, dr7", done(rcx=0x400)),
    Check("DR8 does not exist", ".byte 0x44, 0x0F, 0x21, 0xC0", ud()),
    Check("DR6 as it is at the start", "mov rcx, dr6", done(rcx=0xFFFF_0FF0)),
]


@each(DATA_CHECKS, PORT_CHECKS, FETCH_CHECKS)
def test_breakpoints(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(STEP_CHECKS, REGISTER_CHECKS)
def test_steps_and_registers(engine: Engine, check: Check) -> None:
    run(engine, check)
