"""XSAVE and its kin: XCR0, headers, what is saved and what is initial
(Intel SDM 1, 13.1 to 13.12; 2D; AMD APM 2, 11.5)."""

from __future__ import annotations

import struct
from typing import Any

from tests.bare.check import NM, PF, Check, Engine, Expected, any_of, done, each, fault, gp, run, ud
from tests.bare.kernel import DATA, OSXSAVE, TS, Mode, P, Page, W

X87, SSE, AVX = 1, 2, 4
MXCSR, XSTATE_BV, XCOMP_BV, XMM0, YMM0 = 24, 512, 520, 160, 576
COMPACT = 1 << 63


def xsetbv(value: int, index: int = 0) -> str:
    return f"mov ecx, {index}; mov eax, {value & 0xFFFF_FFFF:#x}; mov edx, {value >> 32:#x}; xsetbv"


def xs(name: str, code: str, expect: Expected, *needs: str, **more: Any) -> Check:
    """With CR4.OSXSAVE set; XCR0 is then 1 (13.3)."""
    change = {"cr4": (OSXSAVE, 0)} | more.pop("change", {})
    return Check(name, code, expect, change=change, needs=("xsave", *needs), **more)


OFF = {"cr4": (0, OSXSAVE)}
XCR0_CHECKS = [
    Check("XSETBV without OSXSAVE", "xsetbv", ud()),
    Check("XGETBV without OSXSAVE", "xgetbv", ud()),
    Check("XSAVE without OSXSAVE", "xsave [DATA]", ud()),
    Check("XRSTOR without OSXSAVE", "xrstor [DATA]", ud()),
    Check(
        "CPUID tells of OSXSAVE",
        "mov rax, cr4; bts eax, 18; mov cr4, rax; mov eax, 1; cpuid; bt ecx, 27",
        done(cf=1),
        needs=("xsave",),
    ),
    Check("CPUID tells of no OSXSAVE", "mov eax, 1; cpuid; bt ecx, 27", done(cf=0)),
    xs("XCR0 is 1 at first", "mov ecx, 0; xgetbv", done(rax=1, rdx=0)),
    xs("XCR0 of x87 and SSE", f"{xsetbv(X87 | SSE)}; xgetbv", done(rax=3, rdx=0)),
    xs("XCR0 of AVX", f"{xsetbv(X87 | SSE | AVX)}; xgetbv", done(rax=7, rdx=0), "avx"),
    xs("XCR0 without x87", xsetbv(SSE), gp()),
    xs("XCR0 of 0", xsetbv(0), gp()),
    xs("XCR0 of AVX without SSE", xsetbv(X87 | AVX), gp()),
    xs("XCR0's bit 63", xsetbv(1 << 63 | X87), gp()),
    xs("XCR0's bit 40", xsetbv(1 << 40 | X87), gp()),
    xs("XCR0 of AVX-512's masks alone", xsetbv(7 | 1 << 5), gp()),
    xs("XCR1", xsetbv(1, 1), gp()),
    xs("XSETBV of user code", xsetbv(X87), gp(), ring=3),
    xs("XGETBV of user code", "mov ecx, 0; xgetbv", done(rax=1), ring=3),
    xs("XGETBV of 2", "mov ecx, 2; xgetbv", gp()),
    xs("XGETBV of 1 without XGETBV1", "mov ecx, 1; xgetbv", gp(), "!xgetbv1"),
    xs(
        "XGETBV of 1: nothing is in use",
        "fninit; mov ecx, 1; xgetbv; and eax, 4",
        done(rax=0),
        "xgetbv1",
    ),
    xs(
        "XGETBV of 1: SSE is in use",
        f"{xsetbv(3)}; pcmpeqd xmm3, xmm3; mov ecx, 1; xgetbv; and eax, 2",
        done(rax=2),
        "xgetbv1",
    ),
    xs("AVX without its bit of XCR0", "vaddps ymm0, ymm1, ymm2", ud(), "avx"),
    xs("AVX with its bit of XCR0", f"{xsetbv(7)}; vaddps ymm0, ymm1, ymm2", done(), "avx"),
    xs(
        "AVX with TS",
        f"{xsetbv(7)}; mov rax, cr0; or eax, 8; mov cr0, rax; vaddps ymm0, ymm1, ymm2",
        fault(NM),
        "avx",
    ),
    Check("AVX without OSXSAVE", "vaddps ymm0, ymm1, ymm2", ud(), needs=("avx",)),
    xs("XSETBV in 32-bit code", xsetbv(3), done(), mode=Mode.PROT32),
    xs("XSETBV in real mode", xsetbv(3), done(), mode=Mode.REAL),
    xs(
        "CPUID's leaf 0xD follows XCR0",
        f"{xsetbv(3)}; mov eax, 0xD; mov ecx, 0; cpuid",
        done(rbx=576),
    ),
]


