"""The local APIC: priorities, EOI, IPIs, its timer, NMIs, and x2APIC's MSRs
(Intel SDM 3A, 11.4 to 11.12; 6.7.1; AMD APM 2, 16.3 to 16.12)."""

from __future__ import annotations

from typing import Any

from tests.bare.check import (
    ANYWHERE,
    Check,
    Done,
    Engine,
    Expected,
    Fault,
    any_of,
    by_vendor,
    done,
    each,
    fault,
    gp,
    run,
)
from tests.bare.kernel import PCD, Mode, P, Page, W

APIC = 0xFEE0_0000
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
TIMER, LINT0, ERROR, INITIAL, CURRENT, DIVIDE = 0x320, 0x350, 0x370, 0x380, 0x390, 0x3E0
# ICR (11.6.1), LVT (11.5.1).
SELF, ALL, OTHERS, LOGICAL, NMI = 1 << 18, 2 << 18, 3 << 18, 1 << 11, 4 << 8
MASKED, PERIODIC, DEADLINE = 1 << 16, 1 << 17, 2 << 17


def write(register: int, value: int | str) -> str:
    return f"mov dword ptr [{APIC + register:#x}], {value}"


def read(register: int, into: str = "eax") -> str:
    return f"mov {into}, [{APIC + register:#x}]"


def bit(register: int, vector: int, into: str) -> str:
    """The bit of a vector in ISR, TMR or IRR."""
    at = APIC + register + (vector >> 5) * 0x10
    return f"mov {into}, [{at:#x}]; shr {into}, {vector & 31}; and {into}, 1"


ENABLE = write(SVR, 0x1FF)
END_OF_INTERRUPT = write(EOI, 0)


def log(vector: int, *more: str) -> str:
    """A handler that appends its vector to EBX."""
    return "; ".join(["shl ebx, 8", f"or ebx, {vector}", *more, END_OF_INTERRUPT, "iretd"])


def apic(name: str, code: list[str], expect: Expected, **more: Any) -> Check:
    return Check(name, "; ".join([ENABLE, *code]), expect, Mode.PROT32, **more)


# What is taken when IF is set: nothing else can come.
WAIT = "sti; nop; nop; cli"


def taken(vector: int, **state: int) -> Fault:
    return fault(vector, at="any", **state)


REGISTER_CHECKS = [
    Check(
        "after reset: LVT entries are masked",
        f"{read(TIMER)}; {read(ERROR, 'ecx')}",
        done(rax=MASKED, rcx=MASKED),
        Mode.PROT32,
    ),
    Check("after reset: DFR is flat", read(DFR), done(rax=0xFFFF_FFFF), Mode.PROT32),
    Check(
        "after reset: TPR, IRR and ISR are clear",
        f"{read(TPR)}; {read(IRR + 0x20, 'ecx')}; {read(ISR + 0x20, 'edx')}",
        done(rax=0, rcx=0, rdx=0),
        Mode.PROT32,
    ),
    Check(
        "switched off by SVR, an LVT's mask stays",
        f"{write(SVR, 0xFF)}; {write(TIMER, 0x40)}; {read(TIMER)}",
        done(rax=MASKED | 0x40),
        Mode.PROT32,
    ),
    apic(
        "switched off by SVR, LVT entries are masked again",
        [write(TIMER, 0x40), write(SVR, 0xFF), read(TIMER)],
        done(rax=MASKED | 0x40),
    ),
    apic(
        "switched on, an LVT's mask is software's",
        [write(TIMER, 0x40), read(TIMER)],
        done(rax=0x40),
    ),
    apic("TPR holds eight bits", [write(TPR, "0xFFFFFF35"), read(TPR)], done(rax=0x35)),
    apic("PPR follows TPR", [write(TPR, 0x35), read(PPR)], done(rax=0x35)),
    apic(
        "IRR, ISR and PPR are read-only",
        [
            write(IRR + 0x20, "0xFFFFFFFF"),
            write(ISR + 0x20, "0xFFFFFFFF"),
            write(PPR, 0x55),
            read(IRR + 0x20),
            read(ISR + 0x20, "ecx"),
            read(PPR, "edx"),
        ],
        done(rax=0, rcx=0, rdx=0),
    ),
    apic("the LDR has its top byte", [write(LDR, "0x12345678"), read(LDR)], done(rax=0x1200_0000)),
    apic("the DFR has its top bits", [write(DFR, "0x0"), read(DFR)], done(rax=0x0FFF_FFFF)),
    Check(
        "CR8 is TPR's upper half",
        f"mov eax, 5; mov cr8, rax; mov eax, [PAGE + {TPR}]",
        done(rax=0x50),
        page=Page(P | W | PCD, frame=APIC),
    ),
    Check(
        "TPR's upper half is CR8",
        f"mov dword ptr [PAGE + {TPR}], 0xA7; mov rax, cr8",
        done(rax=0xA),
        page=Page(P | W | PCD, frame=APIC),
    ),
    Check(
        "switched off in APIC_BASE, CPUID has no APIC",
        "mov ecx, 0x1B; rdmsr; and eax, 0xFFFFF7FF; wrmsr; mov eax, 1; cpuid; bt edx, 9",
        done(cf=0),
        Mode.PROT32,
    ),
]

