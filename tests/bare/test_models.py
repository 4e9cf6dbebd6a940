"""A CPU that lacks a feature: its bits are reserved and its instructions undefined
(Intel SDM 3A, 2.5 and 4.1.4; 2, the exceptions of each instruction; 4, table 2-2)."""

from __future__ import annotations

from tests.bare.check import Check, Engine, Expected, done, each, gp, pf, run, ud
from tests.bare.kernel import NXE, PGE, A, P, Page, W

RSVD = 8


def lacks(feature: str, what: str, code: str, expect: Expected, **more: object) -> Check:
    return Check(f"without {feature}: {what}", code, expect, without=(feature,), **more)  # type: ignore[arg-type]


def set_cr4(bit: int) -> str:
    return f"mov rax, cr4; bts rax, {bit}; mov cr4, rax"


def told(leaf: int, register: str, bit: int) -> str:
    return f"mov eax, {leaf:#x}; mov ecx, 0; cpuid; bt {register}, {bit}"


WRMSR_NOTHING = "mov ecx, {:#x}; rdmsr"
CHECKS = [
    lacks("smep", "CPUID", told(7, "ebx", 7), done(cf=0)),
    lacks("smep", "CR4.SMEP", set_cr4(20), gp()),
    lacks("umip", "CR4.UMIP", set_cr4(11), gp()),
    lacks("fsgsbase", "CR4.FSGSBASE", set_cr4(16), gp()),
    lacks("fsgsbase", "RDFSBASE", "rdfsbase rax", ud()),
    lacks("vme", "CR4.VME", set_cr4(0), gp()),
    lacks("vme", "CR4.PVI", set_cr4(1), gp()),
    lacks("xsave", "CR4.OSXSAVE", set_cr4(18), gp()),
    lacks("xsave", "XGETBV", "xgetbv", ud()),
    lacks(
        "avx",
        "XCR0",
        "mov rax, cr4; bts eax, 18; mov cr4, rax; mov ecx, 0; mov edx, 0; mov eax, 7; xsetbv",
        gp(),
    ),
    lacks("avx", "an instruction", "vxorps xmm0, xmm0, xmm0", ud()),
    lacks(
        "nx",
        "EFER.NXE",
        "mov ecx, 0xC0000080; rdmsr; bts eax, 11; wrmsr",
        gp(),
        change={"efer": (0, NXE)},
    ),
    lacks(
        "syscall",
        "EFER.SCE",
        "mov ecx, 0xC0000080; rdmsr; bts eax, 0; wrmsr",
        gp(),
        change={"efer": (0, 1)},
    ),
    lacks(
        "gib_pages",
        "PS of a page-directory pointer is reserved",
        "mov al, [PAGE]",
        pf(P | RSVD),
        page=Page(P | W | A, bits=30),
    ),
    lacks("rdtscp", "RDTSCP", "rdtscp", ud()),
    lacks("x2apic", "APIC_BASE's bit 10", "mov ecx, 0x1B; rdmsr; bts eax, 10; wrmsr", gp()),
    lacks("x2apic", "its MSRs", "mov ecx, 0x802; rdmsr", gp()),
    lacks("deadline", "its MSR", "mov ecx, 0x6E0; rdmsr", gp()),
    lacks("xsaveopt", "XSAVEOPT", "mov rax, cr4; bts eax, 18; mov cr4, rax; xsaveopt [DATA]", ud()),
    lacks("xsavec", "XSAVEC", "mov rax, cr4; bts eax, 18; mov cr4, rax; xsavec [DATA]", ud()),
    lacks(
        "xgetbv1",
        "XGETBV of 1",
        "mov rax, cr4; bts eax, 18; mov cr4, rax; mov ecx, 1; xgetbv",
        gp(),
    ),
    lacks("pge", "CR4.PGE", set_cr4(7), gp(), change={"cr4": (0, PGE)}),
    lacks("pcid", "CR4.PCIDE", set_cr4(17), gp()),
    lacks("smap", "CR4.SMAP", set_cr4(21), gp()),
    lacks("movbe", "MOVBE", "movbe eax, [DATA]", ud()),
    lacks("popcnt", "POPCNT", "popcnt eax, eax", ud()),
    lacks("cx16", "CMPXCHG16B", "cmpxchg16b [DATA]", ud()),
    lacks("rdrand", "RDRAND", "rdrand eax", ud()),
    lacks("rdseed", "RDSEED", "rdseed eax", ud()),
    lacks("adx", "ADCX", "adcx eax, eax", ud()),
    lacks("bmi1", "ANDN", "andn eax, eax, eax", ud()),
    lacks("bmi1", "TZCNT is BSF", "mov ebx, 0; mov eax, 5; tzcnt eax, ebx", done(rax=5, zf=1)),
    lacks("lzcnt", "LZCNT is BSR", "mov ebx, 8; lzcnt eax, ebx", done(rax=3, zf=0)),
    lacks("bmi2", "MULX", "mulx eax, ecx, ebx", ud()),
    lacks("aes", "AESENC", "aesenc xmm0, xmm1", ud()),
    lacks("sse4_2", "CRC32", "crc32 eax, al", ud()),
    lacks("sha", "SHA1NEXTE", "sha1nexte xmm0, xmm1", ud()),
]


@each(CHECKS)
def test_lesser_models(engine: Engine, check: Check) -> None:
    run(engine, check)