def area(xstate: int = 0, xcomp: int = 0, **fields: int) -> bytes:
    """An XSAVE area of 832 bytes: MXCSR, the header, and XMM0 and YMM0's upper half."""
    image = bytearray(832)
    struct.pack_into("<H", image, 0, 0x37F)
    struct.pack_into("<I", image, MXCSR, fields.get("mxcsr", 0x1F80))
    struct.pack_into("<QQ", image, XSTATE_BV, xstate, xcomp)
    struct.pack_into("<Q", image, XSTATE_BV + 16, fields.get("reserved", 0))
    struct.pack_into("<Q", image, XMM0, fields.get("xmm0", 0))
    struct.pack_into("<Q", image, YMM0, fields.get("ymm0", 0))
    return bytes(image)


ALL = f"{xsetbv(7)}; mov eax, {{}}; mov edx, 0; "
FILL = "pcmpeqd xmm0, xmm0; "
SEEN = {
    "xstate": (DATA + XSTATE_BV, 8), "xcomp": (DATA + XCOMP_BV, 8), "xmm0": (DATA + XMM0, 8),
    "ymm0": (DATA + YMM0, 8), "mxcsr": (DATA + MXCSR, 4), "fcw": (DATA, 2),
    "high": (DATA + XSTATE_BV + 16, 8),
}  # fmt: skip
ONES = (1 << 64) - 1
DIRTY = b"\xcc" * 832
CLEAN = b"\xcc" * 512 + bytes(64) + b"\xcc" * 256


def saves(
    name: str,
    instruction: str,
    expect: Expected,
    *needs: str,
    mask: int = 7,
    setup: str = FILL,
    memory: bytes = CLEAN,
    **more: Any,
) -> Check:
    code = ALL.format(mask) + f"vzeroall; fninit; {setup}{instruction} [DATA]"
    return xs(name, code, expect, "avx", *needs, memory={DATA: memory}, read=SEEN, **more)