SELF_IPI = write(ICR, SELF | 0x40)
PRIORITY_CHECKS = [
    apic("a self IPI waits for IF", [SELF_IPI, "nop", bit(IRR, 0x40, "eax")], done(rax=1)),
    apic("a self IPI comes with IF", [SELF_IPI, WAIT], taken(0x40)),
    apic(
        "in its handler it is in service",
        [SELF_IPI, WAIT],
        done(rbx=0x40, rcx=1, rdx=0x40),
        handlers={0x40: log(0x40, bit(ISR, 0x40, "ecx"), read(PPR, "edx"), bit(IRR, 0x40, "esi"))},
    ),
    apic(
        "EOI ends the service",
        [SELF_IPI, WAIT, bit(ISR, 0x40, "eax"), read(PPR, "ecx")],
        done(rax=0, rcx=0, rbx=0x40),
        handlers={0x40: log(0x40)},
    ),
    apic(
        "the same vector twice is one interrupt",
        [SELF_IPI, SELF_IPI, WAIT],
        done(rbx=0x40),
        handlers={0x40: log(0x40)},
    ),
    apic(
        "TPR of the same class holds it back",
        [write(TPR, 0x40), write(ICR, SELF | 0x4F), WAIT, bit(IRR, 0x4F, "eax")],
        done(rax=1, rbx=0),
    ),
    apic(
        "TPR of a lower class lets it through",
        [write(TPR, 0x4F), write(ICR, SELF | 0x50), WAIT],
        taken(0x50),
    ),
    apic(
        "what TPR held back comes when it falls",
        [write(TPR, 0x50), SELF_IPI, WAIT, "mov esi, ebx", write(TPR, 0), WAIT],
        done(rsi=0, rbx=0x40),
        handlers={0x40: log(0x40)},
    ),
    apic(
        "the higher vector comes first",
        [SELF_IPI, write(ICR, SELF | 0x51), WAIT],
        done(rbx=0x5140),
        handlers={0x40: log(0x40), 0x51: log(0x51)},
    ),
    apic(
        "of one class the higher comes first",
        [SELF_IPI, write(ICR, SELF | 0x4A), WAIT],
        done(rbx=0x4A40),
        handlers={0x40: log(0x40), 0x4A: log(0x4A)},
    ),
    apic(
        "a higher class interrupts a handler",
        [SELF_IPI, WAIT],
        done(rbx=0x4051),
        handlers={
            0x40: log(0x40, write(ICR, SELF | 0x51), "sti", "nop", "nop", "cli"),
            0x51: log(0x51),
        },
    ),
    apic(
        "the same class does not interrupt a handler",
        [SELF_IPI, WAIT],
        done(rbx=0x404A, rsi=0x40),
        handlers={
            0x40: log(0x40, write(ICR, SELF | 0x4A), "sti", "nop", "nop", "cli", "mov esi, ebx"),
            0x4A: log(0x4A),
        },
    ),
    apic(
        "without EOI nothing of its class comes",
        [SELF_IPI, WAIT, write(ICR, SELF | 0x41), WAIT, bit(IRR, 0x41, "eax")],
        done(rbx=0x40, rax=1),
        handlers={0x40: "mov ebx, 0x40; iretd"},
    ),
    apic(
        "STI holds it back for one instruction",
        [SELF_IPI, "sti; cli; nop", bit(IRR, 0x40, "eax")],
        done(rax=1),
    ),
    apic(
        "MOV to SS holds it back for one instruction",
        [SELF_IPI, "mov ecx, KERNEL_DATA; sti; mov ss, ecx; cli; nop", bit(IRR, 0x40, "eax")],
        any_of(done(rax=1), taken(0x40)),
    ),
    apic("a vector below 16 is no interrupt", [write(ICR, SELF | 5), WAIT], done()),
    apic("HLT ends with an interrupt", [SELF_IPI, "sti; > hlt; nop"], fault(0x40, at="behind")),
    apic(
        "an interrupt gate masks the next",
        [SELF_IPI, write(ICR, SELF | 0x51), WAIT],
        fault(0x51, at="any", now_if=0),
    ),
]