CC = 0xCCCC_CCCC_CCCC_CCCC
SAVE_CHECKS = [
    saves("XSAVE of SSE that is in use", "xsave", done(xmm0=ONES, xcomp=0)),
    saves("XSAVE of a mask without SSE leaves it", "xsave", done(xmm0=CC), mask=1),
    saves("XSAVE of AVX alone has MXCSR", "xsave", done(xmm0=CC, mxcsr=0x1F80), mask=4),
    saves("XSAVE of x87 alone leaves MXCSR", "xsave", done(fcw=0x37F, mxcsr=0xCCCC_CCCC), mask=1),
    saves(
        "XSAVE leaves bits of the header that are not asked for", "xsave", done(xstate=0), mask=0
    ),
    saves(
        "XSAVE keeps other bits of XSTATE_BV",
        "xsave",
        done(xstate=1 << 1 | 1 << 5),
        mask=2,
        memory=area(1 << 5),
    ),
    saves(
        "XSAVE leaves the rest of the header",
        "xsave",
        done(high=0x1234),
        memory=area(reserved=0x1234),
    ),
    saves(
        "XSAVEOPT of a state that is initial leaves its place",
        "xsaveopt",
        done(ymm0=CC),
        "xsaveopt",
    ),
    saves(
        "XSAVEOPT clears the bit of a state that is initial",
        "xsaveopt",
        done(xstate=X87 | SSE),
        "xsaveopt",
        mask=6,
        memory=area(7),
    ),
    saves(
        "XSAVEC of SSE: its header",
        "xsavec",
        done(xstate=SSE, xcomp=COMPACT | 2, xmm0=ONES),
        "xsavec",
        mask=2,
    ),
    saves(
        "XSAVEC of a state that is initial",
        "xsavec",
        done(xstate=SSE, xcomp=COMPACT | 6, ymm0=CC),
        "xsavec",
        mask=6,
    ),
    saves(
        "XSAVEC clears nothing of the header's rest",
        "xsavec",
        any_of(done(high=0), done(high=CC)),
        "xsavec",
        memory=DIRTY,
    ),
    saves(
        "XSAVEC of AVX in use",
        "xsavec",
        done(xstate=6, xcomp=COMPACT | 6, ymm0=ONES),
        "xsavec",
        mask=6,
        setup="vcmptrueps ymm0, ymm0, ymm0; ",
    ),
    Check("XSAVEC without the feature", "xsavec [DATA]", ud(), needs=("!xsavec",)),
    Check("XSAVES without the feature", "xsaves [DATA]", ud(), needs=("!xsaves",)),
    Check("XRSTORS without the feature", "xrstors [DATA]", ud(), needs=("!xsaves",)),
    xs("XSAVE off its alignment", "mov eax, 7; mov edx, 0; > xsave [DATA + 16]; nop", gp()),
    xs("XRSTOR off its alignment", "mov eax, 7; mov edx, 0; > xrstor [DATA + 32]; nop", gp()),
    xs("XSAVE with TS", "xsave [DATA]", fault(NM), change={"cr0": (TS, 0)}),
    xs("XRSTOR with TS", "xrstor [DATA]", fault(NM), change={"cr0": (TS, 0)}),
    xs("XSAVE to a read-only page", "mov eax, 3; xsave [PAGE]", fault(PF, P | W), page=Page(P)),
    xs("LOCK XSAVE", ".byte 0xF0, 0x0F, 0xAE, 0x27", ud(), regs={"rdi": DATA}),
    Check("FXSAVE off its alignment", "fxsave [DATA + 8]", gp()),
    Check(
        "FXRSTOR with reserved bits of MXCSR",
        "fxrstor [DATA]",
        gp(),
        memory={DATA: area(mxcsr=1 << 16 | 0x1F80)},
    ),
    Check("FXSAVE with TS", "fxsave [DATA]", fault(NM), change={"cr0": (TS, 0)}),
    Check(
        "LDMXCSR with reserved bits",
        "ldmxcsr [DATA]",
        gp(),
        memory={DATA: struct.pack("<I", 1 << 16)},
    ),
]


def restores(
    name: str,
    image: bytes,
    expect: Expected,
    *needs: str,
    mask: int = 7,
    then: str = "movq rbx, xmm0",
) -> Check:
    """XRSTOR with XMM0 full of ones, and what XMM0 then holds."""
    code = ALL.format(mask) + f"{FILL}> xrstor [DATA]; {then}"
    return xs(name, code, expect, "avx", *needs, memory={DATA: image})


def spoilt(offset: int) -> bytes:
    image = bytearray(area(3))
    image[XSTATE_BV + offset] = 1
    return bytes(image)


UPPER = "vextractf128 xmm1, ymm0, 1; movq rbx, xmm1"
RESTORE_CHECKS = [
    restores("XRSTOR of SSE", area(SSE, xmm0=0x1234), done(rbx=0x1234)),
    restores("XRSTOR of a bit that is clear is initial", area(X87, xmm0=0x1234), done(rbx=0)),
    restores(
        "XRSTOR of a mask without SSE leaves it", area(SSE, xmm0=0x1234), done(rbx=ONES), mask=1
    ),
    restores("XRSTOR of AVX", area(AVX, ymm0=0x5678), done(rbx=0x5678), then=UPPER),
    restores(
        "XRSTOR loads MXCSR with AVX alone",
        area(AVX, mxcsr=0x1FC0),
        done(rbx=0x1FC0),
        mask=4,
        then="stmxcsr [DATA]; mov ebx, [DATA]",
    ),
    restores(
        "XRSTOR of x87 alone leaves MXCSR",
        area(X87, mxcsr=0x1FC0),
        done(rbx=0x1F80),
        mask=1,
        then="stmxcsr [DATA]; mov ebx, [DATA]",
    ),
    restores("XRSTOR of a component that XCR0 lacks", area(3 | 1 << 9), gp()),
    restores("XRSTOR of bit 63 of XSTATE_BV", area(3 | 1 << 63), gp()),
    restores("XRSTOR with reserved bits of MXCSR", area(SSE, mxcsr=1 << 16 | 0x1F80), gp()),
    restores("XRSTOR with byte 16 of the header", spoilt(16), gp()),
    restores("XRSTOR with byte 23 of the header", spoilt(23), gp()),
    restores("XRSTOR with XCOMP_BV without the compact form", area(3, 2), gp()),
    restores("XRSTOR of the compact form without XSAVEC", area(3, COMPACT | 3), gp(), "!xsavec"),
    restores(
        "XRSTOR of the compact form",
        area(SSE, COMPACT | 2, xmm0=0x1234),
        done(rbx=0x1234),
        "xsavec",
    ),
    restores(
        "XRSTOR of the compact form: AVX follows",
        area(AVX, COMPACT | 6, ymm0=0x5678),
        done(rbx=0x5678),
        "xsavec",
        then=UPPER,
    ),
    restores(
        "XRSTOR of the compact form with a bit that it lacks",
        area(SSE, COMPACT | 1),
        gp(),
        "xsavec",
    ),
    restores(
        "XRSTOR of the compact form with a component that XCR0 lacks",
        area(SSE, COMPACT | 2 | 1 << 9),
        gp(),
        "xsavec",
    ),
    restores(
        "XRSTOR of the compact form with byte 16 of the header",
        area(SSE, COMPACT | 2, reserved=1),
        gp(),
        "xsavec",
    ),
    restores("XRSTOR that faults leaves the state", area(3 | 1 << 9, xmm0=5), gp()),
]


# AMD's own (APM 2, 3.1.7 and 11.5.4): FXSAVE of the kernel's 64-bit code leaves out XMM registers,
# and MXCSR.MM lets SSE operands lie anywhere.
FFXSR, MISALIGNED = {"efer": (1 << 14, 0)}, 1 << 17
AMD_CHECKS = [
    Check(
        "EFER.FFXSR: FXSAVE leaves XMM0",
        f"{FILL}fxsave [DATA]",
        done(xmm0=CC),
        change=FFXSR,
        memory={DATA: DIRTY},
        read=SEEN,
        needs=("ffxsr",),
    ),
    Check(
        "EFER.FFXSR: FXRSTOR leaves XMM0",
        f"{FILL}fxrstor [DATA]; movq rax, xmm0",
        done(rax=ONES),
        change=FFXSR,
        memory={DATA: area(xmm0=5)},
        needs=("ffxsr",),
    ),
    Check(
        "EFER.FFXSR: FXSAVE of user code has XMM0",
        f"{FILL}fxsave [DATA]",
        done(xmm0=ONES),
        ring=3,
        change=FFXSR,
        memory={DATA: DIRTY},
        read=SEEN,
        needs=("ffxsr",),
    ),
    Check(
        "EFER.FFXSR: FXSAVE of 32-bit code has XMM0",
        f"{FILL}fxsave [DATA]",
        done(xmm0=ONES),
        Mode.COMPAT32,
        change=FFXSR,
        memory={DATA: DIRTY},
        read=SEEN,
        needs=("ffxsr",),
    ),
    Check(
        "without FFXSR its bit of EFER is reserved",
        "mov ecx, 0xC0000080; rdmsr; bts eax, 14; wrmsr",
        gp(),
        needs=("!ffxsr",),
    ),
    Check(
        "MXCSR.MM: an operand off its alignment",
        "ldmxcsr [DATA]; addps xmm0, [DATA + 20]",
        done(),
        memory={DATA: struct.pack("<I", MISALIGNED | 0x1F80)},
        needs=("misalignsse",),
    ),
    Check(
        "MXCSR.MM: MOVAPS stays aligned",
        "ldmxcsr [DATA]; > movaps xmm0, [DATA + 20]; nop",
        gp(),
        memory={DATA: struct.pack("<I", MISALIGNED | 0x1F80)},
        needs=("misalignsse",),
    ),
    Check("without MXCSR.MM an operand off its alignment", "addps xmm0, [DATA + 20]", gp()),
]


@each(AMD_CHECKS)
def test_amd(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(XCR0_CHECKS)
def test_xcr0(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(SAVE_CHECKS, RESTORE_CHECKS)
def test_xsave(engine: Engine, check: Check) -> None:
    run(engine, check)