# Both end in the handler of #GP, behind the second NMI or before it.
NMI_IN_FAULT, NO_NMI_IN_FAULT = Done({"rcx": 2}, ANYWHERE), Done({"rcx": 1}, ANYWHERE)
IPI_CHECKS = [
    apic("to all", [write(ICR, ALL | 0x40), WAIT], taken(0x40)),
    apic("to all others", [write(ICR, OTHERS | 0x40), WAIT, bit(IRR, 0x40, "eax")], done(rax=0)),
    apic("to a physical ID", [write(ICR_HIGH, 0), write(ICR, 0x40), WAIT], taken(0x40)),
    apic("to another physical ID", [write(ICR_HIGH, 5 << 24), write(ICR, 0x40), WAIT], done()),
    apic(
        "to the broadcast ID", [write(ICR_HIGH, "0xFF000000"), write(ICR, 0x40), WAIT], taken(0x40)
    ),
    apic(
        "to a logical destination",
        [write(LDR, 0x0400_0000), write(ICR_HIGH, 0x0600_0000), write(ICR, LOGICAL | 0x40), WAIT],
        taken(0x40),
    ),
    apic(
        "to another logical destination",
        [write(LDR, 0x0400_0000), write(ICR_HIGH, 0x0300_0000), write(ICR, LOGICAL | 0x40), WAIT],
        done(),
    ),
    apic(
        "to a cluster",
        [
            write(DFR, "0x0FFFFFFF"),
            write(LDR, 0x2400_0000),
            write(ICR_HIGH, 0x2600_0000),
            write(ICR, LOGICAL | 0x40),
            WAIT,
        ],
        taken(0x40),
    ),
    apic(
        "to another cluster",
        [
            write(DFR, "0x0FFFFFFF"),
            write(LDR, 0x2400_0000),
            write(ICR_HIGH, 0x3600_0000),
            write(ICR, LOGICAL | 0x40),
            WAIT,
        ],
        done(),
    ),
    apic(
        "of the lowest priority",
        [write(LDR, 0x0100_0000), write(ICR_HIGH, 0x0100_0000), write(ICR, LOGICAL | 0x140), WAIT],
        taken(0x40),
    ),
    apic("is not pending when it is read", [SELF_IPI, read(ICR), "and eax, 0x1000"], done(rax=0)),
    apic("an NMI comes without IF", [write(ICR, NMI), "nop; nop"], taken(2)),
    apic("an NMI passes TPR", [write(TPR, 0xF0), write(ICR, NMI), "nop; nop"], taken(2)),
    apic(
        "an NMI waits for IRET of the last",
        [write(ICR, NMI), "nop; nop"],
        done(rbx=2, rcx=1),
        handlers={
            2: f"inc ebx; cmp ebx, 2; je 1f; {write(ICR, NMI)}; nop; nop; mov ecx, ebx; 1: iretd"
        },
    ),
    apic(
        "two NMIs within a handler are one",
        [write(ICR, NMI), "nop; nop"],
        done(rbx=2),
        handlers={
            2: f"inc ebx; cmp ebx, 2; je 1f; {write(ICR, NMI)}; {write(ICR, NMI)}; nop; 1: iretd"
        },
    ),
    apic(
        "IRET of another handler ends the blocking, too",
        [write(ICR, NMI), "nop; nop"],
        done(rbx=2, rcx=2),
        handlers={
            2: f"inc ebx; cmp ebx, 2; je 1f; {write(ICR, NMI)}; int 0x80; nop; nop; "
            "mov ecx, ebx; 1: iretd",
            0x80: "iretd",
        },
    ),
    apic(
        "an NMI wakes HLT",
        [write(ICR, "0x4040"), "mov edx, 0", write(ICR, NMI), "> hlt; nop"],
        any_of(taken(2), taken(0x40)),
    ),
]

IPI_CHECKS += [
    apic(
        "an IRET that faults ends the blocking, too",
        [write(ICR, NMI), "nop; nop"],
        # AMD's manual says no more than "until an IRET is executed" (APM 2, 8.2.3).
        by_vendor(intel=NMI_IN_FAULT, amd=any_of(NMI_IN_FAULT, NO_NMI_IN_FAULT)),
        handlers={
            2: f"inc ebx; cmp ebx, 2; je 1f; {write(ICR, NMI)}; push 2; push 0; push 0; iretd; "
            "1: iretd",
            13: "nop; nop; mov ecx, ebx",
        },
    ),
]

DIVIDE_BY_1 = write(DIVIDE, 0xB)
UNTIL_ZERO = f"1: pause; cmp dword ptr [{APIC + CURRENT:#x}], 0; jne 1b"
TIMER_CHECKS = [
    apic(
        "one shot",
        [DIVIDE_BY_1, write(TIMER, 0x60), write(INITIAL, 1000), "sti; > hlt; nop"],
        fault(0x60, at="any"),
    ),
    apic(
        "one shot: the count ends at 0",
        [
            DIVIDE_BY_1,
            write(TIMER, 0x60),
            write(INITIAL, 1000),
            "sti; hlt; cli",
            read(CURRENT),
            read(INITIAL, "ecx"),
        ],
        done(rax=0, rcx=1000, rbx=0x60),
        handlers={0x60: log(0x60)},
    ),
    apic(
        "one shot comes once",
        [
            DIVIDE_BY_1,
            write(TIMER, 0x60),
            write(INITIAL, 1000),
            "sti",
            UNTIL_ZERO,
            "mov ecx, 1000; 1: pause; loop 1b; cli",
        ],
        done(rbx=0x60),
        handlers={0x60: log(0x60)},
    ),
    apic(
        "periodic",
        [
            DIVIDE_BY_1,
            write(TIMER, PERIODIC | 0x60),
            write(INITIAL, 100_000),
            "sti; 1: hlt; cmp ebx, 3; jb 1b; cli",
            write(INITIAL, 0),
        ],
        done(),
        handlers={0x60: f"inc ebx; {END_OF_INTERRUPT}; iretd"},
    ),
    apic(
        "masked: the count ends, and no interrupt",
        [DIVIDE_BY_1, write(TIMER, MASKED | 0x60), write(INITIAL, 1000), UNTIL_ZERO, WAIT],
        done(rbx=0),
    ),
    apic(
        "an initial count of 0 stops it",
        [
            DIVIDE_BY_1,
            write(TIMER, 0x60),
            write(INITIAL, "0x7FFFFFFF"),
            write(INITIAL, 0),
            read(CURRENT),
            WAIT,
        ],
        done(rax=0),
    ),
    apic(
        "the count counts down",
        [
            DIVIDE_BY_1,
            write(TIMER, MASKED | 0x60),
            write(INITIAL, "0x7FFFFFFF"),
            read(CURRENT),
            "1: pause",
            read(CURRENT, "ecx"),
            "cmp ecx, eax; jae 1b",
        ],
        done(zf=0),
    ),
    apic("the divisor has no bit 2", [write(DIVIDE, 0xF), read(DIVIDE)], done(rax=0xB)),
    apic(
        "deadline",
        [
            write(TIMER, DEADLINE | 0x60),
            "mov ecx, 0x6E0; rdtsc; add eax, 10000; adc edx, 0; wrmsr; sti; > hlt; nop",
        ],
        fault(0x60, at="any"),
        needs=("deadline",),
    ),
    apic(
        "deadline in the past comes at once",
        [
            write(TIMER, DEADLINE | 0x60),
            "mov ecx, 0x6E0; mov eax, 1; mov edx, 0; wrmsr; sti; > hlt; nop",
        ],
        fault(0x60, at="any"),
        needs=("deadline",),
    ),
    apic(
        "deadline: its MSR is 0 behind it",
        [
            write(TIMER, DEADLINE | 0x60),
            "mov ecx, 0x6E0; mov eax, 1; mov edx, 0; wrmsr; sti; hlt; cli; mov eax, 5; rdmsr",
        ],
        done(rax=0, rdx=0),
        handlers={0x60: log(0x60)},
        needs=("deadline",),
    ),
    apic(
        "deadline: 0 disarms it",
        [
            write(TIMER, DEADLINE | 0x60),
            "mov ecx, 0x6E0; mov eax, -1; mov edx, 0x7FFFFFFF; wrmsr",
            "mov eax, 0; mov edx, 0; wrmsr; mov eax, 5; rdmsr",
            WAIT,
        ],
        done(rax=0, rdx=0),
        needs=("deadline",),
    ),
    apic(
        "deadline: the counter does nothing",
        [write(TIMER, DEADLINE | 0x60), write(INITIAL, 1000), read(CURRENT), WAIT],
        done(rax=0),
        needs=("deadline",),
    ),
    apic(
        "without deadline mode its MSR is 0",
        [write(TIMER, 0x60), "mov ecx, 0x6E0; mov eax, 5; mov edx, 5; wrmsr; rdmsr"],
        done(rax=0, rdx=0),
        needs=("deadline",),
    ),
]

TIMER_CHECKS += [
    apic(
        "interrupts in the middle of a REP, which goes on",
        [
            DIVIDE_BY_1,
            write(TIMER, PERIODIC | 0x60),
            write(INITIAL, 20_000),
            "mov edi, 0x100000; mov ecx, 0x600000; mov eax, 0x5A; cld; sti; rep stosb; cli",
            write(INITIAL, 0),
            "mov al, [0x6FFFFF]; cmp ebx, 0",
        ],
        done(rcx=0, rdi=0x70_0000, rax=0x5A),
        handlers={0x60: f"inc ebx; {END_OF_INTERRUPT}; iretd"},
    ),
]

# Bits 3, 1 and 0 of the divide configuration (11.5.4, figure 11-10).
DIVISORS = {1: 0xB, 2: 0, 4: 1, 8: 2, 16: 3, 32: 8, 64: 9, 128: 0xA}


def rate(divisor: int) -> str:
    """EAX: how much the count falls in a million ticks of the TSC.

    Tried again where the vCPU had no processor while one of both was read.
    """
    return "; ".join(
        [
            write(DIVIDE, DIVISORS[divisor]),
            "1: rdtsc; mov esi, eax",
            write(INITIAL, "0xFFFFFFFF"),
            "rdtsc; sub eax, esi; cmp eax, 200000; ja 1b",
            "2: pause; rdtsc; sub eax, esi; cmp eax, 4000000; jb 2b",
            "mov ebp, eax",
            read(CURRENT, "ecx"),
            "rdtsc; sub eax, esi; sub eax, ebp; cmp eax, 200000; ja 1b",
            "not ecx; mov eax, 1000000; mul ecx; div ebp",
        ]
    )


TIMER_CHECKS += [
    apic(
        f"the divisor {divisor}",
        [
            write(TIMER, MASKED | 0x60),
            f"{rate(1)}; mov edi, eax",
            rate(divisor),
            # In percent of what it should be: 80 to 120.
            f"mov ecx, {100 * divisor}; mul ecx; div edi; mov ebx, eax; sub eax, 80; cmp eax, 41",
        ],
        done(cf=1),
    )
    for divisor in DIVISORS
]

X2APIC = {0x1B: 0xFEE0_0D00}


def x2(name: str, code: str, expect: Expected, **more: Any) -> Check:
    return Check(f"x2APIC: {name}", code, expect, msrs=X2APIC, needs=("x2apic",), **more)


def wrmsr(register: int, value: int) -> str:
    index = 0x800 + (register >> 4)
    return (
        f"mov ecx, {index:#x}; mov eax, {value & 0xFFFF_FFFF:#x}; mov edx, {value >> 32:#x}; wrmsr"
    )


def rdmsr(register: int) -> str:
    return f"mov ecx, {0x800 + (register >> 4):#x}; rdmsr"


def refused(name: str, code: str) -> Check:
    return x2(name, code, gp())


ON = wrmsr(SVR, 0x1FF)
X2APIC_CHECKS = [
    x2("the ID has 32 bits", rdmsr(ID), done(rax=0, rdx=0)),
    x2("SVR is written and read", f"{ON}; {rdmsr(SVR)}", done(rax=0x1FF)),
    x2("TPR is CR8", f"{wrmsr(TPR, 0x70)}; mov rax, cr8", done(rax=7)),
    x2("the self IPI", f"{ON}; {wrmsr(0x3F0, 0x40)}; sti; > hlt; nop", fault(0x40, at="behind")),
    x2(
        "the ICR in one write",
        f"{ON}; {wrmsr(ICR, 0x40)}; sti; > hlt; nop",
        fault(0x40, at="behind"),
    ),
    x2(
        "the ICR's shorthand",
        f"{ON}; {wrmsr(ICR, SELF | 0x40)}; sti; > hlt; nop",
        fault(0x40, at="behind"),
    ),
    x2(
        "the ICR to a logical destination",
        f"{ON}; {wrmsr(ICR, 1 << 32 | LOGICAL | 0x40)}; sti; > hlt; nop",
        fault(0x40, at="behind"),
    ),
    x2("the LDR follows the ID", rdmsr(LDR), done(rax=1)),
    x2(
        "the ICR is read back",
        f"{ON}; {wrmsr(ICR, 5 << 32 | 0x40)}; {rdmsr(ICR)}",
        done(rax=0x40, rdx=5),
    ),
    refused("a write of the ID", wrmsr(ID, 0)),
    refused("a write of the version", wrmsr(VERSION, 0)),
    refused("a write of the LDR", wrmsr(LDR, 1)),
    refused("a write of PPR", wrmsr(PPR, 0)),
    refused("a write of ISR", wrmsr(ISR, 0)),
    refused("a write of the current count", wrmsr(CURRENT, 0)),
    refused("a read of EOI", rdmsr(EOI)),
    refused("a read of the self IPI", rdmsr(0x3F0)),
    refused("an EOI that is not 0", wrmsr(EOI, 1)),
    refused("an ESR that is not 0", wrmsr(ESR, 1)),
    refused("the DFR", rdmsr(DFR)),
    refused("the ICR's upper half", rdmsr(ICR_HIGH)),
    refused("a register that does not exist", rdmsr(0x40)),
    refused("a register beyond the last", rdmsr(0x7F0)),
    refused("reserved bits of TPR", wrmsr(TPR, 0x100)),
    refused("reserved bits of SVR", wrmsr(SVR, 1 << 16)),
    refused("reserved bits of the timer's LVT", wrmsr(TIMER, 1 << 20)),
    refused("reserved bits of the self IPI", wrmsr(0x3F0, 0x100)),
    refused("reserved bits of the divisor", wrmsr(DIVIDE, 0x10)),
    refused("the way back to xAPIC", "mov ecx, 0x1B; rdmsr; and eax, 0xFFFFFBFF; wrmsr"),
    x2(
        "off, and to xAPIC",
        "mov ecx, 0x1B; rdmsr; and eax, 0xFFFFF3FF; wrmsr; or eax, 0x800; wrmsr",
        done(),
    ),
    Check(
        "x2APIC from off",
        "mov ecx, 0x1B; rdmsr; and eax, 0xFFFFF7FF; wrmsr; or eax, 0xC00; > wrmsr; nop",
        gp(),
        needs=("x2apic",),
    ),
    Check("x2APIC's MSRs without x2APIC", rdmsr(ID), gp()),
    Check("x2APIC's MSRs without x2APIC: EOI", wrmsr(EOI, 0), gp()),
    x2("user code", rdmsr(ID), gp(), ring=3),
]


@each(REGISTER_CHECKS, PRIORITY_CHECKS, IPI_CHECKS)
def test_local_apic(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(TIMER_CHECKS)
def test_timer(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(X2APIC_CHECKS)
def test_x2apic(engine: Engine, check: Check) -> None:
    run(engine, check)
